PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Nothing downloads at run time; one thread for each of the two test workers.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
SOURCES := $(wildcard src tests benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow check docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

venv: $(STAMP)  ## create .venv with all that the tests need, or bring it up to date

$(STAMP): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

quickstart: venv  ## train, prune and time a small model (leaves runs/quickstart/report.json)
	HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/quickstart.py

test: venv  ## run the fast tests; ARGS="-k name -x" goes on to pytest
	$(PYTEST) -n 2 -m "not slow" $(ARGS)

test-slow: venv  ## run the slow tests, one at a time
	$(PYTEST) -m slow $(ARGS)

check: venv  ## lint, formatting, spelling, types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/typos
	$(VENV)/bin/mypy

docs: venv  ## rewrite docs/results.md from benchmarks/results, and build the site into build/site
	$(VENV)/bin/python benchmarks/run.py --tables
	NO_COLOR=1 $(VENV)/bin/zensical build --strict

clean:  ## remove caches and build outputs (not .venv, not runs/)
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
