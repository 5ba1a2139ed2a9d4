"""Each task learns in seconds what its baseline cannot know, measured on held-out data."""

import random

import pytest

from fusedformer.transformer.train import train

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytestmark = pytest.mark.slow

SMALL = {
    "d_model": 32, "layers": 2, "heads": 2, "d_ff": 64, "dropout": 0.0, "warmup": 20,
    "learning_rate": 5e-3, "evaluate_every": 10_000, "save_every": 10_000, "log_every": 100,
}  # fmt: skip
WORDS = ["door", "light", "is", "open", "closed", "on", "off", "the", "lamp", "cat", "red", "blue"]


def learned(task, tmp_path, data, **fields):
    return train(task, data=data, out=tmp_path / "out", say=print, **{**SMALL, **fields})


def test_translation(tmp_path):
    """Two words, turned round and in capitals."""
    path = tmp_path / "pairs.tsv"
    pairs = [(a, b, c) for a in WORDS for b in WORDS for c in WORDS]
    path.write_text(
        "".join(f"{a} {b} {c}\t{c.upper()} {b.upper()} {a.upper()}\n" for a, b, c in pairs)
    )
    found = learned(
        "seq2seq", tmp_path, path, steps=250, batch_size=1024, vocab_size=310, max_length=16,
        label_smoothing=0.0,
    )  # fmt: skip
    assert found["cross-entropy"] < found["cross-entropy of a bigram model"] / 2
    assert found["chrF"] > 2 * found["chrF of copying the source"]
    assert found["chrF"] > 80


@pytest.fixture
def threes(tmp_path):
    """Text in which every letter comes again three letters later, until a new line."""
    draw = random.Random(0)
    lines = ("".join(draw.choices("abcdefgh", k=3)) * 8 for _ in range(1500))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return path


def test_next_token(tmp_path, threes):
    """A trigram model sees two letters back."""
    found = learned(
        "gpt", tmp_path, threes, steps=300, batch_size=1024, vocab_size=261, max_length=64
    )
    assert found["bits per byte"] < found["bits per byte of a trigram model"]


def test_masked_tokens(tmp_path, threes):
    found = learned(
        "bert", tmp_path, threes, steps=1500, batch_size=1024, vocab_size=261, max_length=34
    )
    assert found["masked accuracy"] > 3 * found["masked accuracy of the commonest token"]


def test_text_classes(tmp_path):
    """Whether two words are in order, which the words alone do not tell."""
    path = tmp_path / "labelled.tsv"
    texts = [(f"so {a} {b} {c}", a < c) for a in WORDS for b in WORDS for c in WORDS if a != c]
    path.write_text("".join(f"{'in' if first else 'no'} order\t{text}\n" for text, first in texts))
    found = learned(
        "bert-classifier", tmp_path, path, steps=200, batch_size=512, vocab_size=310, max_length=16
    )
    assert found["accuracy"] > 0.9
    assert found["accuracy of naive Bayes"] < 0.6


def test_classes(tmp_path):
    """Which corner is bright."""
    image = pytest.importorskip("PIL.Image")
    draw = random.Random(0)
    for label in range(4):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True)
        for i in range(50):
            picture = image.effect_noise((8, 8), 60)
            corner = (4 * (label % 2), 4 * (label // 2))
            picture.paste(draw.randint(150, 250), (*corner, corner[0] + 4, corner[1] + 4))
            picture.save(folder / f"{i}.png")
    found = learned(
        "vit", tmp_path, tmp_path / "images", steps=100, batch_size=32, image_size=8,
        patch_size=4, channels=1, learning_rate=2e-3, shift=0,
    )  # fmt: skip
    assert found["accuracy"] > 0.9
    assert found["accuracy of the commonest class"] == 0.25
