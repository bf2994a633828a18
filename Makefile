# `make` lists the targets. Nothing has to be installed by hand: each target installs what it needs.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
# auto: CUDA where there is an NVIDIA GPU, else CPU. Or name one: BUILD=cpu, BUILD=cuda.
BUILD ?= auto

BIN := .venv/bin
INSTALL = @$(PYTHON) scripts/install.py --build $(BUILD)

.DEFAULT_GOAL := help
.PHONY: help install install-dev serve test check format bench quality storm kernel-faults train-mini \
	gpu-test gpu-bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

install: ## make .venv with ouro-serve in it; does nothing if it is up to date
	$(INSTALL)

install-dev:
	$(INSTALL) --dev

serve: install ## serve the shipped checkpoint, or MODEL=folder, on HOST=127.0.0.1 PORT=8000; ARGS=options
	$(BIN)/ouro-serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: install-dev ## install and run every test; ARGS= goes to pytest
	$(BIN)/python scripts/run_tests.py $(ARGS)

check: install-dev ## format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_imports.py

format: install-dev ## format the code and mend what the linter can
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

bench: install-dev ## measure against a model that always runs every loop; writes benchmarks/results
	$(BIN)/python -m benchmarks.decode $(ARGS)

quality: install-dev ## measure answers against loops on the shipped checkpoint
	$(BIN)/python -m benchmarks.quality $(ARGS)

storm: install-dev ## hostile requests, leaving clients, crowds, a killed engine, a soak; ARGS="--soak MINUTES"
	$(BIN)/python -m benchmarks.storm $(ARGS)

kernel-faults: install-dev ## check the kernels' tests: each known fault must make them fail
	$(BIN)/python scripts/check_kernel_faults.py

train-mini: install-dev ## train the shipped checkpoint again, in two legs; ARGS=--resume goes on after a kill
	$(BIN)/python -m ouro_runtime.training --out runs/first $(ARGS)
	$(BIN)/python -m ouro_runtime.training --out runs/ouro-mini --init runs/first/export --steps 5000 $(ARGS)

gpu-test: install-dev ## on an NVIDIA GPU: kernels compiled, engines on golden data; under 9 minutes
	$(BIN)/python -m scripts.run_gpu_tests $(ARGS)

gpu-bench: install-dev ## on an NVIDIA GPU: golden tokens, decode speed, kernels; under 9 minutes
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## remove .venv and what tools left behind
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
