# make demo      trains recipe tiny on 4 CPU processes        make lint      style, types, direction of imports
# make test      lint, then every quick test                  make test-gpu  the tests that need a GPU
# make test-faults  injects every fault of docs/reference/faults.md, the slow ones too, and writes that page
# Each builds .venv first (about 3 minutes, once) and again only when pyproject.toml changes.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
            $(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
TORCH ?= torch==2.13.0
# Where pip also looks for torch. PyPI's build for Linux brings gigabytes of CUDA; without a GPU, this spares them:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
READY := $(VENV)/ready
BIN := $(CURDIR)/$(VENV)/bin
# Whatever DeepSpeed or torch compiles stays inside the environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.DEFAULT_GOAL := demo
.PHONY: demo test test-gpu test-faults lint

demo: $(READY)
	$(BIN)/weft train recipe=tiny run.name=demo-$$(date +%Y%m%d-%H%M%S)

test test-gpu test-faults: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n logical --maxprocesses 4 --dist worksteal

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

test-faults: $(READY)
	$(BIN)/python -m pytest tests/faults --faults-table docs/reference/faults.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "weft needs Python 3.11 or newer, and found none (python3 is `python3 --version 2>&1`)."; \
	  echo "On Debian or Ubuntu: apt-get install python3.11 python3.11-venv; or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "weft needs venv and ensurepip, which $(PYTHON) lacks."; \
	  echo "On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v g++ >/dev/null || { echo "weft needs g++, which is not on the PATH."; \
	  echo "On Debian or Ubuntu: apt-get install g++"; exit 1; }
	@echo "Making $(VENV) for pyproject.toml: about 3 minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" --editable '.[test]'
	@touch $@
