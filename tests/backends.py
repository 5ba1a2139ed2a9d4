"""The backends that tests compare, on the device where tests make their tensors."""

import torch

from fusedformer.kernels import native

# The C++ kernels run on the CPU, so not beside Triton's where there is a GPU; without a compiler
# they run nowhere (tests/test_native.py asks why).
_CPU = not torch.cuda.is_available() and native.library()[1] is None
BACKENDS = ("reference", "triton", "cpu") if _CPU else ("reference", "triton")
ROW_BACKENDS = BACKENDS
