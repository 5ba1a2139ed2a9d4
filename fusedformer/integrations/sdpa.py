"""A switch that sends torch's scaled_dot_product_attention, whoever calls it, to our kernels.

It replaces the name in torch.nn.functional. A TorchFunctionMode would also see calls through
copies of the name that were imported before, but taxes every other function of torch as well, and
is local to a thread: the recomputation of a checkpointed layer would miss it.
"""

from collections import Counter

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusedformer.kernels import dispatch
from fusedformer.kernels.sdpa import scaled_dot_product_attention

_torch_sdpa = torch.nn.functional.scaled_dot_product_attention
_TENSORS = (Tensor, torch.nn.Parameter, FakeTensor)

_active: "list[sdpa]" = []  # the last one counts
_on = False  # a flag of its own, so that compiled code does not depend on what else is active
_reasons: "dict[tuple[torch.device, torch.dtype], str | None]" = {}


class sdpa:  # noqa: N801 - a context manager, named as torch names its own
    """While active, ``torch.nn.functional.scaled_dot_product_attention`` runs on our kernels.

    ``with fusedformer.sdpa() as switch:`` for a block; ``switch.install()`` and
    ``switch.uninstall()`` for as long as one likes. Calls that our kernels do not support go to
    torch. Blocks may be nested, with one object or several; the innermost counts. It holds
    in the whole process: the backward of a checkpointed layer may run in another thread.

    Code that is compiled within the block keeps our kernels within it, and torch's outside; neither
    is compiled anew when the block is entered again.

    Not caught: calls through a name bound before the switch was first active (``from
    torch.nn.functional import scaled_dot_product_attention``), and those that torch's own C++ makes
    (the inference fast path of torch.nn.TransformerEncoderLayer).

    Attributes:
        fused: how many calls ran on our kernels.
        left: how many went to torch, a Counter by reason.
        compiled: the calls that torch.compile traced, a Counter by "fused" or the reason; when
            compiled code runs, nothing is counted.
    """

    def __init__(self) -> None:
        self.fused = 0
        self.left: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()

    def install(self) -> "sdpa":
        """Switches over until uninstall() is called as often as install() was."""
        global _on
        _active.append(self)
        _on = True
        torch.nn.functional.scaled_dot_product_attention = _switched
        return self

    def uninstall(self) -> None:
        """Undoes the last install() of this object.

        Raises:
            RuntimeError: it is not installed.
        """
        global _on
        if self not in _active:
            raise RuntimeError("sdpa.uninstall: this switch is not installed")
        del _active[len(_active) - 1 - _active[::-1].index(self)]
        if not _active:
            _on = False
            # Unless someone has wrapped it since; then our function, still inside, does nothing.
            if torch.nn.functional.scaled_dot_product_attention is _switched:
                torch.nn.functional.scaled_dot_product_attention = _torch_sdpa

    def __enter__(self) -> "sdpa":
        return self.install()

    def __exit__(self, *error: object) -> None:
        self.uninstall()

    def __str__(self) -> str:
        left = self.left.total()
        lines = [f"scaled_dot_product_attention: {self.fused} calls fused, {left} left to torch"]
        lines += [f"  {count} left: {reason}" for reason, count in self.left.most_common()]
        for what, count in self.compiled.most_common():
            what = "fused" if what == "fused" else f"left: {what}"
            lines.append(f"  {count} in compiled code {what}")
        return "\n".join(lines)


def _switched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: "Tensor | None" = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: "float | None" = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not _on:
        return _torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    reason = _reason_to_leave(query, key, value)
    if reason is None:
        try:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        except (TypeError, ValueError) as error:
            # Arguments that only torch takes; where it does not take them either, the error is its.
            reason = str(error)
        else:
            _count("fused")
            return out
    _count(reason)
    return _torch_sdpa(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _count(what: str) -> None:
    if torch.compiler.is_compiling():
        _count_compiled(what)
    elif what == "fused":
        _active[-1].fused += 1
    else:
        _active[-1].left[what] += 1


@torch.compiler.assume_constant_result
def _count_compiled(what: str) -> None:
    _active[-1].compiled[what] += 1


def _reason_to_leave(query: Tensor, key: Tensor, value: Tensor) -> "str | None":
    """Why a call goes to torch, or None; what the checks of its arguments find comes later."""
    for tensor in (query, key, value):
        if type(tensor) not in _TENSORS:
            return f"{type(tensor).__name__} is not a plain tensor"
    if torch.compiler.is_compiling():
        return _why_not_fused(query.device, query.dtype)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a transform of torch.func"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if dispatch._default:
        return None
    kind = query.device, query.dtype
    if kind not in _reasons:
        _reasons[kind] = _why_not_fused(*kind)
    return _reasons[kind]


@torch.compiler.assume_constant_result
def _why_not_fused(device: torch.device, dtype: torch.dtype) -> "str | None":
    return dispatch.why_not_fused("attention", device, dtype)
