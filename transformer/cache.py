"""Keys and values kept from one decoding step to the next.

Nothing here reads a number back from the device: where all rows hold equally many tokens, one int
says how many; where they do not, lengths does, a tensor.
"""

import torch
from torch import Tensor

from fusedformer.kernels.checks import shape


class KVCache:
    """What the layers of a model remember of the tokens that they have seen.

    Rows fill up from the left. A batch of prompts of unequal lengths is right-padded and goes
    first, on the empty cache; then each step brings one token, put where its row ends.

    Attributes:
        layers: a LayerCache for each layer.
        lengths: (B,) int32, how many tokens each row holds.
        longest: no row holds more.
        ragged: whether rows may hold unequal numbers.
        capacity: how many tokens fit into a row.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.layers = [LayerCache(self) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest = 0
        self.ragged = False
        self.capacity = capacity

    def positions(self, count: int, lengths: "Tensor | None" = None) -> Tensor:
        """Those of the next count tokens: (count,), or where rows are unequal (B, count).

        Raises:
            ValueError: lengths are given, so rows end in padding, after others that did not.
        """
        if lengths is not None and self.longest and not self.ragged:
            raise ValueError(
                "KVCache: rows of unequal lengths must come first, on an empty cache; "
                f"it holds {self.longest} tokens a row"
            )
        steps = torch.arange(count, device=self.lengths.device)
        return self.lengths[:, None] + steps if self.ragged else self.longest + steps

    def advance(self, count: int, lengths: "Tensor | None" = None) -> None:
        """Counts what every layer has appended: count tokens, of which each row keeps lengths."""
        self.lengths = self.lengths + (count if lengths is None else lengths.to(torch.int32))
        self.longest += count
        self.ragged |= lengths is not None

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; index may be longer or shorter than the batch."""
        self.lengths = self.lengths[index]
        for layer in self.layers:
            for kept in (layer, layer.cross):
                if kept.key is not None and kept.value is not None:
                    kept.key, kept.value = kept.key[index], kept.value[index]


class CrossCache:
    """The keys and values of one cross-attention, projected once from the encoder's output."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.key is not None

    def append(self, key: Tensor, value: Tensor) -> "tuple[Tensor, Tensor, Tensor | None, bool]":
        """As LayerCache.append, but there is only one."""
        self.key, self.value = key, value
        return key, value, None, False


class LayerCache:
    """The keys and values of one self-attention, (B, H, capacity, D); made by the first append.

    cross: those of the cross-attention beside it, if any.
    """

    complete = False  # there is always more to append

    def __init__(self, whole: KVCache) -> None:
        self.whole = whole
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.cross = CrossCache()

    def append(self, key: Tensor, value: Tensor) -> "tuple[Tensor, Tensor, Tensor | None, bool]":
        """Adds (B, H, N, D) keys and values and returns all there are, with how to attend to them.

        Returns:
            key, value: (B, H, Nk, D).
            key_lengths: (B,) of them, or None where rows are equal.
            causal: whether the last N of them are to be masked causally.

        Raises:
            ValueError: they do not fit, are of another batch, or N > 1 where rows are unequal.
        """
        batch, heads, count, dim = key.shape
        if batch != self.whole.lengths.shape[0]:
            raise ValueError(
                f"KVCache: key must have the batch size {self.whole.lengths.shape[0]} of the "
                f"cache; got {shape(key)}"
            )
        start, end = self.whole.longest, self.whole.longest + count
        if end > self.whole.capacity:
            raise ValueError(
                f"KVCache: {start} + {count} tokens must fit into a capacity of "
                f"{self.whole.capacity}"
            )
        if self.whole.ragged and count != 1:
            raise ValueError(
                f"KVCache: rows of unequal lengths take one token at a time; got {count}"
            )
        if self.key is None or self.value is None:
            self.key = key.new_empty(batch, heads, self.whole.capacity, dim)
            self.value = torch.empty_like(self.key)
        if self.whole.ragged:
            rows, lengths = torch.arange(batch, device=key.device), self.whole.lengths.long()
            self.key[rows, :, lengths] = key[:, :, 0]
            self.value[rows, :, lengths] = value[:, :, 0]
            return self.key[:, :, :end], self.value[:, :, :end], self.whole.lengths + 1, False
        self.key[:, :, start:end] = key
        self.value[:, :, start:end] = value
        return self.key[:, :, :end], self.value[:, :, :end], None, count > 1
