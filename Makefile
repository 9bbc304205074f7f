# Every target sets up its own virtual environment first: only python3 (3.11 or newer) and make are needed.
#
#   make CONSTRAINTS= test            the newest versions instead of the tested ones
#   make WORKERS=8 test               more test processes
#   make speedrun ARGS="--seed 1"     flags for the command

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2
ARGS        ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread a process: the test processes share the cores.
test test-all: export OMP_NUM_THREADS = 1
test test-all: export MKL_NUM_THREADS = 1
test test-all: export TOKENIZERS_PARALLELISM = false

.PHONY: setup speedrun test test-all lint format clean

speedrun: $(STAMP)
	$(BIN)/rollouts speedrun $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

# torch goes first and pinned: later packages then keep it instead of replacing it by a newer, larger build.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=-c %) torch
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=-c %) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
