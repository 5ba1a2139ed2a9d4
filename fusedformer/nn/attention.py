"""Multi-head attention (Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2)."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusedformer.kernels import reference, rng
from fusedformer.kernels.attention import attention
from fusedformer.kernels.checks import shape
from fusedformer.nn.linear import linear, linear_layer


@functools.cache
def _warn_of_weights() -> None:
    warnings.warn(
        "MultiheadAttention: need_weights=True, torch's default, computes the (Nq, Nk) attention "
        "weights once more beside the fused kernel, in quadratic time and memory; pass "
        "need_weights=False where they are not used",
        stacklevel=5,  # past Module.__call__
    )


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on the fused kernel: same arguments, same state_dict.

    Differences from torch's:

    - Memory is linear in the lengths, dropout included, unless need_weights asks for the weights.
    - A query that may attend to nothing gives the output projection's bias, and weights of zero,
      where torch gives NaN. An additive mask value <= -1e30 counts as not attending.
    - ``is_causal=True`` needs no attn_mask beside it. Where there is one for as many queries as
      keys, it is taken to be the causal mask, as torch's documentation says, and is not read.
    - Masks of both types may be mixed. No nested tensors.
    - The output is contiguous.

    Args:
        embed_dim: E, the width of query and output, a multiple of num_heads.
        num_heads: H; E / H at most 256.
        dropout: probability that an attention probability is dropped in training, met to 2^-32.
        bias: learn biases of the four projections.
        add_bias_kv: append a learned key and value to all keys and values.
        add_zero_attn: append a zero key and value.
        kdim, vdim: widths of key and value; E by default.
        batch_first: batched inputs are (B, N, E), else (N, B, E).
    """

    def forward(
        self,
        query: Tensor,
        key: "Tensor | None",
        value: "Tensor | None",
        key_padding_mask: "Tensor | None" = None,
        need_weights: bool = True,
        attn_mask: "Tensor | None" = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_lengths: "Tensor | None" = None,
        rotary: "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None" = None,
        cache: Any = None,
    ) -> "tuple[Tensor, Tensor | None]":
        """The output projection of the heads' attention, and the attention weights.

        Args:
            query: (B, Nq, E) with batch_first, else (Nq, B, E); without a batch (Nq, E).
            key: (B, Nk, kdim), value: (B, Nk, vdim), in query's layout. Where they are the very
                same tensor as query, or as each other, they are projected together. Not read
                where a cache is complete.
            key_padding_mask: (B, Nk), without a batch (Nk,): bool (True = hidden) or additive.
                Where padding is on the right, key_lengths is cheaper.
            need_weights: also return the weights, which are computed once more for this.
            attn_mask: (Nq, Nk) or (B * H, Nq, Nk): bool (True = hidden) or additive, with a
                gradient if it requires one.
            average_attn_weights: return the mean of the weights over heads.
            is_causal: query i attends to keys j <= i.
            key_lengths: (B,) int32 or int64: keys at and past a length are hidden.
            rotary: called on the heads of query and key, (B, H, N, D) each; returns both.
            cache: keeps keys and values between calls. ``cache.append(key, value)`` returns
                (key, value, key_lengths, causal): what to attend to, causal with the last query at
                the last key. Where ``cache.complete``, its key and value are used as they are. No
                masks beside it, and no need_weights.

        Returns:
            The output in query's layout, and None or the weights: (B, Nq, Nk), or (B, H, Nq, Nk)
            if they are not averaged, B left out where there is no batch; Nk counts appended keys.
            In training they are those after dropout, as torch's: the ones that made the output.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        if cache is None:
            self._check_inputs(query, key, value)
        elif need_weights or key_padding_mask is not None or attn_mask is not None:
            raise ValueError(
                "MultiheadAttention: with a cache, need_weights must be False, and "
                "key_padding_mask and attn_mask None"
            )
        held = cache is not None and cache.complete
        q, k, v = self._project(query, None if held else key, value)
        if rotary is not None:
            q, k = rotary(q, k)
        if held:
            k, v = cache.key, cache.value
        elif cache is not None:
            k, v, lengths, is_causal = cache.append(k, v)
            key_lengths = key_lengths if lengths is None else lengths
        batched = query.dim() == 3
        mask, key_lengths, is_causal = self._mask(
            q, k, key_padding_mask, attn_mask, key_lengths, is_causal, batched
        )
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._with_extra_keys(k, self.bias_k), self._with_extra_keys(v, self.bias_v)
        p = self.dropout if self.training else 0.0
        seed = rng.draw_seed(q.device) if p > 0 else None
        # Given offsets, positions count from the first query and key: torch's causal rule.
        first = (0, 0, 0, 0)
        out = attention(
            q, k, v, mask=mask, key_lengths=key_lengths, causal=is_causal, dropout_p=p, seed=seed,
            offsets=first if cache is None else None,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        output = linear_layer(self.out_proj, self._merge_heads(out, batched))
        if not need_weights:
            return output, None
        if not torch.compiler.is_compiling():
            _warn_of_weights()
        weights = reference.attention_weights(
            q, k, mask, key_lengths, seed, 0 if is_causal else None, self.head_dim**-0.5, p, first
        ).to(q.dtype)
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _check_inputs(self, query: Tensor, key: "Tensor | None", value: "Tensor | None") -> None:
        name = "MultiheadAttention"
        if query.is_nested or query.dim() not in (2, 3):
            raise ValueError(
                f"{name}: query must be (B, N, E), (N, B, E) or (N, E), and not nested; "
                f"got {'a nested tensor' if query.is_nested else shape(query)}"
            )
        if key is None or value is None:
            raise ValueError(f"{name}: key and value must not be None without a cache")
        batch_dim = 0 if self.batch_first else 1
        for label, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name}: {label} must have {query.dim()} dimensions, as query, and the width "
                    f"{width}; got {shape(x)}"
                )
            if x.dim() == 3 and x.shape[batch_dim] != query.shape[batch_dim]:
                raise ValueError(
                    f"{name}: {label} must have the batch size {query.shape[batch_dim]} of query "
                    f"in dimension {batch_dim} (batch_first is {self.batch_first}); got {shape(x)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{name}: value must have the length of key, {shape(key)}; got {shape(value)}"
            )

    # --- Heads: projections on one side, (B, H, N, D) views of them on the other ------------------

    def _project(
        self, query: Tensor, key: "Tensor | None", value: "Tensor | None"
    ) -> "list[Any]":
        """Heads of query, key and value, by as few matrix products as their identities allow.

        Those of key and value are None where key is.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return [self._split_heads(x) for x in linear(query, weight, bias).chunk(3, -1)]
        if weight is None:  # kdim or vdim differs from embed_dim
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = list(weight.chunk(3))
        biases = [None] * 3 if bias is None else list(bias.chunk(3))
        projected: list[Tensor | None]
        if weight is not None and key is not None and key is value:
            width = self.embed_dim
            rest = None if bias is None else bias[width:]
            keys_and_values = linear(key, weight[width:], rest).chunk(2, -1)
            projected = [linear(query, weights[0], biases[0]), *keys_and_values]
        else:
            inputs = (query, key, None if key is None else value)
            projected = [
                None if x is None else linear(x, w, b)
                for x, w, b in zip(inputs, weights, biases, strict=True)
            ]
        return [None if x is None else self._split_heads(x) for x in projected]

    def _split_heads(self, x: Tensor) -> Tensor:
        """Rows (B, N, E), (N, B, E) or (N, E) as (B, H, N, D), a view."""
        x = x.view(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, x: Tensor, batched: bool) -> Tensor:
        """The inverse: a copy only where the batch is not first."""
        if not batched:
            return x[0].transpose(0, 1).flatten(1)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(2)

    # --- Keys that are appended, and masks --------------------------------------------------------

    def _with_extra_keys(self, x: Tensor, bias: "Tensor | None") -> Tensor:
        """Keys (or values) with the learned one and the zero one appended that were asked for."""
        parts = [x]
        if bias is not None:
            rows = bias.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
            parts.append(rows.expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(*x.shape[:2], 1, self.head_dim))
        return torch.cat(parts, 2)

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: "Tensor | None",
        attn_mask: "Tensor | None",
        key_lengths: "Tensor | None",
        is_causal: bool,
        batched: bool,
    ) -> "tuple[Tensor | None, Tensor | None, bool]":
        """What attention() takes: one mask (True = attends, or additive), lengths, causal or not.

        No larger than what was given: (B, 1, 1, Nk) for padding alone, (B, 1, Nq, Nk) for padding
        and a mask that all heads share.
        """
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        masks = []
        if key_padding_mask is not None:
            wanted = (batch, keys) if batched else (keys,)
            _check_mask("key_padding_mask", key_padding_mask, wanted)
            masks.append(key_padding_mask.reshape(-1, 1, 1, keys))
        if attn_mask is not None:
            by_head = (batch * self.num_heads, queries, keys)
            _check_mask("attn_mask", attn_mask, (queries, keys), by_head)
            if not is_causal or queries != keys:  # else it says what is_causal says
                is_causal = False
                if attn_mask.dim() == 3:
                    attn_mask = attn_mask.view(batch, self.num_heads, queries, keys)
                masks.append(attn_mask)
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra:
            # Every query sees them, which neither lengths nor a diagonal can say.
            place = torch.arange(keys, device=q.device)
            if key_lengths is not None:
                masks.append(place >= key_lengths.view(-1, 1, 1, 1))
            if is_causal:
                masks.append(place > torch.arange(queries, device=q.device)[:, None])
            key_lengths, is_causal = None, False
        if not masks:
            return None, key_lengths, is_causal
        hidden = functools.reduce(_merged, masks)
        if extra:
            hidden = functional.pad(hidden, (0, extra))
        return ~hidden if hidden.dtype == torch.bool else hidden, key_lengths, is_causal


def _check_mask(label: str, mask: Tensor, *wanted: "tuple[int, ...]") -> None:
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(
            f"MultiheadAttention: {label} must be bool or floating point; got {mask.dtype}"
        )
    if tuple(mask.shape) not in wanted:
        raise ValueError(
            f"MultiheadAttention: {label} must be {' or '.join(map(str, wanted))}; "
            f"got {shape(mask)}"
        )


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill_(mask, -torch.inf)


def _merged(one: Tensor, other: Tensor) -> Tensor:
    """Two masks, each bool (True = hidden) or additive, as one."""
    if one.dtype == other.dtype == torch.bool:
        return one | other
    return _additive(one) + _additive(other)
