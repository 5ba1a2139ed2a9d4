"""Makes the environment that `make` works in: python3 tools/setup_venv.py VENV

A torch >= 2.10 that this Python can import is used as it is; else the one of constraints.txt is
installed, with whatever else of that file is missing. When nothing is missing, pip is not called.
Runs on a bare Python >= 3.10 and writes nothing outside VENV.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUICK = ("--retries", "1", "--timeout", "15")  # where there is another way if it fails

# Prints the version of a torch that is new enough, else nothing.
FIND_TORCH = """
import re, torch
if tuple(map(int, re.findall(r"\\d+", torch.__version__)[:2])) >= (2, 10):
    print(torch.__version__)
"""

FIND_MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
for name in sys.argv[1:]:
    try:
        distribution(name)
    except PackageNotFoundError:
        if name not in ("torch", "triton") or find_spec(name) is None:
            print(name)
"""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def output(*command: str) -> str:
    """What a command prints; nothing when it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def requirements() -> dict:
    """The lines of constraints.txt by package (a package may have one line per Python version)."""
    lines: dict = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if line and not line.startswith("#"):
            lines.setdefault(re.split(r"[=;\s]", line)[0], []).append(line)
    return lines


def key() -> str:
    """Changes whenever an environment that is already there must be made anew."""
    parts = [path.read_bytes() for path in (CONSTRAINTS, ROOT / "pyproject.toml", Path(__file__))]
    parts += [str(ROOT).encode(), sys.executable.encode(), sys.version.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def record(state: Path, key: str) -> None:
    state.write_text(json.dumps({"key": key, "python": sys.executable}))


def create(venv: Path, state: Path, with_torch: bool) -> str:
    """An empty environment; the path of its Python."""
    if venv.exists():
        shutil.rmtree(venv)
    venv.mkdir(parents=True)
    # From here on the folder is known as ours, and as unfinished until key() is written to it.
    record(state, "unfinished")
    share = ["--system-site-packages"] if with_torch else []
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *share, str(venv)], check=True)
    bin_dir = venv / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_dir / "python")
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    paths = [str(ROOT)]
    if with_torch and sys.prefix != sys.base_prefix:
        # This Python is itself a virtual environment, which --system-site-packages passes over.
        here = [path for path in sys.path if path.startswith(sys.prefix)]
        paths += [f"import site; site.addsitedir({path!r})" for path in here if os.path.isdir(path)]
    (site / "fusedformer-checkout.pth").write_text("\n".join(paths) + "\n")
    script = bin_dir / "fusedformer"
    script.write_text(
        f"#!{python}\nimport sys\nfrom fusedformer.cli import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return python


def pip(python: str, *args: str) -> bool:
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *args]
    say("pip install " + " ".join(args))
    return subprocess.run(command).returncode == 0


def install_torch(python: str, pin: str) -> bool:
    """The CUDA build where there is an NVIDIA GPU; else a CPU build where one can be had."""
    if platform.system() != "Linux" or output("nvidia-smi", "-L"):
        return pip(python, pin)
    # On Linux the package index has the CUDA build under the plain version: gigabytes, for nothing.
    cpu = f"{pin}+cpu"
    if pip(python, cpu, *QUICK):
        return True
    say(f"no CPU build on the usual index; asking {CPU_INDEX}")
    if pip(python, cpu, "--extra-index-url", CPU_INDEX, *QUICK):
        return True
    say("no CPU build could be had; the build of the package index is larger, but works too")
    return pip(python, pin)


def install(python: str, missing: list, torch: str) -> bool:
    lines = requirements()
    if not output(python, "-m", "pip", "--version"):
        done = subprocess.run([python, "-m", "ensurepip", "--default-pip"], capture_output=True)
        if done.returncode:
            say(f"{sys.executable} has no pip (on Debian and Ubuntu: apt install python3-venv)")
            return False
    patience: tuple = QUICK
    if not torch:
        if not install_torch(python, lines["torch"][0]):
            return False
        torch = output(python, "-c", FIND_TORCH)
        patience = ()
    wanted = [line for name in missing if name != "torch" for line in lines[name]]
    # With torch named at the version that is there, pip has no reason to touch it.
    return not wanted or pip(python, *wanted, f"torch=={torch}", *patience)


def main() -> int:
    venv = Path(sys.argv[1]).absolute()
    state = venv / "fusedformer-setup.json"
    if sys.version_info < (3, 10):
        say(f"Python >= 3.10 is needed; {sys.executable} is {platform.python_version()}")
        return 2
    if state.is_file():
        made = json.loads(state.read_text())
        if Path(sys.prefix).resolve() == venv.resolve():
            # `make` with this environment active: ask the Python that it was made from.
            return subprocess.call([made["python"], *sys.argv])
        if made["key"] == key():
            return 0
    if venv.exists() and any(venv.iterdir()) and not state.is_file():
        say(f"{venv} was not made by `make`: move it away, or name another folder with VENV=")
        return 2

    torch = output(sys.executable, "-c", FIND_TORCH)
    say(f"{venv} for {sys.executable}, " + (f"with its torch {torch}" if torch else "with torch"))
    python = create(venv, state, with_torch=bool(torch))
    names = list(requirements())
    missing = output(python, "-c", FIND_MISSING, *names).split()
    if torch:
        missing = [name for name in missing if name != "torch"]
    if (missing or not torch) and not install(python, missing, torch):
        missing = output(python, "-c", FIND_MISSING, *names).split()
        if not output(python, "-c", FIND_TORCH) or "pytest" in missing:
            say("could not install: " + " ".join(missing))
            return 1
        # Without a network the tests can still run; the next `make` tries again.
        say("going on without: " + " ".join(missing))
        return 0
    record(state, key())
    return 0


if __name__ == "__main__":
    sys.exit(main())
