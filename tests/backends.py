"""The backends that tests compare, on the device where tests make their tensors."""

BACKENDS = ("reference", "triton")
