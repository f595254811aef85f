# `make` lists the targets. Each creates .venv where there is none and installs what it lacks, once.

PYTHON ?= python3
# Keywords for pytest, for example: make test ARGS="-k transpose"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Tests run one process a core, and the demo's matrices are too small to share: one BLAS thread each.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-exhaustive test-gpu sanitize lint test-keras test-bridges bench-cpu bench-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.has-base  ## watch a Conv1D network learn from a smartwatch's sensors, under a minute
	@$(ONE_THREAD) $(BIN)/cuconv demo

test: $(VENV)/.has-test  ## run the tests that need no GPU and no Keras
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal -m "not keras and not bridges and not gpu and not exhaustive" $(ARGS)

test-exhaustive: $(VENV)/.has-test  ## run every kernel, tile and edge on the processor, 25 minutes at most
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal -m "exhaustive and not gpu" $(ARGS)

test-gpu:  ## run the kernels on the GPU at hand; needs CuPy and pytest in PYTHON
	$(PYTHON) -m pytest -m gpu -W default $(ARGS)

sanitize:  ## run the quick parity list under compute-sanitizer's four tools; needs a GPU
	tests/sanitize.sh $(PYTHON)

lint: $(VENV)/.has-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-keras: $(VENV)/.has-keras-test  ## compare every layer with a live Keras 3 on torch
	KERAS_BACKEND=torch $(BIN)/python -c "import keras, torch; print('Keras', keras.__version__, 'on torch', torch.__version__)"
	KERAS_BACKEND=torch $(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal -m keras $(ARGS)

test-bridges: $(VENV)/.has-bridges-test  ## run torch, Keras, Dask and sigpy on our functions
	KERAS_BACKEND=torch $(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal -m "bridges and not gpu" $(ARGS)

bench-cpu: $(VENV)/.has-bench  ## time the NumPy path against torch and onnxruntime, one thread
	$(ONE_THREAD) $(BIN)/python -m benchmarks.cpu $(ARGS)

bench-gpu:  ## everything a short stay on a GPU should measure, in 8 minutes; ARGS names groups, or --dry-run
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.has-base: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.has-test $(VENV)/.has-dev: $(VENV)/.has-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(VENV)/.has-keras-test $(VENV)/.has-bridges-test $(VENV)/.has-bench: $(VENV)/.has-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

# A failed `venv` leaves half a folder behind, so it is removed before the next way is tried.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'cuconv needs Python 3.10 or newer. Name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || { rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) 2>/dev/null; } \
	  || { rm -rf $(VENV); uv venv --quiet --seed --python $(PYTHON) $(VENV) 2>/dev/null; } \
	  || { rm -rf $(VENV); echo 'This Python cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
