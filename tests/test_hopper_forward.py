"""Attention's forward for Hopper, run on the host by the emulator, against float64."""

import ctypes
import re
import shutil

import attention_cases as cases
import hopper_calls
import pytest
import torch
from bounds import assert_within_bound
from pairwise import pairwise

from fusedformer.kernels import rng

pytestmark = pytest.mark.skipif(
    hopper_calls.COMPILER is None, reason="there is no C++ compiler here"
)

TILES = (64, 96, 128, 192, 256)
LENGTHS = [1, 17, 63, 64, 65, 127, 128, 129, 200, 257]

# Every two of these meet in some case; `dim` aside, which decides what is compiled.
OPTIONS = {
    "dtype": [torch.bfloat16, torch.float16],
    "batch": [1, 2],
    "heads": [(1, 1), (2, 2), (3, 1)],
    "queries": LENGTHS,
    "keys": LENGTHS,
    "causal": [False, True],
    "mask": [None],
    "lengths": [False, True],
    "p": [0.0, 0.1, 0.5],
    "scale": [None, 1.5],
    "offsets": [None, (3, 1, 32, 16)],
    "layout": ["bnhd", "bhnd", "expanded"],
    "grads": ["out"],
}
CASES = pairwise(OPTIONS)
EVENTS = [{"seed": 0}, {"seed": 1, "grid": 1}, {"seed": 2, "grid": 3, "resident": 2}]


class Libraries:
    """The kernels, by their tile, each built when it is first asked for."""

    def __init__(self, folder, cuda=hopper_calls.CUDA):
        self.folder, self.cuda, self.built = folder, cuda, {}

    def __call__(self, dim, tile="ForwardTile"):
        """The tile of a head dimension, or a variant, which may have it as its argument."""
        if tile in ("ForwardTile", "WithoutTurns", "TwoProducers"):
            tile += f"<{next(size for size in TILES if dim <= size)}>"
        if tile not in self.built:
            self.built[tile] = hopper_calls.build_driver(
                "forward_main.cpp", dim, self.folder / f"forward{len(self.built)}.so",
                hopper_calls.build_emulator(self.folder), self.cuda, (f"-DTILE={tile}",),
            )  # fmt: skip
        return self.built[tile]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return Libraries(tmp_path_factory.mktemp("forward"))


def forward(library, tensors, options, *, seed=0, grid=2, resident=1):
    """(O, LSE) as the kernel leaves them. seed: of the emulator's events; grid: of CTAs."""
    query = tensors[0]
    out, lse = hopper_calls.poisoned(query), torch.full(query.shape[:3], torch.nan)
    call, _alive = hopper_calls.attention_call(tensors, options, out, lse)
    error = ctypes.create_string_buffer(2000)
    failed = library.forward(
        ctypes.byref(call), grid, resident, ctypes.c_uint64(seed), error, ctypes.c_size_t(2000)
    )
    assert not failed, error.value.decode()
    return out, lse


def check(library, case, **events):
    """O and LSE of a case against float64; keys and values past the lengths are NaN."""
    tensors, options, _ = cases.make_inputs(case)
    (truth, true_lse), (eager, eager_lse) = (
        cases.plain(*(t.to(dtype) for t in tensors), **options)
        for dtype in (torch.float64, case["dtype"])
    )
    poisoned = cases.poison(tensors, options["key_lengths"])
    out, lse = forward(library, poisoned, options, **events)
    assert_within_bound("out", out, eager, truth)
    assert_within_bound("lse", lse, eager_lse, true_lse)


def check_all(library, chosen, dim):
    for number, case in enumerate(chosen):
        check(library, case | {"dim": dim}, **EVENTS[number % len(EVENTS)])


# --- Numbers --------------------------------------------------------------------------------------


def test_some_cases(libraries):
    check_all(libraries(64), CASES[::12], 64)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 136, 192, 256])
def test_cases(libraries, dim):
    step = 4 if dim == 64 else 17  # of the others each has its own
    check_all(libraries(dim), CASES[dim // 8 % step :: step], dim)


PLAIN = CASES[0] | {
    "batch": 1, "heads": (1, 1), "dim": 64, "causal": False, "lengths": False, "p": 0.0,
    "scale": None, "offsets": None,
}  # fmt: skip


VARIANTS = [
    ("ThreeConsumers", 64), ("WithoutTurns", 64), ("ThreeStages", 64), ("TwoProducers", 64),
    ("PartialPanels", 96), ("PartialPanels", 80), ("WiderBlocks", 128), ("TwoProducers", 128),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "dim"), VARIANTS)
def test_variants(libraries, variant, dim):
    """csrc/cuda/variants: they are right before they are measured."""
    number = VARIANTS.index((variant, dim))
    check_all(libraries(dim, variant), CASES[number::29], dim)
    if variant != "ThreeConsumers":
        long = {"queries": 140, "keys": 400, "p": 0.5, "causal": True, "heads": (2, 1)}
        check(libraries(dim, variant), PLAIN | long | {"dim": dim}, seed=number)


@pytest.mark.slow
def test_variants_are_all_tried():
    text = (hopper_calls.CUDA / "variants/forward_variants.h").read_text()
    assert set(re.findall(r"struct (\w+) :", text)) == {variant for variant, _ in VARIANTS}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [127, 128, 129, 255, 256, 257])
def test_edges_of_a_block(libraries, keys):
    """Lengths of the keys around a block's end, and so places of the diagonal there."""
    for more in ({"causal": True}, {"lengths": True}, {"causal": True, "lengths": True, "p": 0.5}):
        check(libraries(64), PLAIN | {"queries": 130, "keys": keys, "batch": 2} | more)


def test_rows_that_see_nothing(libraries):
    """More queries than keys under a diagonal at the end, and a batch of no keys."""
    case = PLAIN | {"batch": 2, "heads": (2, 1), "queries": 200, "keys": 70, "causal": True}
    tensors, options, _ = cases.make_inputs(case)
    options["key_lengths"] = torch.tensor([70, 0], dtype=torch.int32)
    out, lse = forward(libraries(64), cases.poison(tensors, options["key_lengths"]), options)
    for empty in ((0, slice(None), slice(0, 130)), (1,)):
        assert torch.equal(out[empty], torch.zeros_like(out[empty]))
        assert torch.equal(lse[empty], torch.full_like(lse[empty], -torch.inf))
    assert lse[0, :, 130:].isfinite().all()


def test_lengths_out_of_range(libraries):
    """They are clamped, as a length on a GPU cannot be checked."""
    tensors, options, _ = cases.make_inputs(PLAIN | {"queries": 64, "keys": 100, "batch": 2})
    found = []
    for lengths in ([-5, 1000], [0, 100]):
        options["key_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        found.append(forward(libraries(64), tensors, options))
    for wild, clamped in zip(*found, strict=True):
        assert torch.equal(wild, clamped)


def test_results_do_not_depend_on_the_order_of_events(libraries):
    """Nor on how many CTAs share the tiles."""
    case = PLAIN | {"heads": (2, 1), "queries": 129, "keys": 200, "causal": True, "p": 0.1}
    tensors, options, _ = cases.make_inputs(case)
    first = forward(libraries(64), tensors, options)
    for seed in range(1, 4):
        how = {"grid": seed, "resident": 1 + seed % 2}
        for one, other in zip(
            first, forward(libraries(64), tensors, options, seed=seed, **how), strict=True
        ):
            assert torch.equal(one, other)


# --- Dropout --------------------------------------------------------------------------------------


def check_bits(library, case, seed):
    """With V the identity, O is the dropped weights."""
    tensors, options, _ = cases.make_inputs(case)
    keys = case["keys"]
    value = torch.eye(keys, case["dim"], dtype=case["dtype"]).expand_as(tensors[2]).clone()
    options |= {"seed": seed, "scale": 0.01}
    weights, _ = forward(library, (*tensors[:2], value), options)
    shape = (case["batch"], case["heads"][0], case["queries"], keys)
    keep = rng.attention_keep(torch.tensor(seed), case["p"], shape, case["offsets"] or (0,) * 4)
    assert torch.equal(weights[..., :keys] != 0, keep)


@pytest.mark.parametrize("offsets", [None, (1, 2, 48, 16)])
def test_masks_are_the_contracts(libraries, offsets):
    case = PLAIN | {"batch": 2, "heads": (2, 1), "queries": 150, "keys": 64}
    check_bits(libraries(64), case | {"p": 0.3, "offsets": offsets}, 2**62 + 12345)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [128, 256])
def test_masks_are_the_contracts_over_blocks(libraries, dim, dtype):
    """A query's offset beyond 32 bits, and all that the keys of a row fit in."""
    case = PLAIN | {"heads": (2, 2), "queries": 150, "dtype": dtype, "dim": dim, "keys": dim}
    check_bits(libraries(dim), case | {"p": 0.3, "offsets": (3, 1, 2**33, 2**33 + 16)}, -5)


@pytest.mark.parametrize("p", [2**-32, 1 - 2**-32])
def test_thresholds_at_the_ends(libraries, p):
    """All are kept, or none is; LSE is of what was not dropped."""
    tensors, options, _ = cases.make_inputs(PLAIN | {"queries": 64, "keys": 128, "p": p})
    out, lse = forward(libraries(64), tensors, options)
    whole, true_lse = forward(libraries(64), tensors, options | {"dropout_p": 0.0})
    assert torch.equal(lse, true_lse)
    assert torch.equal(out, whole if p < 0.5 else torch.zeros_like(out))


# --- Mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "diagonal": ("const int end = i + 1 + diagonal;", "const int end = i + 2 + diagonal;"),
    "last block": ("+ columns - 1) / columns;", ") / columns;"),
    "mask's edge": ("if (8 * c + e >= visible[r]", "if (8 * c + e > visible[r]"),
    "scale": ("const float scale_log2 = p.scale * kLog2e;", "const float scale_log2 = p.scale;"),
    "keep": (": p.inverse_keep / sum[r];", ": 1 / sum[r];"),
    "rescale": ("out[i] *= rescale[i / 2 % 2];", "out[i] *= rescale[0];"),
    "empty rows": ("maximum[r] == -INFINITY ? 0.f", "false ? 0.f"),
    "group": ("work.head / (p.heads / p.key_heads)", "work.head % p.key_heads"),
    "NaN past the length": ("clear_values(work.length % kKeys, value.at, s);", ""),
    "its fence": ("  fence_async();\n  barrier_sync(kAllConsumers", "  barrier_sync(kAllConsumers"),
    "its barrier": ("  barrier_sync(kAllConsumers, Tile::kConsumers * kWarpgroup);", ""),
    "wait for V": (
        "        mbarrier_wait(&s.value_full[value.at], value.parity);\n        start_out",
        "start_out",
    ),
    "wait for S": ("wgmma_wait<1>(scores);", ""),
    "wait for an empty Q": ("mbarrier_wait(&s.query_empty, query.parity ^ 1);", ""),
    "late lanes": ("  sync_warp();\n  if (lane() == 0) mbarrier_arrive(empty);",
                   "  if (lane() == 0) mbarrier_arrive(empty);"),
    "turns": ("barrier_arrive(kTurn + (consumer + 1)", "barrier_arrive(kTurn + (consumer + 0)"),
    "fence of O": ("  fence_async();\n  barrier_sync(kOneConsumer", "  barrier_sync(kOneConsumer"),
    "O before it has left": ("if (leader) tma_wait_read<0>();", ""),
    "bits of the wrong block": ("p.offsets[3] + block * Tile::kKeys", "p.offsets[3] + block"),
    "bits of the wrong rows": ("words[kRow] += 4 * row_block;", "words[kRow] += 2 * row_block;"),
    "bits that nobody makes": ("+ 32 * turn) % kThreads", "+ 32 * turn)"),
}  # fmt: skip


HARD = [
    {"keys": 300},
    {"keys": 300, "heads": (4, 2), "causal": True, "p": 0.5, "lengths": True},
    {"queries": 40, "keys": 17, "causal": True},
]


def check_hard(library):
    """What finds most mistakes in few seeds."""
    for seed in range(12):
        how = {"seed": seed, "grid": 1 + seed % 2, "resident": 1 + seed // 2 % 2}
        for case in HARD:
            check(library, PLAIN | {"batch": 2, "queries": 129} | case, **how)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(tmp_path, mistake):
    """Each is put into the sources, and some test of this file's kind sees it."""
    shutil.copytree(hopper_calls.CUDA.parent, tmp_path / "csrc")
    cuda = tmp_path / "csrc" / "cuda"
    right, wrong = MISTAKES[mistake]
    found = 0
    files = ("schedule.h", "dropout_bits.h")
    for path in (*cuda.glob("attention_forward*.h"), *(cuda / name for name in files)):
        text = path.read_text()
        found += text.count(right)
        path.write_text(text.replace(right, wrong))
    assert found, "the sources no longer have this"
    library = Libraries(tmp_path, cuda)(64)
    with pytest.raises(AssertionError):
        check_hard(library)
