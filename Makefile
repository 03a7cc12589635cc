# Everything runs in .venv, which is made from nothing and renewed when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test suite lint dist clean

demo: .venv/installed
	$(BIN)/momconv demo

# At the same time: neither the types nor, at its end, the suite keeps all cores busy.
test: .venv/installed
	$(MAKE) --jobs=2 lint suite

# A process and one thread for each core: more threads would only get in each other's way.
# Bytecode is kept, wherever the user's shell says otherwise: the tests start many programs.
# Files are given out as they are collected, the longest first (tests/conftest.py).
suite: .venv/installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A wheel and an sdist, in dist/, which are looked into and tried.
dist: .venv/installed
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python scripts/check_dist.py dist

clean:
	rm -rf .venv momconv-demo dist build

# Most of what is installed is never imported: what is, Python compiles then.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@
