# Everything a newcomer types. Python 3.11 or newer and make are enough; uv is used where it is installed.
PYTHON ?= python3
BIN    := .venv/bin
ARGS   ?=
UV     := $(shell command -v uv 2>/dev/null)

.PHONY: help setup grid test test-fast check format docs wheel lock
help:
	@echo "make setup      build .venv from requirements.lock, with uv where it is installed, else with pip"
	@echo "make grid       the first comparison, on drawn blood smears (about two minutes)"
	@echo "make test       run the tests"
	@echo "make test-fast  run the quick tests (about a minute)"
	@echo "make check      formatter, linter, type checker and import rules"
	@echo "make format     let ruff format the code"
	@echo "make docs       build the documentation: docs/_build/index.html"
	@echo "make wheel      build dist/cellbench-*.whl, to install elsewhere"
	@echo "make lock       resolve the dependencies of pyproject.toml anew"
	@echo "In a shell: source $(BIN)/activate, then cellbench --help"

setup: .venv/.ready

# Rebuilt when the lock changes; marked as ready last, so that an interrupted installation is resumed.
.venv/.ready: requirements.lock pyproject.toml
	@echo "building .venv from requirements.lock with $(if $(UV),uv,pip) (about 5 GB; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 setup") if sys.version_info < (3, 11) else None'
ifneq ($(UV),)
	@test -x $(BIN)/python || "$(UV)" venv --quiet --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	@"$(UV)" pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@"$(UV)" pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
else
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
endif
	@touch $@
	@echo "ready. Next: source $(BIN)/activate && cellbench grid"

grid: setup
	@$(BIN)/cellbench grid $(ARGS)

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

docs: setup
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build
	@echo "look: docs/_build/index.html"

wheel: setup
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

lock:
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv
	@.venv-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --all-extras --no-header --quiet pyproject.toml -o requirements.lock
	@rm -rf .venv-lock
	@echo "requirements.lock is new"
