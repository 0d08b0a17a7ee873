# Every target makes its own virtual environment first; nothing but python3 (3.11 or
# newer) and make is needed. PYTHON=python3.12 make test uses another interpreter, in an
# environment of its own.

PYTHON ?= python3
VENV ?= .venv$(if $(filter python3,$(PYTHON)),,-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python
WORKERS ?= 2
PYTEST := $(RUN) -m pytest -n $(WORKERS)

# What is installed here runs on the CPU. The tests install the TPU's compiler as well, and
# without this JAX would look for a TPU.
export JAX_PLATFORMS ?= cpu

.PHONY: help setup demo test test-slow test-all test-gpu-aot gpu-aot lint bench docs
.PHONY: test-peers peers check-python
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: setup-dev ## the environment for development
	@echo "ready: $(VENV)"

demo: setup-models ## questions to the embedded model, answered through the paged cache
	@$(RUN) -m scripts.demo

# Most of their time goes to compiling, a third of that to making code fast which runs once.
QUICKLY := XLA_FLAGS="--xla_backend_optimization_level=0 \
  --xla_llvm_disable_expensive_passes=true $$XLA_FLAGS"

test: setup-test ## the tests, without the slow ones
	$(QUICKLY) $(PYTEST) -m "not slow and not gpu_aot and not peers"

test-slow: setup-test ## only the slow tests
	$(PYTEST) -m slow

test-all: setup-test ## every test
	$(PYTEST) -m "not gpu_aot and not peers"

# JAX's CUDA plugin of the version that the budgets are of is not made for older Pythons,
# and what another version compiles to is not compared with them.
test-gpu-aot: ## compile the GPU kernels, without a GPU (needs Python 3.12)
	@for python in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python3.12; do \
	  if "$$python" -c '' 2>/dev/null; then \
	    exec $(MAKE) --no-print-directory gpu-aot PYTHON="$$python" VENV=.venv-gpu; fi; \
	done; \
	echo "Python 3.12 is needed: there is no python3.12 in PATH or ~/.pyenv/versions" >&2; \
	exit 1

gpu-aot: setup-gpu-aot
	$(PYTEST) -m gpu_aot tests/gpu

test-peers: ## compare with transformers, which is installed for it
	@$(MAKE) --no-print-directory peers VENV=.venv-peers

peers: setup-peers
	$(PYTEST) -m peers tests/peers

lint: setup-dev ## formatting, style and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: setup-bench ## measure speed on this CPU, beside the peers that can be installed
	$(RUN) -m scripts.bench --install-peers

# The variable silences Material's advertisement of a successor of MkDocs.
docs: setup-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

setup-%: check-python
	@"$(PYTHON)" scripts/_venv.py "$(VENV)" $*

# In shell, since a Python too old to use is one it must be able to describe.
check-python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$("$(PYTHON)" --version 2>&1 | head -n 1) || true; \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) says: $${found:-nothing}" >&2; \
	  for python in python3.14 python3.13 python3.12 python3.11 \
	      "$$HOME"/.pyenv/versions/3.1[1-9]*/bin/python3; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then echo "  this one would do: PYTHON=$$python make $(MAKECMDGOALS)" >&2; fi; \
	  done; exit 1; }
