"""Attention's backward for Hopper, run on the host by the emulator, against float64."""

import ctypes
import random
import shutil

import attention_cases as cases
import hopper_calls
import pytest
import torch
from bounds import assert_within_bound
from hopper_calls import pointer

from fusedformer.benchmarks.cuda_variants import Tensor4

pytestmark = pytest.mark.skipif(
    hopper_calls.COMPILER is None, reason="there is no C++ compiler here"
)

TILES = (64, 96, 128, 192, 256)
PLAIN = {
    "dtype": torch.bfloat16, "batch": 1, "heads": (1, 1), "queries": 128, "keys": 128, "dim": 64,
    "causal": False, "mask": None, "lengths": False, "p": 0.0, "scale": None, "offsets": None,
    "layout": "bnhd", "grads": "out",
}  # fmt: skip
# Every option at once, on one head of keys for two of queries, with ragged ends.
RICH = {
    **PLAIN, "batch": 2, "heads": (2, 1), "queries": 150, "keys": 170, "causal": True,
    "lengths": True, "p": 0.1, "scale": -0.5, "offsets": (3, 1, 32, 16), "grads": "both",
}  # fmt: skip


class AttentionGrads(ctypes.Structure):
    """csrc/cuda/attention.h"""

    _fields_ = [
        *((n, Tensor4) for n in ("grad_out", "grad_query", "grad_key", "grad_value")),
        ("grad_lse", ctypes.c_void_p),
        ("deterministic", ctypes.c_bool),
        ("workspace", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """library(dim): the kernels of the smallest tile that takes it."""
    folder, built = tmp_path_factory.mktemp("backward"), {}

    def build(dim):
        tile = next(tile for tile in TILES if dim <= tile)
        if not built:
            built["emulator"] = hopper_calls.build_emulator(folder)
        if tile not in built:
            path = folder / f"backward{tile}.so"
            built[tile] = hopper_calls.build_driver(
                "backward_main.cpp", tile, path, built["emulator"]
            )
            built[tile].workspace_bytes.restype = ctypes.c_size_t
        return built[tile]

    return build


def backward(library, tensors, options, grads, out, lse, *, seed=0, resident=1, turns=False):
    """(dQ, dK, dV) as the kernels leave them.

    Args:
        seed: of the emulator's events.
        resident: how many CTAs run at once.
        turns: the deterministic mode.
    """
    call, _alive = hopper_calls.attention_call(tensors, options, out, lse)
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = [hopper_calls.poisoned(t) for t in tensors]
    floats = library.workspace_bytes(ctypes.byref(call), turns) // 4
    workspace = torch.full((floats,), torch.nan)
    given = AttentionGrads(
        Tensor4(grad_out), *map(Tensor4, found), pointer(grad_lse), turns, pointer(workspace)
    )
    error = ctypes.create_string_buffer(8000)
    failed = library.backward(
        ctypes.byref(call), ctypes.byref(given), resident, ctypes.c_uint64(seed), error,
        ctypes.c_size_t(8000),
    )  # fmt: skip
    assert not failed, error.value.decode()
    return found


def _worse(a, b, truth):
    """The one with the larger error."""
    return b if (b - truth).abs().max() > (a - truth).abs().max() else a


def run(library, case, **how):
    """(dQ, dK, dV) of a case, and what they are to be compared with."""
    tensors, options, grads = cases.make_inputs(case)
    truth = cases.run_plain(tensors, options, grads, torch.float64)
    out, lse = truth["out"].detach().to(case["dtype"]), truth["lse"].detach().float()
    poisoned = cases.poison(tensors, options["key_lengths"])
    found = backward(library(case["dim"]), poisoned, options, grads, out, lse, **how)
    return found, (tensors, options, grads, truth)


def check(library, case, **how):
    """The gradients of a case against float64."""
    found, (tensors, options, grads, truth) = run(library, case, **how)
    eager = cases.run_plain(tensors, options, grads, case["dtype"])
    saved = cases.run_saved_lse(tensors, options, grads, torch.randperm(case["dim"]))
    terms = cases.gradient_terms(tensors, options, grads)
    for name, grad in zip(("grad_query", "grad_key", "grad_value"), found, strict=True):
        plain = _worse(eager[name], saved[name].to(case["dtype"]), truth[name])
        assert_within_bound(name, grad, plain, truth[name], terms[name])
    return found


def test_every_option_at_once(library):
    check(library, RICH)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 104, 128, 136, 192, 256])
def test_dimensions(library, dim, p):
    dtype = torch.bfloat16 if (dim == 64) == bool(p) else torch.float16
    check(library, {**RICH, "batch": 1, "dim": dim, "dtype": dtype, "p": p}, seed=dim)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "dim"),
    [(1, 1, 64), (1, 129, 128), (127, 64, 192), (129, 65, 64), (193, 257, 128), (65, 63, 256)],
)
def test_ragged_ends(library, queries, keys, dim, causal):
    case = {**PLAIN, "queries": queries, "keys": keys, "causal": causal, "dim": dim}
    check(library, case, seed=queries)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_any_order_of_events(library, dim):
    """Four tiles of queries for one block of keys: what a missing barrier or buffer would spoil."""
    case = {**PLAIN, "queries": 400 if dim == 64 else 200, "keys": 64, "dim": dim}
    for seed in range(6):
        check(library, case, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("grads", ["out", "lse", "both"])
@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (2, 2)])
def test_groups_and_upstream_gradients(library, heads, grads):
    case = {**PLAIN, "heads": heads, "queries": 70, "keys": 140, "grads": grads, "batch": 2}
    check(library, case)


@pytest.mark.slow
def test_rows_without_keys_and_lengths_of_nothing(library):
    """Zeros, though K and V past the lengths are NaN, and dO of a row without keys is not zero."""
    tensors, options, grads = cases.make_inputs({**RICH, "dim": 64})
    options["key_lengths"] = torch.tensor([0, 3], dtype=torch.int32)
    options["offsets"] = (0, 0, 0, 32)
    truth = cases.run_plain(tensors, options, grads, torch.float64)
    out, lse = truth["out"].detach().bfloat16(), truth["lse"].detach().float()
    poisoned = cases.poison(tensors, options["key_lengths"])
    grad_query, grad_key, grad_value = backward(
        library(64), poisoned, options, grads, out, lse, turns=True
    )
    empty = lse == -torch.inf
    assert empty[0].all()
    assert torch.equal(empty[1], (torch.arange(150) < 32).expand(2, -1))
    assert torch.equal((grad_query == 0).all(-1), empty)
    for grad in (grad_key, grad_value):
        assert not grad[0].any()
        assert torch.equal((grad[1] == 0).all(-1), (torch.arange(170) >= 3)[None])


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "causal"), [(64, False), (64, True), (256, False)])
def test_deterministic(library, dim, causal):
    """With turns equal bits whatever comes first. Without them dQ may have others: its sums are of
    three blocks of keys, and their order shows. One CTA sums dK and dV, in a fixed order."""
    case = {**PLAIN, "queries": 150, "keys": 300, "causal": causal, "heads": (2, 1), "dim": dim}
    case["dtype"] = torch.float16  # less of a sum's last bits is rounded away
    first = check(library, case, turns=True)
    for seed in range(1, 4):
        again, _ = run(library, case, turns=True, seed=seed, resident=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    free = [run(library, case, seed=seed, resident=3)[0] for seed in range(3)]
    assert causal or any(not torch.equal(first[0], other[0]) for other in free)
    assert all(torch.equal(first[i], other[i]) for other in free for i in (1, 2))


def test_tiles_and_turns_against_the_mask(library):
    """A block of keys visits the tiles that see it; to a tile they add in turn, the last first."""
    source, lib = random.Random(0), library(64)
    for _ in range(500):
        n_queries, n_keys = source.randint(1, 60), source.randint(1, 60)
        rows, columns = source.choice([4, 8, 16]), source.choice([4, 8, 16])
        length = source.choice([n_keys, source.randint(0, n_keys)])
        diagonal = source.choice([n_keys, source.randint(-n_queries, n_keys)])
        tiles, blocks = -(-n_queries // rows), -(-n_keys // columns)
        turns = {tile: [] for tile in range(tiles)}
        for block in reversed(range(blocks)):
            key = block * columns
            first = lib.first_tile(key, length, diagonal, n_queries, rows)
            for tile in range(tiles):
                # Whether the tile's last row, were it there, would see the block's first key.
                seen = key < length and key <= (tile + 1) * rows - 1 + diagonal
                assert seen == (first <= tile)
                if seen:
                    turns[tile].append(lib.turn(block, tile, length, diagonal, rows, columns))
        assert all(taken == list(range(len(taken))) for taken in turns.values())


# --- Mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "dQ's buffer before it is read": ("    tma_wait_read<1>();\n", ""),
    "fence of dQ": (
        "    fence_async();\n    mbarrier_arrive(&s.grad_query_full",
        "    mbarrier_arrive(&s.grad_query_full",
    ),
    "wait for dQ's buffer": ("mbarrier_wait(&s.grad_query_empty[consumer], (t + 1) % 2);", ""),
    "fence of dS": (
        "    fence_async();\n    barrier_sync(kBothConsumers, 128 * kConsumers);\n    if",
        "    barrier_sync(kBothConsumers, 128 * kConsumers);\n    if",
    ),
    "a turn before the sums are there": ("      tma_wait<0>();\n", ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(tmp_path, mistake):
    """Each is put into the sources, and the tests above see it."""
    shutil.copytree(hopper_calls.CUDA.parent, tmp_path / "csrc")
    right, wrong = MISTAKES[mistake]
    cuda, found = tmp_path / "csrc" / "cuda", 0
    for path in cuda.glob("attention_backward*.h"):
        text = path.read_text()
        found += text.count(right)
        path.write_text(text.replace(right, wrong))
    assert found == 1, "the sources no longer have this"
    emulator = hopper_calls.build_emulator(tmp_path)
    library = hopper_calls.build_driver(
        "backward_main.cpp", 64, tmp_path / "backward.so", emulator, cuda
    )
    library.workspace_bytes.restype = ctypes.c_size_t
    turns = "turn" in mistake
    case = {**PLAIN, "queries": 140 if turns else 400, "keys": 300 if turns else 64}
    case["dtype"] = torch.float16

    def check_seeds():
        found = [
            check(lambda dim: library, case, seed=seed, resident=3 if turns else 1, turns=turns)
            for seed in range(12)
        ]
        assert not turns or all(torch.equal(found[0][0], grads[0]) for grads in found)

    with pytest.raises(AssertionError):
        check_seeds()
