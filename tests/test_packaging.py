"""The package as its users meet it: a checkout, a wheel, an editable install; with and without."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from backends import ROW_BACKENDS

import fusedformer
from fusedformer.kernels import dispatch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]

USE = """
import torch
q = torch.randn(1, 2, 5, 4)
assert fusedformer.attention(q, q, q, causal=True, dropout_p=0.5).shape == q.shape
assert fusedformer.dropout_add_layer_norm(q, q, dropout_p=0.5).shape == q.shape
assert fusedformer.bias_activation(fusedformer.dropout(q)).shape == q.shape
"""


def python(code: str, cwd: Path, *path: Path) -> str:
    """What a fresh Python prints, with nothing but ``path`` added to where it looks."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- What is written twice agrees -----------------------------------------------------------------


def test_every_folder_is_listed():
    """A folder that setuptools is not told of would be missing from the wheel, without a word."""
    mapping = SETUPTOOLS["package-dir"]
    found = set()
    for folder in ("fusedformer", "kernels", "transformer", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            package = path.parent.relative_to(ROOT).parts
            assert mapping["fusedformer" if folder == "fusedformer" else f"fusedformer.{folder}"]
            found.add(".".join(package if folder == "fusedformer" else ("fusedformer", *package)))
    assert found | {"fusedformer.csrc"} == set(SETUPTOOLS["packages"])
    data = SETUPTOOLS["package-data"]["fusedformer.csrc"]
    shipped = {path for pattern in data for path in (ROOT / "csrc").glob(pattern)}
    assert {path for path in (ROOT / "csrc").rglob("*") if path.is_file()} == shipped


def test_type_checkers_see_every_folder():
    links = {path.name: path.resolve() for path in (ROOT / ".typelinks/fusedformer").iterdir()}
    mapped = set(SETUPTOOLS["package-dir"].values()) - {"csrc"}
    assert links == {folder: ROOT / folder for folder in mapped if folder != "fusedformer"}


def test_constraints_pin_what_the_tests_need():
    def names(lines):
        return {re.split(r"[=<>;\s]", line)[0] for line in lines if not line.startswith("#")}

    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = names(project["dependencies"] + extras["profile"] + extras["dev"])
    assert names((ROOT / "constraints.txt").read_text().split("\n")) - {""} == wanted


def test_kernels_and_transformer_stay_namespaces():
    """With an __init__.py, a checkout on sys.path would shadow Hugging Face's kernels."""
    for folder in ("kernels", "kernels/cuda", "kernels/triton", "transformer", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_version_is_one():
    for file in ("CITATION.cff", "CHANGELOG.md"):
        assert fusedformer.__version__ in (ROOT / file).read_text(), file


def test_setup_needs_no_torch():
    assert not [line for line in PROJECT["build-system"]["requires"] if "torch" in line]
    for file in ("setup.py", "tools/setup_venv.py"):
        tree = ast.parse((ROOT / file).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in imports if "torch" in ast.unparse(node)]


def test_public_names_exist():
    assert all(hasattr(fusedformer, name) for name in fusedformer.__all__)
    assert set(dispatch.OPS) <= set(fusedformer.__all__)


def test_readme():
    text = (ROOT / "README.md").read_text()
    for name in fusedformer.__all__:
        assert name == "__version__" or re.search(rf"`[^`\n]*\b{name}\b", text), name
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})


# --- A checkout -----------------------------------------------------------------------------------


def test_checkout_beside_hugging_face_kernels(tmp_path):
    """Uninstalled, with another package called kernels around: each finds its own."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("HERS = True\n")
    code = "import fusedformer, kernels; assert kernels.HERS; print(fusedformer.__file__)" + USE
    assert python(code, ROOT, ROOT, tmp_path) == str(ROOT / "fusedformer/__init__.py")


def test_without_triton():
    """macOS and Windows have no Triton."""
    code = f"""
import sys
sys.modules["triton"] = None  # so importing it fails
import fusedformer
{USE}
reason = fusedformer.available_backends("attention", "cpu")["triton"]
assert "triton" in reason and "import" in reason, reason
from fusedformer.cli import main
sys.exit(main(["doctor"]))
"""
    out = python(code, ROOT)
    assert re.search(r"^triton +none \(ModuleNotFoundError", out, re.MULTILINE), out
    assert "not on triton: it cannot be imported" in out
    assert "Traceback" not in out


# --- Built ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The checkout's files at another place, where a build may leave its own."""
    target = tmp_path_factory.mktemp("copy") / "fusedformer"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "profile")
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignored))


def build(copy: Path, kind: str, out: Path) -> Path:
    """What setuptools makes of the copy: its path. No pip, so no network."""
    pytest.importorskip("setuptools", "65")
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    return out / python(code, copy).splitlines()[-1]


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.mark.slow
def test_wheel(copy, tmp_path):
    wheel = build(copy, "wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    site = unpack(wheel, tmp_path / "site")
    shipped = {str(path.relative_to(site / "fusedformer")) for path in site.rglob("*.py")}
    own = ROOT / "fusedformer"
    ours = {str(path.relative_to(own)) for path in own.rglob("*.py")}
    for folder in ("kernels", "transformer", "benchmarks"):
        ours |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert shipped == ours
    assert (site / "fusedformer/py.typed").is_file()
    shipped = {path.relative_to(site / "fusedformer") for path in site.rglob("csrc/**/*.*")}
    assert shipped == {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")}
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"fusedformer"}

    # A package of the same name beside ours must not be taken for the checkout's folder.
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("HERS = True\n")
    code = f"import fusedformer, kernels\nassert kernels.HERS\n{USE}\nprint(*fusedformer.__path__)"
    assert python(code, tmp_path, site) == str(site / "fusedformer")


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in ROW_BACKENDS, reason="there is no C++ library here")
def test_wheel_with_the_library_inside(copy, tmp_path):
    """Made in a copy of its own, as the library stays in csrc; used without compiler and cache."""
    source = shutil.copytree(copy, tmp_path / "source", symlinks=True)
    code = "from fusedformer.cli import main; main(['build', 'cpu', '--into', 'csrc'])"
    library = Path(python(code, source).splitlines()[-1])
    wheel = build(source, "wheel", tmp_path)
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    site = unpack(wheel, tmp_path / "site")
    code = f"""
import os
os.environ |= {{"PATH": "", "XDG_CACHE_HOME": {str(tmp_path / "cache")!r}}}
import torch, fusedformer
fusedformer.dropout(torch.ones(3), backend="cpu")
from fusedformer.kernels import native
print(native.about()["library"])
"""
    assert python(code, tmp_path, site) == str(site / "fusedformer" / library)
    assert not (tmp_path / "cache").exists()
    # Of other sources, it is not used.
    with (site / "fusedformer/csrc/cpu/ops.cpp").open("a") as file:
        file.write("// changed")
    assert python(code.replace(', backend="cpu"', ""), tmp_path, site) == "None"


@pytest.mark.slow
def test_wheel_with_the_checkout_as_working_directory(copy, tmp_path):
    site = unpack(build(copy, "wheel", tmp_path), tmp_path / "site")
    code = "import fusedformer\n" + USE + "print(fusedformer.kernels.__path__[0])"
    assert python(code, copy, site) == str(copy / "kernels")


@pytest.mark.slow
def test_sdist_holds_what_a_wheel_needs(copy, tmp_path):
    sdist = build(copy, "sdist", tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    first = zipfile.ZipFile(build(copy, "wheel", tmp_path / "a")).namelist()
    assert zipfile.ZipFile(build(source, "wheel", tmp_path / "b")).namelist() == first


@pytest.mark.slow
def test_editable(copy, tmp_path):
    site = unpack(build(copy, "editable", tmp_path), tmp_path / "site")
    # This environment may know the checkout by itself; only the copy is to be found.
    code = f"import site, sys\nsys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
    code += f"site.addsitedir({str(site)!r})\nimport fusedformer\n{USE}"
    code += "from fusedformer.kernels import dispatch, rng\nprint(dispatch.__file__)"
    assert python(code, tmp_path) == str(copy / "kernels/dispatch.py")
