# Guywire: the verbs. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export PYTHONHASHSEED ?= 0
ifneq ($(wildcard ../shared/data),)
export GUYWIRE_DATA ?= $(abspath ../shared/data)
endif
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup compare studies studies-smoke test test-slow lint format bench docs picture clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Two environments in one: what users of the commands need, and what developers need on top.
$(VENV)/.commands: pyproject.toml constraints.txt requirements-standalone.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[cli,report]'
	touch $@

$(VENV)/.developers: $(VENV)/.commands
	$(PIP) -c constraints.txt -e '.[dev,docs]'
	$(PIP) --no-deps -c constraints.txt -r requirements-standalone.txt
	touch $@

setup: $(VENV)/.developers  ## make .venv with everything that tests and docs need

compare: $(VENV)/.commands  ## the main job: which way of holding parameters forgets least (ARGS="..." for flags)
	$(BIN)/guywire compare $(ARGS)

studies: $(VENV)/.developers  ## run every paper's study at full size and write the gallery
	$(BIN)/guywire study --all --report $(ARGS)

studies-smoke: $(VENV)/.developers  ## the same in seconds: does everything run, no verdicts
	$(BIN)/guywire study --all --smoke --report $(ARGS)

test: $(VENV)/.developers  ## the tests, under 6 minutes on 2 cores
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-slow: $(VENV)/.developers  ## the slow tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS)

lint: $(VENV)/.developers  ## format check, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(VENV)/.developers  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.developers  ## cost beside peers, in environments made under .venv-peers; ARGS="--quick" without them
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.developers  ## the documentation, in docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

picture: $(VENV)/.developers  ## renew the README's picture of the report (needs Chromium)
	$(BIN)/python docs/screenshot.py

clean:  ## remove caches and built documentation
	rm -rf docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
