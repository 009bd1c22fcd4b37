PYTHON ?= python
export OMP_NUM_THREADS ?= 1

test:        ## everything fast
	$(PYTHON) -m pytest

test-slow:   ## real model, several processes, other programs
	$(PYTHON) -m pytest -m "slow and not gpu"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
.PHONY: test test-slow lint
