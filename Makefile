# Everything a newcomer types. Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN    := .venv/bin
ARGS   ?=

.PHONY: help setup grid test test-fast check format lock
help:
	@echo "make setup      build .venv from requirements.lock"
	@echo "make grid       run experiments/quickstart.toml on drawn blood smears (about two minutes), then look with: $(BIN)/mlflow ui"
	@echo "make test       run the tests"
	@echo "make test-fast  run the quick tests (about a minute)"
	@echo "make check      formatter, linter, type checker and import rules"
	@echo "make format     let ruff format the code"
	@echo "make lock       resolve the dependencies of pyproject.toml anew"

setup: .venv/.ready

# Rebuilt when the lock changes; marked as ready last, so that a broken-off installation is taken up again.
.venv/.ready: requirements.lock pyproject.toml
	@echo "building .venv from requirements.lock (about 5 GB; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 setup") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "ready: $(BIN)/cellbench --help"

grid: setup
	@echo "running experiments/quickstart.toml"
	@$(BIN)/python -m cellbench.run grid $(ARGS)

test: setup
	@echo "running the tests"
	@$(BIN)/python -m pytest $(ARGS)

test-fast: setup
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock:
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv
	@.venv-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --all-extras --no-header --quiet pyproject.toml -o requirements.lock
	@rm -rf .venv-lock
	@echo "requirements.lock is new"
