# `make quickstart` and `make test` need python3 (3.11 or newer) and nothing else: the first of them builds .venv.
.DEFAULT_GOAL := help
.PHONY: help quickstart test docs lint format bench clean

PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := .venv/bin
INSTALLED := .venv/installed

help:
	@echo "make quickstart   train a tiny model, build a gradient store, find the training examples that matter"
	@echo "make test         lint, types and tests"
	@echo "make docs         build the documents into site/"
	@echo "make lint         ruff and mypy alone"
	@echo "make format       let ruff rewrite the files"
	@echo "make bench        measure speed and memory; results go to benchmarks/results/"
	@echo "make clean        remove .venv and the caches"

quickstart: $(INSTALLED)
	@$(BIN)/funcattrib quickstart

# One torch thread per pytest worker: on few cores that is faster than workers whose threads compete.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.build --size 14m --out build-14m
	$(BIN)/python -m benchmarks.build --size 70m --out build-70m
	$(BIN)/python -m benchmarks.query

clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache

# Built again only when the dependencies may have changed. Choose the interpreter with `make PYTHON=python3.12 …`.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; found=; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHONS); do \
			if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
			then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "error: expected Python 3.11 or newer with venv; found none: $(PYTHONS)." >&2; \
			echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
			exit 1; \
		fi; \
		echo "$$found -m venv .venv"; \
		$$found -m venv --clear .venv; \
	fi
	@echo "Installing the pinned versions into .venv (once, a minute or two)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev,docs]'
	@touch $@
