# make demo    the main job on the bundled model: resident, then with weights on disk; same answers
# make test    the default tests: every promise, and a sample of the large matrices; some minutes on two cores, no GPU needed
# make test-slow    what `make test` leaves out; make test-all    both; make test-gpu    what needs CUDA
# make lint types bench format clean
# make test WORKERS=n ARGS='...'    in n processes (0: in pytest's own), with more arguments for pytest
PYTHON ?= python3
# A CPU-only machine can save the CUDA libraries: see "Install" in README.md.
TORCH ?= torch==2.13.0

BIN := .venv/bin
# As many test processes as there are cores, but no more than four: each takes up to 2 GB of memory.
WORKERS ?= $(shell n=$$(nproc); echo $$((n > 4 ? 4 : n > 1 ? n : 0)))
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all test-gpu lint types format bench clean

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
	@$(PYTEST) $(ARGS)

test-slow: $(STAMP)
	@$(PYTEST) -m 'slow and not gpu' $(ARGS)

test-all: $(STAMP)
	@$(PYTEST) -m 'not gpu' $(ARGS)

test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m gpu $(ARGS)

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
