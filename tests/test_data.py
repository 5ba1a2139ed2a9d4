"""Reading files, holding data out, tokenizers, and batches of like length."""

import itertools
import re

import pytest
import torch

from fusedformer.transformer import data

# --- Files ----------------------------------------------------------------------------------------


def test_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeff안녕\tHello\r\n문 \t The door\n".encode())
    assert data.read_pairs(path) == [("안녕", "Hello"), ("문", "The door")]


def test_labelled(tmp_path):
    path = tmp_path / "labelled.tsv"
    path.write_text("good\tI like it\nbad\tI do not\n")
    assert data.read_labelled(path) == [("good", "I like it"), ("bad", "I do not")]
    texts = [(str(i % 3), f"text {i % 500}") for i in range(2000)]
    training, held_out = data.split_labelled(texts)
    assert sorted(training + held_out) == sorted(texts)
    assert 40 < len(held_out) < 180
    assert not {text for _, text in training} & {text for _, text in held_out}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"no tab", "1 fields"),
        (b"a\tb\tc", "3 fields"),
        (b"", "1 fields"),
        (b"a\t ", "an empty field"),
        (b"a\t\xff", "not UTF-8"),
    ],
)
def test_malformed_line_is_named_by_its_number(tmp_path, line, says):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"a\tb\nc\td\n" + line + b"\ne\tf\n")
    with pytest.raises(ValueError, match=rf"pairs\.tsv, line 3: .*{says}"):
        data.read_pairs(path)


def test_empty_files(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt is empty; it wants lines"):
        data.read_pairs(path)
    with pytest.raises(ValueError, match=r"empty\.txt is empty; it wants text"):
        data.read_documents(path)
    with pytest.raises(ValueError, match="empty"):
        data.read_documents(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no \*\.txt"):
        data.read_documents(tmp_path)


def test_documents(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nfile")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "c.md").write_text("no text")
    assert data.read_documents(tmp_path) == ["first", "second\n\nfile"]
    assert data.read_documents(tmp_path / "b.txt") == ["second\n\nfile"]


def test_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        (tmp_path / name).mkdir()
        image.new("RGB", (7, 5), colour).save(tmp_path / name / "1.png")
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    images = data.read_images(tmp_path, (3, 4, 6))
    assert images.classes == ["green", "red"]
    assert images.labels.tolist() == [0, 1]
    assert images.pixels.shape == (2, 3, 4, 6)
    # Channels first: each holds one value.
    assert images.pixels[1].amax((1, 2)).tolist() == [255, 0, 0]
    assert images.pixels[1].amin((1, 2)).tolist() == [255, 0, 0]
    assert data.read_images(tmp_path, (1, 4, 6)).pixels.shape == (2, 1, 4, 6)

    (tmp_path / "red" / "2.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"2\.png cannot be read"):
        data.read_images(tmp_path, (1, 4, 4))
    (tmp_path / "blue").mkdir()
    with pytest.raises(ValueError, match="blue holds no images"):
        data.read_images(tmp_path, (1, 4, 4))
    with pytest.raises(ValueError, match="holds no folders"):
        data.read_images(tmp_path / "blue", (1, 4, 4))


# --- Held-out data --------------------------------------------------------------------------------


def test_no_sentence_held_out_is_trained_on():
    pairs = [(f"s{i}", f"t{i % 1500}") for i in range(2000)] + [("s1", "another")]
    training, held_out = data.split_pairs(pairs)
    assert 50 < len(held_out) < 150
    assert len(training) + len(held_out) > 1700
    for side in (0, 1):
        assert not {pair[side] for pair in training} & {pair[side] for pair in held_out}
    # A pair's place does not hang on the others.
    assert set(data.split_pairs(pairs[500:])[1]) <= set(held_out)


def test_text_held_out_is_the_end():
    documents = ["a" * 1000, "First line.\n\n" * 100, "b" * 20]
    training, held_out = data.split_documents(documents)
    assert "".join(training + held_out) == "".join(documents)
    assert held_out[-1] == "b" * 20
    assert held_out[0].startswith("First")
    twentieth = sum(map(len, documents)) / 20
    assert twentieth - 13 <= sum(map(len, held_out)) <= twentieth
    assert data.split_documents(["x" * 40]) == (["x" * 38], ["x" * 2])


def test_images_held_out_are_every_tenth_of_each_class():
    labels = torch.arange(40) // 20
    images = data.Images(torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1), labels, ["0"])
    training, held_out = data.split_images(images._replace(classes=["0", "1"]))
    assert held_out.pixels.flatten().tolist() == [9, 19, 29, 39]
    assert held_out.labels.tolist() == [0, 0, 1, 1]
    assert len(training.labels) == 36


# --- Tokenizers -----------------------------------------------------------------------------------


def test_tokenizer_round_trip(tmp_path):
    pytest.importorskip("tokenizers")
    texts = ["the cat sat on the mat, the cat", "고양이 고양이"] * 3
    tokenizer = data.train_tokenizer(texts, 270)
    assert [tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == 270
    odd = " never\tseen:  žluťoučký 🐎\n<mask> <eos>"
    (ids,) = data.encode(tokenizer, [odd])
    # What a text spells out never becomes a special token.
    assert not set(ids) & set(range(5))
    assert tokenizer.decode(ids) == odd
    (both,) = data.encode(tokenizer, [odd], sos=True, eos=True)
    assert both == [data.SOS, *ids, data.EOS]
    assert tokenizer.decode(both) == odd

    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert data.encode(data.load_tokenizer(path), [odd]) == [ids]
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        data.load_tokenizer(path)
    with pytest.raises(ValueError, match=r"at least 261.*got 260"):
        data.train_tokenizer(texts, 260)


def test_pad():
    tokens, lengths = data.pad([[5, 6], [7], [8, 9, 10]])
    assert tokens.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert lengths.tolist() == [2, 1, 3]
    assert lengths.dtype == torch.int32


# --- Batches --------------------------------------------------------------------------------------

SIZES = torch.randint(1, 30, (500, 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:, 0]])
def test_batches_hold_every_example_once_within_the_budget(sizes):
    batches = data.Batches(sizes, 120, seed=1)
    first = [batches[i].tolist() for i in range(len(batches))]
    assert sorted(itertools.chain(*first)) == list(range(500))
    used, padded = 0, 0
    for batch in first:
        wide = sizes[batch].reshape(len(batch), -1)
        padded += len(batch) * int(wide.amax(0).sum())
        used += int(wide.sum())
        assert len(batch) * int(wide.amax(0).sum()) <= 120
    # Examples in the order of the file would need a batch each to fit, or half as much again.
    assert padded < 1.2 * used
    assert [len(batch) for batch in first] != sorted(len(batch) for batch in first)


def test_batches_are_a_function_of_seed_and_number():
    batches = data.Batches(SIZES, 120, seed=1)
    count = len(batches)
    forward = [batches[i].tolist() for i in range(2 * count)]
    again = data.Batches(SIZES, 120, seed=1)
    for i in (count + 3, 2, 2 * count - 1):
        assert again[i].tolist() == forward[i]
        assert again.epoch(i) == i // count
    assert sorted(itertools.chain(*forward[count:])) == list(range(500))
    assert sorted(map(sorted, forward[count:])) != sorted(map(sorted, forward[:count]))
    other = data.Batches(SIZES, 120, seed=2)
    assert [other[i].tolist() for i in range(count)] != forward[:count]


def test_example_over_the_budget():
    with pytest.raises(ValueError, match=re.escape("batch of 20 tokens has no room for")):
        data.Batches(SIZES, 20, seed=0)
