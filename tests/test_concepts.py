"""docs/concepts.md: what it prints is what comes out, and what it names is there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/concepts.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("title", SECTIONS)
def test_number(title):
    ((code, expected),) = re.findall(
        r"```python\n(.*?)```\n```\n(.*?)```", SECTIONS[title], re.DOTALL
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == expected


@pytest.mark.parametrize("title", SECTIONS)
def test_formula_file_and_test(title):
    section = SECTIONS[title]
    files = re.findall(r"\]\(((?!http).*?)\)", section)
    assert files
    assert all((ROOT / "docs" / file).is_file() for file in files)
    tests = re.findall(r"`tests/(\w+\.py)`", section)
    sources = "".join((ROOT / "tests" / name).read_text() for name in tests)
    assert all(f"def {name}(" in sources for name in re.findall(r"`(test_\w+)`", section))
    assert tests or "fusedformer profile" in section
