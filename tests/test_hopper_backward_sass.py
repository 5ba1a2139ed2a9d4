"""What nvcc makes of attention's backward for Hopper: no spills, and the products overlap."""

import re
import subprocess

import hopper_calls
import pytest

pytestmark = [pytest.mark.slow, hopper_calls.needs_nvcc]


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_compiled(tmp_path_factory, dim):
    target, report = hopper_calls.compiled(tmp_path_factory, f"attention_backward_{dim}.cu")
    # C7508 to C7515: setmaxnreg ignored, products one at a time.
    assert not re.findall(r".*(?:C75\d\d|warning).*", report)
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    # Two dtypes: before, after, and between them with dropout and without.
    assert re.findall(sizes, report) == [("0", "0", "0")] * 8

    triton = pytest.importorskip("triton")
    dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", target]
    sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    kernels = [code for code in sass.split("Function : ")[1:] if "attention_grads" in code[:60]]
    assert len(kernels) == 4
    for kernel in kernels:
        check_kernel(kernel, dim, dropout="Lb1E" in kernel.splitlines()[0])


def check_kernel(sass: str, dim: int, dropout: bool) -> None:
    if dropout:
        hopper_calls.check_bit_loop(sass)
    assert not re.findall(r"\b(?:LDL|STL|HMMA)\b", sass)
    changes = re.findall(r"USETMAXREG\S* (?:UP0, )?(0x\w+)", sass)
    assert sorted(int(count, 16) for count in changes) == ([40, 232] if dropout else [24, 240])

    names = r"HGMMA\.\w+|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|BAR\.SYNC\S* 0x1"
    code = [re.sub(r".*gsb0, 0x|\.DEFER\S*", "", name) for name in re.findall(names, sass)]
    code = code[code.index(f"HGMMA.64x{scores_of(dim)}x16") :]

    def products(columns: int, steps: int) -> list[str]:
        return [f"HGMMA.64x{columns}x16"] * steps

    splits_keys = dim <= 128
    keys, queries = (128 if splits_keys else 64), (128 if dim == 64 else 64)
    own = dim if splits_keys else dim // 2
    wide = -(-own // 64) * 64  # whole panels
    value, key = products(wide, queries // 16), products(wide, queries // 16)
    query = products(64 if splits_keys else wide, keys // 16)
    exponentials = ["MUFU.EX2"] * (scores_of(dim) // 2)
    wanted = [*products(scores_of(dim), 2 * (dim // 16)), "1", *exponentials]
    if splits_keys and queries == 64 and not dropout:
        wanted += [*value, "1", "BAR.SYNC 0x1"]  # dV starts before dP is waited for
    elif splits_keys:
        wanted += ["0", *value, "BAR.SYNC 0x1"]
    else:
        wanted += ["0", "BAR.SYNC 0x1", *value]
    wanted += [*query, *key, "1", "0"]  # dQ leaves while dK is under way
    assert code[: len(wanted)] == wanted


def scores_of(dim: int) -> int:
    """Columns of a warpgroup's S^T."""
    return {64: 128, 96: 64, 128: 64}.get(dim, 32)
