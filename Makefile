# Every target sets up `.venv` by itself when it needs to; `make` alone lists the targets.
# Python 3.8 to 3.11, for example: make demo PYTHON=python3.11

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-full style bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 20

$(STAMP): setup.py pyproject.toml lavis_kvmod.pth constraints.txt
	@echo "Setting up .venv (the first time this fetches torch and LAVIS, which takes minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(STAMP) ## train on scanned digits with and without KV modulation, and compare
	@$(BIN)/lavis-kvmod demo

test: $(STAMP) ## run the fast tests
	@$(BIN)/python -m pytest

test-full: $(STAMP) ## run all tests, the slow ones too
	@$(BIN)/python -m pytest -m ''

style: $(STAMP) ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# By path: LAVIS's wheel installs a package `benchmarks`, which `python -m` would find instead.
bench: $(STAMP) ## run the benchmarks
	@set -e; for script in $(wildcard benchmarks/bench_*.py); do echo "$$script"; $(BIN)/python "$$script"; done

clean: ## remove what builds and tests leave (.venv and output/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
