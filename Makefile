# Everything runs from here on a fresh machine with Python 3.11 and make.
#
#   make demo      set up, prepare the shipped data, train with privacy, compare
#   make test      set up and run the tests (under 15 minutes on 2 cores)
#   make test-all  the same with injected faults and long oracles
#   make mutants   plant defects in a copy of the code, one by one: does a test catch each?
#   make lint      formatting, lint, types
#   make docs      the documentation as a site, in build/site
#   make env       the set-up alone

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := build/docs-env
DOCS_NEEDS = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -c 1)
ifeq ($(HAS_GPU),)
# Without a CUDA device DeepSpeed must not look for one, and torch's CPU build saves gigabytes.
export DS_ACCELERATOR ?= cpu
INSTALL_TORCH = $(PIP) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null || \
	( echo "   no CPU build in pip's configured indexes: taking the default one, which is large" && \
	  $(PIP) 'torch==$(TORCH_VERSION)' )
else
INSTALL_TORCH = $(PIP) 'torch==$(TORCH_VERSION),!=$(TORCH_VERSION)+cpu'
endif
export HF_HUB_DISABLE_TELEMETRY ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: env demo test test-all mutants lint docs clean

env: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== installing torch $(TORCH_VERSION)$(if $(HAS_GPU),, for CPU)"
	@$(INSTALL_TORCH)
	@echo "== installing udp-ray and what it needs (a few minutes)"
	@$(PIP) --editable '.[test]'
	@touch $(READY)
	@echo "== ready"

demo: env
	@$(BIN)/python jobs/demo.py

test: env
	@echo "== tests (those marked slow run with make test-all)"
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: env
	@echo "== all tests, injected faults included"
	@$(BIN)/python -m pytest

mutants: env
	@echo "== planted defects"
	@$(BIN)/python -m tests.mutants.run --jobs 2

lint: env
	@echo "== lint, format, types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# An environment of its own: building the pages needs none of the project's packages.
docs:
	@echo "== documentation"
	@test -x $(DOCS)/bin/mkdocs || ( $(PYTHON) -m venv $(DOCS) && \
		$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS_NEEDS) )
	@$(DOCS)/bin/python docs/generate_tour.py
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "== build/site/index.html"

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
