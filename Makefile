# make demo        a virtual environment, the package, and the bundled model completing a prompt
# make test        the same set-up, then the whole suite: on the CPU, then on Metal
# make test-metal  only the part about Metal: on a Mac its GPU, elsewhere the software device
# make test-cuda  only the part about CUDA, on an NVIDIA GPU
# make lint        ruff and mypy
# make bench       the benchmarks of docs/performance.md (long: see benchmarks/README.md)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PROMPT ?= def fibonacci(n):

.PHONY: demo test test-metal test-cuda lint bench clean

demo: $(VENV)/.installed
	$(BIN)/nitinol run demo "$(PROMPT)" --max-tokens 96

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not metal"
	$(BIN)/python -m pytest --device metal

test-metal: $(VENV)/.test
	$(BIN)/python -m pytest --device metal

test-cuda: $(VENV)/.cuda
	$(BIN)/python -m pytest --device cuda

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.cuda: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,cuda]'
	touch $@ $(VENV)/.test $(VENV)/.installed

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.test $(VENV)/.installed
