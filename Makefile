# `make quickstart` and `make test` need python3 (3.11 or newer) and nothing else: the first of them builds .venv.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-isa docs lint format bench clean

PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := .venv/bin
INSTALLED := .venv/installed
# One torch thread per pytest worker: on few cores that is faster than workers whose threads compete. Files stay whole, so
# that what a file makes once is made on one worker; in their order, for the last take few tests and all cores.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

help:
	@echo "make quickstart   train a tiny model, build a gradient store, find the training examples that matter"
	@echo "make test         lint, types and tests, in a few minutes"
	@echo "make test-all     the same with the slow tests: several processes, kills, full disks, examples"
	@echo "make test-isa     the numerical tests under several instruction sets and thread counts"
	@echo "make docs         build the documents into site/"
	@echo "make lint         ruff and mypy alone"
	@echo "make format       let ruff rewrite the files"
	@echo "make bench        measure speed and memory; results go to benchmarks/results/"
	@echo "make clean        remove .venv and the caches"

quickstart: $(INSTALLED)
	@$(BIN)/funcattrib quickstart

# JAX compiles longer than its tests compute; what it optimises is left to `make test-all`.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1
test: $(INSTALLED)
	$(call tested,-m "not slow")

test-all: $(INSTALLED)
	$(call tested,)

# ruff, then pytest with mypy beside it, whose report comes last; what fails in any of them fails the target.
define tested
$(BIN)/ruff check .
$(BIN)/ruff format --check .
@report=$$(mktemp); trap 'rm -f "$$report"' EXIT; \
	$(BIN)/mypy >"$$report" 2>&1 & types=$$!; \
	echo '$(PYTEST) $(1)'; $(PYTEST) $(1); tests=$$?; \
	wait $$types; types=$$?; \
	echo '$(BIN)/mypy'; cat "$$report"; \
	exit $$((tests | types))
endef

# What an instruction set or a thread count could change: every sum and product. A processor without one takes its own.
NUMERICAL := tests/chain tests/jax tests/kernels tests/lift tests/losses tests/models tests/transforms tests/weights/test_stored.py
test-isa: $(INSTALLED)
	for threads in 1 2; do \
		for isa in "" "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2" \
			"ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2"; do \
			echo "threads: $$threads, instruction set: $${isa:-the processor's own}"; \
			env OMP_NUM_THREADS=$$threads $$isa $(BIN)/python -m pytest -q $(WORKERS) $(NUMERICAL) || exit 1; \
		done; \
	done

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
	@echo "Installing the pinned versions into .venv (once, some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev,docs]'
	@touch $@
