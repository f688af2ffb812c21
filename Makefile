# Two commands, each complete on a machine with Python 3.11+ and make:
#   make train   environment, installation, and a Fixed Point Diffusion Model trained on handwritten digits
#   make test    environment, installation, linters, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits

.PHONY: train test lint bench clean

train: $(VENV)/.installed-train
	$(BIN)/python -m apps.diffusion.train --out $(RUN)

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-train: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[diffusion]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[diffusion,bench,dev]'
	touch $@ $(VENV)/.installed-train

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
