"""What nvcc makes of attention's forward for Hopper: no spills, and the products overlap."""

import re
import subprocess

import hopper_calls
import pytest

DIMS = (64, 96, 128, 192, 256)

pytestmark = [pytest.mark.slow, hopper_calls.needs_nvcc]


@pytest.mark.parametrize("dim", DIMS)
def test_compiled(tmp_path_factory, dim):
    target, report = hopper_calls.compiled(tmp_path_factory, f"attention_forward_{dim}.cu")
    # C7508 to C7515: setmaxnreg ignored, products one at a time.
    assert not re.findall(r".*(?:C75\d\d|warning).*", report)
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    used = re.findall(sizes, report)
    assert used == [("0", "0", "0")] * 4  # two dtypes, with dropout and without
    assert set(re.findall(r"Used (\d+) registers", report)) == {"168"}  # 64 K over 384 threads

    triton = pytest.importorskip("triton")
    dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", target]
    sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 4
    for kernel in kernels:
        check_kernel(kernel, dim)


def check_kernel(sass: str, dim: int) -> None:
    if "Lb1E" in sass.splitlines()[0]:
        hopper_calls.check_bit_loop(sass)
    assert not re.findall(r"\b(?:LDL|STL|HMMA)\b", sass)
    names = r"HGMMA\.\w+|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|USETMAXREG\S*"
    code = re.findall(names, sass)
    assert sum(name.startswith("USETMAXREG") for name in code) == 2
    keys = 128 if dim <= 128 else 96 if dim <= 192 else 64
    wide = -(-dim // 64) * 64
    scores = [f"HGMMA.64x{keys}x16" for _ in range(dim // 16)]
    out = [f"HGMMA.64x{wide}x16" for _ in range(keys // 16)]
    # The loop: both products are started, and every exponential is computed before O is waited for.
    wait = code.index("WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert code[wait - len(scores + out) : wait] == scores + out
    end = code.index("WARPGROUP.DEPBAR.LE gsb0, 0x0", wait)
    # Of P, and of what O is rescaled by, for a thread's two rows.
    assert code[wait + 1 : end] == ["MUFU.EX2"] * (keys // 2 + 2)
