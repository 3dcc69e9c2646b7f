# make demo    the main job on the bundled model: resident, then with weights on disk; same answers
# make test    the default tests (no GPU needed)
# make lint types test-slow test-gpu bench format clean
PYTHON ?= python3
# A CPU-only machine can save the CUDA libraries: see "Install" in README.md.
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu lint types format bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(STAMP)

# torch first and by itself: its version decides which build of everything else fits.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flexgen needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing $(TORCH) into .venv: 0.8 GB as the CPU build, several GB with CUDA (README.md, Install); some minutes, without a word ..."
	@$(PIP) '$(TORCH)'
	@echo "installing flexgen, transformers, numba and the tools for tests into .venv: 0.8 GB, a minute or more ..."
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

test: $(STAMP)
	@$(BIN)/python -m pytest

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/pyright

# The comparison of docs/benchmarks.md; hours, and tens of GB below SCRATCH.
bench: $(STAMP)
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/compare.py all --scratch '$(or $(SCRATCH),$(error give a folder on a real disk: make bench SCRATCH=...))'

clean:
	rm -rf demo-out .pytest_cache .ruff_cache .hypothesis build dist
