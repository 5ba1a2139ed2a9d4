# make profile    how attention's cost grows on this machine, measured
# make test       the fast tests
# make test-all   the fast tests, then the slow ones
# make bench      the ops beside those of PyTorch, on this machine
# make lint       ruff and mypy
# make clean      removes .venv and everything else that can be made again
#
# PYTHON=...  the Python to start from: its torch >= 2.10 is used as it is, else one is installed
#             into .venv (nothing outside .venv is touched)
# ARGS=...    more arguments for the profile, the benchmarks or pytest

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN = $(VENV)/bin
# Two workers where pytest-xdist is there, one where it is not.
PYTEST = $(BIN)/python -m pytest $$($(BIN)/python -c "import xdist; print('-n $(WORKERS)')" 2>/dev/null)

.PHONY: setup profile bench test test-slow test-all lint clean

setup:
	@$(PYTHON) tools/setup_venv.py $(VENV)

profile: setup
	$(BIN)/python -m fusedformer profile attention $(ARGS)

bench: setup
	$(BIN)/python -m fusedformer bench $(ARGS)

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

# `make test test-all` runs each test once.
test-all: test test-slow

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache profile bench gpu
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
