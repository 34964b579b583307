# All tasks, from a fresh checkout with Python 3.10+ and make. `make PYTHON=python3.12 train` selects the interpreter.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: help train test lint format types docs bench bench-report clean

help:
	@echo "make train   install, train the demo on drawn flowers, evaluate, write runs/demo/report.html"
	@echo "make test    install, run all tests and the examples of the documentation"
	@echo "make lint    ruff and the import contracts       make format  apply ruff's fixes and formatter"
	@echo "make types   mypy                                make docs    build the documentation into site/"
	@echo "make bench   measure speed and memory            make clean   remove builds and caches"
	@echo "make bench-report   write docs/benchmarks.md from the recorded measurements"

train: .venv/installed-train
	$(BIN)/mirror-modules train demo --out runs/demo --resume $(ARGS)

# One torch thread per worker: more threads compete for the same cores. With worksteal, consecutive tests, which share
# what a fixture trains, stay on one worker.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --markdown-docs docs README.md

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed-dev
	$(BIN)/mypy

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed-dev
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-report: .venv/installed-dev
	$(BIN)/python -m benchmarks.report $(ARGS)

clean:
	rm -rf build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files skip the installation in later calls; a changed pyproject.toml triggers it again.
.venv/installed-train: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --editable '.[train]'
	@touch $@

.venv/installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --editable '.[train,docs,dev]'
	@touch .venv/installed-train $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is required, but $(PYTHON) is `$(PYTHON) -V 2>&1`; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
