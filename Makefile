PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Threads that wait for each other sleep: on a machine that does anything else, spinning ones starve each other.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help: ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/demo ## from nothing to a report: distill a student on digits and measure it here
	$(BIN)/edgekd run digits --target local

test: $(VENV)/dev ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/dev ## ruff, mypy, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

bench: $(VENV)/dev ## the speed of edgekd itself, against its peers
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/lma_step.py
	$(BIN)/python benchmarks/lma_onnx.py
	$(BIN)/python benchmarks/agent_overhead.py
	$(BIN)/python benchmarks/ptq.py
	$(BIN)/python benchmarks/trt_check.py

clean: ## remove the environment, caches and build products; results in .edgekd stay
	rm -rf $(VENV) .venv-3.8 build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[train]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/demo
