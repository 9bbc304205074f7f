# Every target sets up its own virtual environment first: only python3 (3.11 or newer) and make are needed.
#
#   make CONSTRAINTS= test            the newest versions instead of the tested ones
#   make WORKERS=8 test               more test processes
#   make speedrun ARGS="--seed 1"     flags for the command

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2
ENGINES     ?= .engines
ARGS        ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread a process: the test processes share the cores.
test test-all test-browser test-engines: export OMP_NUM_THREADS = 1
test test-all test-browser test-engines: export MKL_NUM_THREADS = 1
test test-all test-browser test-engines: export TOKENIZERS_PARALLELISM = false

.PHONY: setup speedrun test test-all test-browser test-engines lint format clean

speedrun: $(STAMP)
	$(BIN)/rollouts speedrun $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not engines" $(ARGS)

# The chat page in a headless Chromium, which root gets from Debian where it is missing.
test-browser: lint
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| { echo "chromium is missing: install it, or run this as root on Debian"; exit 1; }
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=-c %) -e '.[browser]'
	$(BIN)/python -m pytest -m browser tests/serving/browser $(ARGS)

# Real vLLM and SGLang servers on the CPU, each in a virtual environment of its own (7 GB in all, and minutes to install).
test-engines: lint $(ENGINES)/vllm/.installed $(ENGINES)/sglang/.installed
	ROLLOUTS_ENGINES=$(abspath $(ENGINES)) $(BIN)/python -m pytest -m engines tests/engines tests/providers $(ARGS)

# The wheel is a third party's: its hash is pinned. The CUDA builds that it asks for break its import, and vLLM tells its
# platform by the version of a distribution that is called vllm.
$(ENGINES)/vllm/.installed: tests/engines/vllm.txt tests/engines/vllm_wheel.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet --no-deps --require-hashes -r tests/engines/vllm_wheel.txt
	$(@D)/bin/pip install --quiet -r tests/engines/vllm.txt
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	site=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$site/vllm-0.32.0+cpu.dist-info/METADATA"
	$(@D)/bin/pip install --quiet --no-deps -e .
	@touch $@

# SGLang pins a CUDA build of torch: its dependencies are named in a file instead.
$(ENGINES)/sglang/.installed: tests/engines/sglang.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet torch==2.13.0 transformers==5.19.0
	$(@D)/bin/pip install --quiet --no-deps sglang==0.5.23
	$(@D)/bin/pip install --quiet -r tests/engines/sglang.txt
	@touch $@

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
