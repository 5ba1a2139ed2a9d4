"""Data for training: sentence pairs, text, images; tokenizers; batches of like length.

Everything here is a pure function of the files and of (seed, number of the batch), so that a run
which is resumed sees the batches that it would have seen.
"""

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Pairs = list[tuple[str, str]]  # (source, target)
Labelled = list[tuple[str, str]]  # (class, text)
Documents = list[str]

# Of every tokenizer, in this order: ids 0 to 4. BERT's [CLS] and [SEP] are <sos> and <eos>.
SPECIAL_TOKENS = ("<pad>", "<sos>", "<eos>", "<unk>", "<mask>")
PAD, SOS, EOS, UNK, MASK = range(len(SPECIAL_TOKENS))

HELD_OUT = 20  # one part in so many is held out where there is no file for it
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Images(NamedTuple):
    """Labelled images of one size."""

    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    classes: list[str]

    def take(self, index: Tensor) -> "Images":
        """Those at ``index``, int64 (n,)."""
        return Images(self.pixels[index], self.labels[index], self.classes)


# --- Files ----------------------------------------------------------------------------------------


def read_pairs(path: "str | Path") -> Pairs:
    """A UTF-8 file with a source sentence, a tab and its target sentence in each line.

    Raises:
        ValueError: a line is something else (its number is named), or there is none.
    """
    return _read_tsv(path, "source, one tab, target")


def read_labelled(path: "str | Path") -> Labelled:
    """A UTF-8 file with a class's name, a tab and a text of this class in each line.

    Raises:
        ValueError: a line is something else (its number is named), or there is none.
    """
    return _read_tsv(path, "class, one tab, text")


def _read_tsv(path: "str | Path", wanted: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(_lines(path), start=1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 2 or not all(fields):
            found = f"{len(fields)} fields" if len(fields) != 2 else "an empty field"
            raise ValueError(f"{path}, line {number}: wants {wanted}; got {found}")
        pairs.append((fields[0], fields[1]))
    if not pairs:
        raise ValueError(f"{path} is empty; it wants lines of {wanted}")
    return pairs


def _lines(path: "str | Path") -> Iterator[str]:
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # The mark that some editors put before the first line is no part of a sentence.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: is not UTF-8 ({error.reason})") from None


def read_documents(path: "str | Path") -> Documents:
    """A UTF-8 text file, or a folder's ``*.txt`` files in the order of their names.

    Raises:
        ValueError: one is not UTF-8 or empty, or a folder has none.
    """
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no *.txt file")
    documents = []
    for file in files:
        documents.append("\n".join(_lines(file)))
        if not documents[-1].strip():
            raise ValueError(f"{file} is empty; it wants text")
    return documents


def read_image(file: "str | Path", size: tuple[int, int, int]) -> Tensor:
    """An image file, brought to (channels, height, width): uint8 of that shape.

    Raises:
        ValueError: it cannot be read, channels is neither 1 (grey) nor 3 (RGB), or Pillow is
            missing.
    """
    try:
        image = importlib.import_module("PIL.Image")
    except ImportError:
        raise ValueError("reading images needs Pillow (pip install pillow)") from None
    channels, height, width = size
    if channels not in (1, 3):
        raise ValueError(f"images have 1 channel (grey) or 3 (RGB); got {channels}")
    try:
        with image.open(file) as opened:
            resized = opened.convert("L" if channels == 1 else "RGB").resize((width, height))
            data = bytearray(resized.tobytes())
    except OSError as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(height, width, channels)
    return pixels.permute(2, 0, 1).contiguous()


def read_images(folder: "str | Path", size: tuple[int, int, int]) -> Images:
    """A folder of folders of images: each folder is a class, and its name the class's name.

    Args:
        folder: where the class folders are.
        size: (channels, height, width) to bring every image to; 1 channel is grey, 3 are RGB.

    Raises:
        ValueError: there are no images, a class has none, one cannot be read, or Pillow is missing.
    """
    classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{folder} holds no folders; it wants one folder of images for each class")
    pixels, labels = [], []
    for label, name in enumerate(classes):
        files = sorted((Path(folder) / name).iterdir())
        files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise ValueError(f"{Path(folder) / name} holds no images")
        pixels += [read_image(file, size) for file in files]
        labels += [label] * len(files)
    return Images(torch.stack(pixels), torch.tensor(labels), classes)


# --- Held-out data --------------------------------------------------------------------------------


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_pairs(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """(training, held out): a twentieth of the source sentences, chosen by their hash.

    Training pairs whose source or target sentence also occurs among those held out are dropped, so
    that nothing held out has been seen, in either language.
    """
    held_out = [pair for pair in pairs if _digest(pair[0]) % HELD_OUT == 0]
    sources, targets = {pair[0] for pair in held_out}, {pair[1] for pair in held_out}
    training = [pair for pair in pairs if pair[0] not in sources and pair[1] not in targets]
    return training, held_out


def split_labelled(texts: Labelled) -> tuple[Labelled, Labelled]:
    """(training, held out): a twentieth of the texts, chosen by their hash, so equal ones alike."""
    training: Labelled = []
    held_out: Labelled = []
    for one in texts:
        (training if _digest(one[1]) % HELD_OUT else held_out).append(one)
    return training, held_out


def split_documents(documents: Documents) -> tuple[Documents, Documents]:
    """(training, held out): the last twentieth of the text, from a paragraph's or line's start."""
    left = sum(map(len, documents)) // HELD_OUT
    training, held_out = list(documents), list[str]()
    while left > len(training[-1]):
        held_out.insert(0, training.pop())
        left -= len(held_out[0])
    document = training.pop()
    at = len(document) - left
    for separator in ("\n\n", "\n", " "):
        found = document.find(separator, at)
        if found != -1 and document[found:].strip():
            at = found + len(separator)
            break
    parts = [document[:at]], [document[at:]]
    return (
        training + [part for part in parts[0] if part.strip()],
        [part for part in parts[1] if part.strip()] + held_out,
    )


def split_images(images: Images) -> tuple[Images, Images]:
    """(training, held out): every tenth image of each class."""
    rank = torch.empty_like(images.labels)
    for label in range(len(images.classes)):
        index = (images.labels == label).nonzero()[:, 0]
        rank[index] = torch.arange(len(index))
    out = rank % 10 == 9
    return images.take((~out).nonzero()[:, 0]), images.take(out.nonzero()[:, 0])


# --- Tokenizers -----------------------------------------------------------------------------------


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError('text needs the package tokenizers (pip install "tokenizers")') from None


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE tokenizer (Radford et al., 2019) of at most ``vocab_size`` tokens.

    It has SPECIAL_TOKENS and every byte, so that no text is unknown to it.

    Raises:
        ValueError: ``vocab_size`` has no room for those.
    """
    library = _tokenizers()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, for every byte; got {vocab_size}")
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: "str | Path") -> "Tokenizer":
    """Reads a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    text = Path(path).read_text(encoding="utf-8")
    _tokenizers()  # without which the text is not to blame
    try:
        return tokenizer_from(text)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None


def tokenizer_from(text: str) -> "Tokenizer":
    """The tokenizer that a tokenizer.json of this text holds."""
    return _tokenizers().Tokenizer.from_str(text)


def encode(
    tokenizer: "Tokenizer", texts: Sequence[str], *, sos: bool = False, eos: bool = False
) -> list[list[int]]:
    """Token ids of each text, between <sos> and <eos> where asked for.

    The models want <eos> after a source sentence, both around a target sentence and around BERT's
    text, and <sos> before a prompt.
    """
    before, after = [SOS] * sos, [EOS] * eos
    # A text that spells a special token means its characters: only we write the token itself.
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [before + text.ids + after for text in encoded]


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens int64 (B, N) padded on the right with <pad>, lengths int32 (B,))."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.full((len(sequences), max(lengths)), PAD)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return tokens, torch.tensor(lengths, dtype=torch.int32)


# --- Batches --------------------------------------------------------------------------------------


def generator(*key: int) -> torch.Generator:
    """A generator whose numbers are a function of ``key`` alone."""
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Batches:
    """An endless sequence of batches: of like sizes, each within a budget, shuffled each epoch.

    ``batches[number]`` is a pure function of (sizes, budget, seed, number). Examples of one epoch
    are in order of size, equal ones shuffled; the order is cut wherever the next example would put
    the batch, with its padding, over the budget, and then the batches are shuffled. As equal sizes
    stand at equal places, every epoch has the same number of batches.

    Args:
        sizes: int (n,) or (n, k), the length of each example, or its k lengths (a pair has two).
        budget: most elements of a batch: its examples, times the sum of the k longest lengths.
        seed: of the shuffling.

    Raises:
        ValueError: the largest example alone is over the budget.
    """

    def __init__(self, sizes: Tensor, budget: int, seed: int) -> None:
        sizes = sizes.long().reshape(len(sizes), -1)
        self.seed, self._epoch, self._order = seed, -1, torch.empty(0)
        # One number that orders as (longest, first, second, ...).
        self._key = sizes.amax(1)
        for column in sizes.T:
            self._key = self._key * (int(sizes.max()) + 1) + column
        # One at a time, as the place of each cut hangs on the one before.
        self._starts, widest, count = [0], [0] * sizes.shape[1], 0
        for i, size in enumerate(sizes[self._key.argsort()].tolist()):
            if sum(size) > budget:
                raise ValueError(
                    f"a batch of {budget} tokens has no room for an example of {sum(size)}"
                )
            wider, count = [max(pair) for pair in zip(widest, size, strict=True)], count + 1
            if count * sum(wider) > budget:
                self._starts.append(i)
                wider, count = size, 1
            widest = wider
        self._starts.append(len(sizes))

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return len(self._starts) - 1

    def epoch(self, number: int) -> int:
        """The epoch of a batch."""
        return number // len(self)

    def __getitem__(self, number: int) -> Tensor:
        """Indices of the examples of a batch, int64 (n,)."""
        epoch, at = divmod(number, len(self))
        if epoch != self._epoch:
            shuffle = generator(self.seed, epoch)
            order = torch.randperm(len(self._key), generator=shuffle)
            order = order[self._key[order].argsort(stable=True)]
            batches = torch.randperm(len(self), generator=shuffle)
            self._epoch, self._order, self._batches = epoch, order, batches.tolist()
        batch = self._batches[at]
        return self._order[self._starts[batch] : self._starts[batch + 1]]
