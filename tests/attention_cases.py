"""What the attention tests share: the covering set of cases, their inputs, the plain formula."""

import torch
from pairwise import pairwise
from torch import Tensor

from fusedformer.kernels import rng
from fusedformer.kernels.cuda import attention as on_cuda

LENGTHS = [1, 17, 63, 64, 65, 127, 200, 257]

OPTIONS = {
    "dtype": [torch.float32, torch.float16],
    "batch": [1, 2],
    "heads": [(1, 1), (2, 2), (4, 2), (3, 1)],  # of query, of key and value
    "queries": LENGTHS,
    "keys": LENGTHS,
    "dim": [1, 13, 16, 40, 64, 100, 128, 256],
    "causal": [False, True],
    "mask": [None, "bool", "bool keys", "float", "float heads", "float keys", "float queries"],
    "lengths": [False, True],
    "p": [0.0, 0.1, 0.5],
    "scale": [None, 1.5, -0.5],  # in units of 1 / sqrt(D); None is 1
    "offsets": [None, (3, 1, 32, 16)],
    "layout": ["bhnd", "bnhd", "every other", "expanded"],
    "grads": ["out", "lse", "both", "expanded"],
}

CASES = pairwise(OPTIONS, at_least=120)


def taken_by_cuda(case: dict) -> dict:
    """The nearest case that the CUDA kernels take; its dtype is the caller's to choose."""
    dim = min(on_cuda.MAX_DIM, (case["dim"] + 7) // 8 * 8)
    # TMA has neither a stride between the columns nor one of 0.
    layout = case["layout"] if case["layout"] in ("bhnd", "bnhd") else "bnhd"
    scale = None if case["scale"] is None else abs(case["scale"])
    return {**case, "dim": dim, "layout": layout, "scale": scale, "mask": None}


def _tensor(layout: str, batch: int, heads: int, length: int, dim: int, **kind) -> Tensor:
    if layout == "bnhd":
        return torch.randn(batch, length, heads, dim, **kind).transpose(1, 2)
    if layout == "every other":
        return torch.randn(batch, heads, 2 * length, 2 * dim, **kind)[:, :, ::2, ::2]
    if layout == "expanded":
        return torch.randn(1, heads, length, dim, **kind).expand(batch, -1, -1, -1)
    return torch.randn(batch, heads, length, dim, **kind)


def make_inputs(case: dict, device: str = "cpu") -> tuple[tuple, dict, tuple]:
    """(query, key, value), the keyword arguments, and the upstream gradients of (O, LSE)."""
    torch.manual_seed(0)
    batch, (heads, key_heads) = case["batch"], case["heads"]
    n, m, dim = case["queries"], case["keys"], case["dim"]
    kind = {"dtype": case["dtype"], "device": device}
    query = _tensor(case["layout"], batch, heads, n, dim, **kind)
    key = _tensor(case["layout"], batch, key_heads, m, dim, **kind)
    value = _tensor(case["layout"], batch, key_heads, m, dim, **kind)
    mask = {
        "bool": lambda: torch.rand(batch, heads, n, m, device=device) > 0.3,
        "bool keys": lambda: torch.rand(batch, 1, 1, m, device=device) > 0.3,
        "float": lambda: torch.randn(batch, heads, n, m, **kind),
        "float heads": lambda: torch.randn(heads, n, m, device=device),  # three dimensions, fp32
        "float keys": lambda: torch.randn(m, **kind),
        "float queries": lambda: torch.randn(batch, 1, n, 1, **kind),
        None: lambda: None,
    }[case["mask"]]()
    if case["mask"] in ("float", "float heads"):
        mask[torch.rand(mask.shape, device=device) > 0.9] = -torch.inf
    lengths = None
    if case["lengths"]:
        lengths = torch.randint(0, m + 1, (batch,), dtype=torch.int32, device=device)
    options = {
        "mask": mask,
        "key_lengths": lengths,
        "causal": case["causal"],
        "scale": case["scale"] and case["scale"] * dim**-0.5,
        "dropout_p": case["p"],
        "seed": 1234 if case["p"] else None,
        "offsets": case["offsets"],
    }
    grad_out = torch.randn(query.shape, **kind)
    if case["grads"] == "expanded":
        grad_out = torch.randn((), **kind).expand(query.shape)
    grad_lse = torch.randn(query.shape[:3], device=device)
    grads = (
        grad_out if case["grads"] != "lse" else None,
        grad_lse if case["grads"] in ("lse", "both") else None,
    )
    return (query, key, value), options, grads


def poison(tensors: tuple, lengths: "Tensor | None") -> tuple:
    """Copies of (query, key, value) whose keys and values past the lengths are NaN."""
    query, key, value = tensors
    if lengths is None:
        return tensors
    past = torch.arange(key.shape[2], device=key.device) >= lengths[:, None]
    past = past[:, None, :, None]
    return query, key.masked_fill(past, torch.nan), value.masked_fill(past, torch.nan)


def _plain_scores(
    query, key, mask, key_lengths, causal, scale, offsets, matmul=torch.matmul
):  # fmt: skip
    """(S with -inf where hidden, but finite in rows with nothing to attend to; such rows)."""
    n, m = query.shape[2], key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = matmul(query, key.mT) * scale
    i = torch.arange(n, device=query.device)[:, None]
    j = torch.arange(m, device=query.device)
    hidden = torch.zeros(1, 1, n, m, dtype=torch.bool, device=query.device)
    if causal:
        diagonal = m - n if offsets is None else offsets[2] - offsets[3]
        hidden = hidden | (j > i + diagonal)
    if key_lengths is not None:
        hidden = hidden | (j >= key_lengths[:, None, None, None])
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden = hidden | (mask == -torch.inf)
        scores = scores + mask.masked_fill(mask == -torch.inf, 0).to(scores.dtype)
    hidden = hidden.expand(scores.shape)
    empty = hidden.all(-1)
    return scores.masked_fill(hidden & ~empty[..., None], -torch.inf), empty


def _plain_keep(scores, dropout_p, seed, offsets):
    """What multiplies the weights: 0 where dropped, 1 / (1 - p) where kept."""
    if not dropout_p:
        return 1.0
    seed = torch.tensor(seed, device=scores.device)
    keep = rng.attention_keep(seed, dropout_p, tuple(scores.shape), offsets or (0, 0, 0, 0))
    return keep / (1 - dropout_p)


def plain(query, key, value, mask, key_lengths, causal, scale, dropout_p, seed, offsets):
    """softmax(scale Q K^T + mask) V as one writes it in PyTorch, in query's dtype; (O, LSE)."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores, empty = _plain_scores(query, key, mask, key_lengths, causal, scale, offsets)
    weights = scores.softmax(-1) * ~empty[..., None]
    lse = scores.logsumexp(-1).masked_fill(empty, -torch.inf)
    weights = weights * _plain_keep(scores, dropout_p, seed, offsets)
    return weights.to(query.dtype) @ value, lse


def _left_to_right(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, each sum taken in order."""
    total = a[..., :, 0, None] * b[..., 0, None, :]
    for k in range(1, a.shape[-1]):
        total = total + a[..., :, k, None] * b[..., k, None, :]
    return total


def run_saved_lse(tensors: tuple, options: dict, grads: tuple, order: Tensor) -> dict:
    """The plain gradients as every linear-memory implementation forms them
    (FlashAttention-2, algorithm 2): P = exp(S - LSE) with the saved LSE, rowsum(dO o O) with the
    saved O, and S computed again, in tiles that lie otherwise and so with sums in another order.
    The rounding of these is what limits such gradients in float32; in 16 bits it is that of O
    alone, the rest being computed in float32 here.

    Args:
        order: a permutation of the head dimension, the order in which S is summed again.
    """
    query, key, value = (t.detach().float() for t in tensors)
    own_key = key
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    names = ("mask", "key_lengths", "causal", "scale", "offsets")
    masking = [options[name] for name in names]
    scores, empty = _plain_scores(query, key, *masking)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1) * ~empty[..., None]
    kept = _plain_keep(scores, *(options[name] for name in ("dropout_p", "seed", "offsets")))
    grad_out = torch.zeros_like(query) if grads[0] is None else grads[0].float()
    out = ((weights * kept) @ value).to(tensors[0].dtype).float()
    scores, _ = _plain_scores(query[..., order], key[..., order], *masking, _left_to_right)
    weights = torch.exp(scores - lse[..., None]) * ~empty[..., None]
    shift = (grad_out * out).sum(-1)
    if grads[1] is not None:
        shift = shift - grads[1]
    grad_scores = weights * (kept * _left_to_right(grad_out, value.mT) - shift[..., None])
    scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    grouped = (*own_key.shape[:2], group, *own_key.shape[2:])
    found = {
        "grad_query": scale * _left_to_right(grad_scores, key),
        "grad_key": (scale * _left_to_right(grad_scores.mT, query)).view(grouped).sum(2),
        "grad_value": _left_to_right((weights * kept).mT, grad_out).view(grouped).sum(2),
    }
    mask = options["mask"]
    if mask is not None and mask.is_floating_point():
        found["grad_mask"] = grad_scores.sum_to_size(mask.shape)
    return found


def run_plain(tensors: tuple, options: dict, grads: tuple, dtype: torch.dtype) -> dict:
    """The plain formula and, by autograd, its gradients, all computed in dtype; named."""
    leaves, options = _leaves(tensors, options, dtype)
    out, lse = plain(*leaves[:3], **options)
    pairs = [(o, g.to(o.dtype)) for o, g in zip((out, lse), grads, strict=True) if g is not None]
    outputs, upstream = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    names = ("out", "lse", "grad_query", "grad_key", "grad_value", "grad_mask")
    return dict(zip(names, (out, lse, *found), strict=False))


def _leaves(tensors: tuple, options: dict, dtype: torch.dtype) -> tuple[list, dict]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    mask = options["mask"]
    if mask is not None and mask.is_floating_point():
        # In its own dtype for the eager formula: that is what a user would hand over.
        own = dtype if dtype == torch.float64 else mask.dtype
        options = {**options, "mask": mask.detach().to(own).requires_grad_()}
        leaves.append(options["mask"])
    return leaves, options


def gradient_terms(tensors: tuple, options: dict, grads: tuple) -> dict:
    """For bounds.assert_within_bound: the terms of each gradient, added up without their signs."""
    query, key, value = (t.double().abs() for t in tensors)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    grad_out, grad_lse = grads
    grad_scores = torch.zeros(*query.shape[:3], key.shape[2], device=query.device).double()
    if grad_out is not None:
        grad_scores += grad_out.double().abs() @ value.mT / (1 - options["dropout_p"])
    if grad_lse is not None:
        grad_scores += grad_lse.double().abs()[..., None]
    scale = options["scale"]
    scale = query.shape[3] ** -0.5 if scale is None else abs(scale)
    terms = {
        "grad_query": scale * grad_scores @ key,
        "grad_key": scale * grad_scores.mT @ query,
        "grad_value": torch.zeros(1),
    }
    if options["mask"] is not None:
        terms["grad_mask"] = grad_scores.sum_to_size(options["mask"].shape)
    return {name: float(value.max()) for name, value in terms.items()}
