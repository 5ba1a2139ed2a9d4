"""Products as Triton compiles them for Hopper, to JSON on stdout: constants and PTX of each.

A script of its own, as the tests' process has Triton's interpreter switched on.
"""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def multiply(
    a, b, c, out, N: tl.constexpr, K: tl.constexpr, TRANSPOSE_A: tl.constexpr,
    TRANSPOSE_B: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """out (64, N) = a b, or a b c with CHAIN; in memory a is (64, K), b (N, K), c (N, N)."""
    m, n, k = tl.arange(0, 64), tl.arange(0, N), tl.arange(0, K)
    if TRANSPOSE_A:
        left = tl.trans(tl.load(a + k[:, None] * 64 + m[None, :]))
    else:
        left = tl.load(a + m[:, None] * K + k[None, :])
    if TRANSPOSE_B:
        right = tl.load(b + k[:, None] * N + n[None, :])
    else:
        right = tl.trans(tl.load(b + n[:, None] * K + k[None, :]))
    product = tl.dot(left, right)
    if CHAIN:
        product = tl.dot(product.to(tl.bfloat16), tl.load(c + n[:, None] * N + n[None, :]))
    tl.store(out + m[:, None] * N + n[None, :], product)


@triton.jit
def multiply_by_tma(a, b, out, TRANSPOSE_B: tl.constexpr):
    """out (64, 128) = a b, of whole tiles; in memory a is (64, 128), b (128, 128)."""
    right = b.load([0, 0])
    if not TRANSPOSE_B:
        right = right.T
    out.store([0, 0], tl.dot(a.load([0, 0]), right).to(tl.bfloat16))


def compiled(kernel, signature, constants):
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(
        kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attrs=aligned
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def plain(**constants):
    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "out": "*fp32"}
    return constants | {"ptx": compiled(multiply, signature, constants).asm["ptx"]}


def by_tma(**constants):
    tile, square = "tensordesc<bf16[64,128]>", "tensordesc<bf16[128,128]>"
    signature = {"a": tile, "b": square, "out": tile}
    kernel = compiled(multiply_by_tma, signature, constants)
    return constants | {"ptx": kernel.asm["ptx"], "maps": kernel.metadata.tensordesc_meta}


if __name__ == "__main__":
    cases = [
        {"N": 128, "K": 128, "TRANSPOSE_A": a, "TRANSPOSE_B": b, "CHAIN": False}
        for a in (False, True)
        for b in (False, True)
    ]
    cases.append({"N": 64, "K": 64, "TRANSPOSE_A": False, "TRANSPOSE_B": False, "CHAIN": True})
    tma = [by_tma(TRANSPOSE_B=b) for b in (False, True)]
    print(json.dumps({"plain": [plain(**case) for case in cases], "tma": tma}))
