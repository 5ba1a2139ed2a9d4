"""Sequence lengths as they occur in a text: a histogram of its paragraphs' lengths.

A paragraph is a block of lines between blank lines. Its length counts tokens of a Hugging Face
tokenizer file where one is given, UTF-8 bytes otherwise.
"""

import importlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Bins that double; where a text spans few of them, bins that grow by the square root of two.
_ENOUGH_BINS = 6


@dataclass(frozen=True)
class Bin:
    """Paragraphs of low <= length < high: how many, and the length that stands for them.

    ``length`` is their root mean square, which keeps the sum of squares, so that a cost in N^2
    over the bin is that of ``count`` paragraphs of this length.
    """

    low: int
    high: int
    length: int
    count: int


@dataclass(frozen=True)
class TextLengths:
    """A text's paragraphs: in which unit they are counted, how many, and their histogram."""

    file: str
    unit: str
    paragraphs: int
    tokens: int
    bins: tuple[Bin, ...]

    def as_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self) | {"bins": [asdict(part) for part in self.bins]}


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """Bins of positive lengths, shortest first, empty ones left out."""
    low, high = min(lengths), max(lengths)
    ratio = 2.0 if math.log2(high / low) >= _ENOUGH_BINS - 1 else math.sqrt(2)
    edges = [2 ** math.floor(math.log2(low))]
    while edges[-1] <= high:
        edges.append(max(edges[-1] + 1, round(edges[0] * ratio ** len(edges))))
    bins = []
    for start, end in itertools.pairwise(edges):
        inside = [n for n in lengths if start <= n < end]
        if inside:
            mean_square = sum(n * n for n in inside) / len(inside)
            bins.append(Bin(start, end, round(math.sqrt(mean_square)), len(inside)))
    return tuple(bins)


def read(file: str, tokenizer: "str | None" = None) -> TextLengths:
    """The paragraph lengths of a UTF-8 text file.

    Args:
        file: the text.
        tokenizer: a tokenizer.json of Hugging Face's ``tokenizers``; None counts UTF-8 bytes.

    Raises:
        ValueError: a file is missing or unreadable, the text is empty, or ``tokenizers`` is absent.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {file} cannot be read as UTF-8 text: {_cause(error)}") from None
    paragraphs = [part for block in re.split(r"\n\s*\n", text) if (part := block.strip())]
    if not paragraphs:
        raise ValueError(f"--text {file} is empty; it wants a text with at least one paragraph")
    if tokenizer is None:
        unit = "UTF-8 bytes"
        lengths = [len(paragraph.encode()) for paragraph in paragraphs]
    else:
        unit = f"tokens of {Path(tokenizer).name}"
        lengths = [n for n in _token_counts(tokenizer, paragraphs) if n]
        if not lengths:
            raise ValueError(f"--tokenizer {tokenizer} finds no token in {file}")
    return TextLengths(file, unit, len(lengths), sum(lengths), histogram(lengths))


def _token_counts(tokenizer: str, paragraphs: list[str]) -> list[int]:
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError(
            "--tokenizer needs the package tokenizers (pip install tokenizers); "
            "without the option lengths are UTF-8 bytes"
        ) from None
    if not Path(tokenizer).is_file():
        raise ValueError(f"--tokenizer {tokenizer} is not a file; it wants a tokenizer.json")
    try:
        loaded = tokenizers.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(
            f"--tokenizer {tokenizer} is not a tokenizer.json of Hugging Face: {_cause(error)}"
        ) from None
    loaded.no_truncation()
    loaded.no_padding()
    encoded = loaded.encode_batch(paragraphs, add_special_tokens=False)
    return [len(part.ids) for part in encoded]


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
