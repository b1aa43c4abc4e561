# Every target sets up `.venv` by itself when it needs to; `make` alone lists the targets.
# Python 3.8 to 3.11, for example: make demo PYTHON=python3.11

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-gpu style map reference docs screenshots bench bench-hf bench-gpu bench-tables clean full-size memory parity

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 20

$(STAMP): setup.py pyproject.toml lavis_kvmod.pth constraints.txt
	@echo "Setting up .venv (the first time this fetches torch and LAVIS, which takes minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(STAMP) ## train on scanned digits with and without KV modulation, and compare
	@$(BIN)/lavis-kvmod demo

# A process for each CPU, up to 4 (each holds LAVIS and torch); the tests of a file stay together.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(STAMP) ## run the fast tests
	@$(PYTEST)

# What is done to runs on purpose is timed and counted: without others beside it.
test-full: $(STAMP) ## run all tests, the slow ones and the faults too (writes output/faults.json)
	@status=0; $(PYTEST) -m '' --ignore=tests/faults || status=1; \
	$(BIN)/python -m pytest -m '' tests/faults || status=1; exit $$status

# Each test is a process of its own, and they share one GPU: one after the other.
test-gpu: $(STAMP) ## run what needs a GPU
	@LAVIS_KVMOD_TEST_DEVICE=cuda $(BIN)/python -m pytest -m gpu tests/gpu

style: $(STAMP) ## check style, formatting, types, and that imports run downwards
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

map: $(STAMP) ## write the lists of rooms in README.md and docs/architecture.md anew
	@$(BIN)/python docs/map.py

reference: $(STAMP) ## write docs/commands.md, docs/api.md and the tables of docs/settings.md anew, from the code
	@$(BIN)/python -W ignore docs/reference.py
	@$(BIN)/lavis-kvmod settings --write docs/settings.md

# The variable spares readers of the log an advertisement of mkdocs-material's.
docs: $(STAMP) ## build the documentation as a site (site/index.html), without a warning, all links checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo site/index.html

# Of the newest `make demo`, in a real Chromium.
screenshots: $(STAMP) ## make the pictures of docs/app.md anew (after `make demo`; Chromium and its driver)
	@LAVIS_KVMOD_SCREENSHOTS=$$(ls output/demo/with_prefix/*/checkpoint_best.pth | tail -n 1) \
	$(BIN)/python -m pytest -m slow tests/commands/test_app.py

# By path: LAVIS's wheel installs a package `benchmarks`, which `python -m` would find instead.
# Options go in ARGS, for example: make bench ARGS='--rows caption_step --keep'
bench: $(STAMP) ## measure speed and memory against stock LAVIS (11 minutes on two cores), and what an interpreter's start costs
	@$(BIN)/python benchmarks/bench_startup.py
	@$(BIN)/python -W ignore benchmarks/bench_speed.py $(ARGS)
	@$(BIN)/python benchmarks/speed_tables.py

bench-gpu: $(STAMP) ## the same at full size on a GPU, if there is one
	@$(BIN)/python -W ignore benchmarks/bench_speed.py --device cuda $(ARGS)
	@$(BIN)/python benchmarks/speed_tables.py

bench-tables: $(STAMP) ## write the tables of docs/performance.md anew, from benchmarks/results/
	@$(BIN)/python benchmarks/speed_tables.py

full-size: $(STAMP) ## the 3.8-billion-parameter model on the CPU: memory and speed (8 GB of disk, 24 GB of memory)
	@$(BIN)/python benchmarks/full_size.py

memory: $(STAMP) ## training memory of that model on the CPU, measured against computed (8 GB of disk, 14 GB of memory)
	@$(BIN)/python benchmarks/memory.py

# Hugging Face's BLIP-2 wants a newer transformers than LAVIS does. Remove .venv-parity to get its newest again.
PARITY_STAMP := .venv-parity/.installed

$(PARITY_STAMP): constraints.txt
	@echo "Setting up .venv-parity (the first time this fetches torch, which takes minutes)"
	@$(PYTHON) -m venv .venv-parity
	@.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check \
		$(shell grep '^torch==' constraints.txt) transformers safetensors
	@touch $@

bench-hf: $(STAMP) $(PARITY_STAMP) ## add Hugging Face's columns to what `make bench` measured (in an environment of its own)
	@$(BIN)/python -W ignore benchmarks/bench_speed.py --hf .venv-parity/bin/python $(ARGS)
	@$(BIN)/python benchmarks/speed_tables.py

parity: $(STAMP) $(PARITY_STAMP) ## compare BLIP-2 and connectors with Hugging Face's (in an environment of its own)
	@$(BIN)/python -W ignore benchmarks/parity_hf.py .venv-parity/bin/python
	@$(BIN)/python -W ignore benchmarks/parity_connectors.py .venv-parity/bin/python

clean: ## remove what builds and tests leave (.venv* and output/ stay)
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
