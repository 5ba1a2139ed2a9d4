"""fusedformer train: its options, what it leaves behind, and one clear sentence for bad input."""

import dataclasses
import importlib.util
import json
import re
import sys

import pytest
import torch

from fusedformer.cli import main
from fusedformer.transformer import checkpoint, data, datasets, presets, train_setup
from fusedformer.transformer.presets import TrainConfig, parse, resolve
from fusedformer.transformer.train import train

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

TINY = ["d_model=16", "layers=1", "heads=2", "d_ff=16", "steps=2", "batch_size=64", "warmup=1"]
TINY += ["log_every=1", "evaluate_every=1", "save_every=1", "keep=9"]
WORDS = ["door", "light", "is", "open", "closed", "on", "off", "the"]
ONE_CLASS = "".join(f"class\ttext {i}\n" for i in range(99))


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    numbered = enumerate(WORDS * 8)
    lines = [f"{a} {b}\t{b.upper()} {a.upper()} {i}" for i, a in numbered for b in WORDS]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The {a} is {b}." for a in WORDS * 2 for b in WORDS))
    return path


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labelled.tsv"
    texts = [(a, b) for a in WORDS for b in WORDS]
    path.write_text("".join(f"{min(a, b)}\t{a} {b}\n" for a, b in texts if a != b))
    return path


@pytest.fixture
def images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, grey in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            file = tmp_path / "images" / name / f"{i}.png"
            image.new("L", (8, 8), grey + i).save(file)
    return tmp_path / "images"


# --- Presets and fields ---------------------------------------------------------------------------


def test_published_presets_have_the_published_sizes():
    model, training, data = resolve("seq2seq", "base", {})
    assert (model.d_model, model.layers, model.d_ff) == (512, 6, 2048)
    assert training.label_smoothing == 0.1
    assert data is None
    assert resolve("gpt", "gpt2-xl", {})[0].layers == 48
    assert resolve("bert", "large", {})[0].d_model == 1024
    assert resolve("vit", "vit-base", {})[0].patch_size == 16


def test_every_preset_fits_its_configurations():
    for task, named in presets.PRESETS.items():
        ours, theirs = (
            {field.name for field in dataclasses.fields(config)}
            for config in (TrainConfig, presets.CONFIGS[task])
        )
        assert not ours & theirs, "--set could not tell them apart"
        for name in named:
            resolve(task, name, {})
        assert named["small"]["data"]


def test_settings_are_read_by_the_types_of_their_fields():
    read = parse("seq2seq", ["steps=3", "dropout=0", "prenorm=True", "source_vocab_size=none"])
    assert read == {"steps": 3, "dropout": 0, "prenorm": True, "source_vocab_size": None}
    assert type(read["dropout"]) is float
    assert parse("seq2seq", ["source_vocab_size=9"]) == {"source_vocab_size": 9}
    model, training, _ = resolve("seq2seq", "small", read | {"heads": 2})
    assert (training.steps, model.prenorm, model.heads) == (3, True, 2)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stepps=3", "seq2seq has no field 'stepps'; did you mean steps?"),
        ("patch_size=3", "seq2seq has no field 'patch_size'"),
        ("steps=many", "steps must be an int; got 'many'"),
        ("steps=1.5", "steps must be an int; got '1.5'"),
        ("steps=0", "steps must be 1 or more; got 0"),
        ("prenorm=1", "prenorm must be true or false; got '1'"),
        ("steps", "--set wants field=value; got 'steps'"),
        ("schedule=linear", "schedule must be one of cosine, inverse_sqrt, constant"),
        ("label_smoothing=2", "label_smoothing must be from 0 to 1; got 2.0"),
        ("heads=3", "d_model must be a multiple of heads"),
    ],
)
def test_field_that_does_not_fit(tmp_path, capsys, pairs, setting, says):
    out = tmp_path / "out"
    command = ["train", "seq2seq", "--data", str(pairs), "--out", str(out), "--set", setting]
    assert_user_error(command, says, capsys)
    assert not out.exists()


def assert_user_error(command, says, capsys):
    assert main(command) == 2
    captured = capsys.readouterr()
    said = captured.err.strip().splitlines()
    assert len(said) == 1, said
    assert re.search(says if "\\" in says else re.escape(says), said[0]), said


def test_unknown_preset(tmp_path, capsys):
    command = ["train", "gpt", "--preset", "huge", "--out", str(tmp_path / "out")]
    assert_user_error(command, "gpt has no preset 'huge'; it has small, gpt2-small", capsys)
    with pytest.raises(ValueError, match="task must be one of seq2seq, gpt, bert, vit"):
        train("lstm", out=tmp_path / "out")
    with pytest.raises(ValueError, match="the preset base has no data of its own"):
        train("seq2seq", preset="base", out=tmp_path / "out")
    with pytest.raises(ValueError, match="steps must be an int; got '3'"):
        train("gpt", out=tmp_path / "out", steps="3")


# --- Data -----------------------------------------------------------------------------------------


def test_a_folder_does_not_hide_the_data_set_of_its_name(tmp_path, monkeypatch):
    """`train gpt --out shakespeare` leaves one, where `train bert` then reads that data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "own.txt").write_text("mine")
    monkeypatch.setattr(datasets, "load", lambda name: [f"the data set {name}"])
    config = presets.CONFIGS["bert"]()
    assert train_setup._read_one("shakespeare", "bert", config) == ["the data set shakespeare"]
    assert train_setup._read_one("./shakespeare", "bert", config) == ["mine"]


def test_a_missing_library_is_said_at_once(tmp_path, monkeypatch, capsys, text):
    """Not at the first checkpoint, and not as damage to what it would have read."""
    out, weights = tmp_path / "out", tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    command = ["train", "gpt", "--data", str(text), "--out", str(out), "--set", *TINY]
    assert_user_error(command, "checkpoints need safetensors (pip install safetensors)", capsys)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"^checkpoints need safetensors"):
        checkpoint.read_tensors(weights)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"^text needs the package tokenizers"):
        data.load_tokenizer(text)


# --- Data that does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("seq2seq", "a\tb\nc d\n", "data.txt, line 2: wants source, one tab, target"),
        ("seq2seq", "", "data.txt is empty"),
        ("bert-classifier", "a\tb\nc\t\n", "data.txt, line 2: wants class, one tab, text; got an"),
        ("bert-classifier", ONE_CLASS, "must be of two classes or more; all are class"),
        ("seq2seq", "a\tb\n", "data.txt is too small: it leaves nothing to"),
        ("gpt", " \n", "data.txt is empty"),
        ("gpt", "ab", "data.txt is too small: it leaves nothing to hold out"),
        ("gpt", b"\xff\xfe", "data.txt, line 1: is not UTF-8"),
    ],
)
def test_bad_file(tmp_path, capsys, task, content, says):
    path, out = tmp_path / "data.txt", tmp_path / "out"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["train", task, "--data", str(path), "--out", str(out), "--set", *TINY]
    assert_user_error(command, says, capsys)
    assert not out.exists()


def test_bad_source(tmp_path, capsys, pairs):
    out = ["--out", str(tmp_path / "out")]
    assert_user_error(
        ["train", "gpt", "--data", "nowhere.txt", *out],
        "data 'nowhere.txt' is neither a file or folder nor a data set; those of text are "
        "shakespeare",
        capsys,
    )
    assert_user_error(
        ["train", "gpt", "--data", "mnist-5k", *out],
        "mnist-5k holds images; gpt wants text",
        capsys,
    )
    long = ["train", "seq2seq", "--data", str(pairs), *out, "--set", *TINY, "max_length=3"]
    assert_user_error(
        [*long, "too_long=error"],
        r"training pair 1 has \d+ tokens, more than max_length, 3 \(too_long=drop leaves",
        capsys,
    )
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_something(tmp_path, capsys, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    command = ["train", "gpt", "--data", str(text), "--out", str(tmp_path / "out")]
    assert_user_error(command, "out must be a new or an empty folder", capsys)
    assert_user_error([*command, "--resume"], "holds no run to resume", capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "run.json").write_text('{"task": "gpt"')
    assert_user_error([*command, "--resume"], "run.json is no JSON", capsys)
    (tmp_path / "out" / "run.json").write_text('{"task": "gpt"}')
    assert_user_error([*command, "--resume"], "it has no data", capsys)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq2seq", "gpt", "bert", "vit", "bert-classifier"])
def test_run_leaves_a_checkpoint_that_loads(task, tmp_path, capsys, request):
    fixtures = {"seq2seq": "pairs", "vit": "images", "bert-classifier": "labelled"}
    source = request.getfixturevalue(fixtures.get(task, "text"))
    out = tmp_path / "out"
    more = ["image_size=4", "patch_size=2"] if task == "vit" else ["vocab_size=270"]
    command = ["train", task, "--data", str(source), "--out", str(out), "--set", *TINY, *more]
    assert main(command) == 0
    captured = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert all(name in captured.out for name in report)
    assert "[2/2] loss" in captured.err
    assert len(checkpoint.steps(out)) == 2
    model, tokenizer = checkpoint.load(out)
    about = checkpoint.read_config(out)
    assert about["task"] == task
    if task == "vit":
        assert about["labels"] == ["dark", "light"]
        assert model.config.classes == 2
        assert tokenizer is None
        assert about["mean"] == pytest.approx((40 + 200 + 17) / 2 / 255, abs=0.02)
    else:
        assert tokenizer.get_vocab_size() == model.config.vocab_size == 270
    if task == "bert-classifier":
        assert about["labels"] == sorted(WORDS)[:-1]
        assert model.config.classes == len(WORDS) - 1
        assert main(["classify", str(out), "the light"]) == 0
        assert capsys.readouterr().out.startswith("the light: ")
    if importlib.util.find_spec("matplotlib"):
        assert (out / "loss.png").stat().st_size > 1000


def test_resume(tmp_path, capsys, text):
    """Of a run that was to have 2 steps, and has 3 then; it needs no option but where it is."""
    for name, steps in (("whole", 3), ("parts", 2)):
        train("gpt", data=text, out=tmp_path / name, say=print, **tiny(steps=steps))
    command = ["train", "gpt", "--out", str(tmp_path / "parts"), "--resume"]
    capsys.readouterr()
    assert main([*command, "--set", "steps=3", "d_model=16"]) == 0
    assert "goes on from" in capsys.readouterr().err
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")
    ]
    losses = [[json.loads(line).get("loss") for line in part] for part in lines]
    # The schedule knows how many steps there are, so that the last of 2 is not the second of 3.
    assert losses[0][0] == losses[1][0]
    assert len(losses[0]) == len(losses[1])
    assert_user_error([*command, "--set", "d_model=32"], "d_model of the run in", capsys)
    assert_user_error([*command, "--data", "other.txt"], "holds a run with data", capsys)
    assert_user_error(command[:-1], "(resume goes on with it)", capsys)
    command[1] = "bert"
    assert_user_error(command, "holds a run with task gpt, not bert", capsys)
    text.write_text(text.read_text() + " More text than there was.")
    command[1] = "gpt"
    assert_user_error([*command, "--set", "steps=4"], "was trained on other data", capsys)
    assert len(checkpoint.steps(tmp_path / "parts")) == 3


def tiny(**changes):
    return parse("gpt", TINY) | {"vocab_size": 270, "max_length": 16} | changes


def test_held_out_file_and_no_matplotlib(tmp_path, monkeypatch, capsys, text):
    other = tmp_path / "other.txt"
    other.write_text("The door is open. " * 30)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = train("gpt", data=text, held_out=other, out=tmp_path / "out", say=print, **tiny())
    assert "no loss.png: matplotlib is not installed" in capsys.readouterr().out
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["held_out"] == str(other)
    assert found["bits per byte of a trigram model"] < found["bits per byte"]


def test_a_classifier_begins_with_another_bert(tmp_path, capsys, text, labelled):
    train("bert", data=text, out=tmp_path / "bert", say=print, **tiny())
    other, tokenizer = checkpoint.load(tmp_path / "bert")
    command = ["train", "bert-classifier", "--data", str(labelled), "--out", str(tmp_path / "out")]
    command += ["--start", str(tmp_path / "bert")]
    still = ["steps=2", "warmup=1", "learning_rate=0", "weight_decay=0"]
    assert main([*command, "--set", *still, "dropout=0.3"]) == 0
    model, same = checkpoint.load(tmp_path / "out")
    assert same.to_str() == tokenizer.to_str()
    assert (model.config.d_model, model.config.dropout) == (16, 0.3)
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert model.config.classes == len(model.classifier.bias) == len(WORDS) - 1
    assert main([*command[:2], *command[4:6], "--resume", "--set", "steps=3"]) == 0
    capsys.readouterr()
    command[5] = str(tmp_path / "other")
    assert_user_error([*command, "--set", "layers=2"], "layers is that of", capsys)
    command[-1] = "nowhere"
    assert_user_error(command, "nowhere is no checkpoint", capsys)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="start is for a bert-classifier; gpt begins at random"):
        train("gpt", data=text, start=tmp_path / "bert", out=tmp_path / "other")


def test_right_to_left(tmp_path, text):
    out = tmp_path / "out"
    train("gpt", data=text, out=out, say=print, **tiny(right_to_left=True))
    assert checkpoint.read_config(out)["right_to_left"] is True


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "vit", "--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in presets.fields("vit"))
