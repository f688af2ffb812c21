# Each target is complete on a machine with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal
# pip would compile every module, which takes a minute and a half: Python compiles and keeps those that are imported
export PYTHONDONTWRITEBYTECODE :=
PIP = $(BIN)/python -m pip install -q --no-compile -c constraints.txt

.PHONY: help train test fast slow lint docs wheel bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

train: $(VENV)/.installed-train ## environment, installation, and an FPDM trained on handwritten digits (6 minutes)
	$(BIN)/python -m apps.diffusion.train --out $(RUN)

test: $(VENV)/.installed-test ## environment, installation, linters, types and tests on all cores
	$(MAKE) -j 2 lint fast

fast: $(VENV)/.installed-test ## the tests of `make test`
	$(PYTEST) -m "not slow"

slow: $(VENV)/.installed-test ## the tests of more than ten seconds each that `make test` leaves out: tutorials, recipes at a small scale
	$(PYTEST) -m slow

lint: $(VENV)/.installed-test ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-test ## the documentation site, tutorials executed, in build/site; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs build/site

wheel: $(VENV)/.installed-test ## wheel and source distribution in dist/
	$(BIN)/python -m build

bench: $(VENV)/.installed-test ## benchmarks beside peers, with comparison tables
	$(BIN)/python -m pytest benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-train: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[diffusion]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[diffusion,bench,dev,docs]'
	touch $@ $(VENV)/.installed-train

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
