PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_INTEROP := $(VENV)-interop/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --constraint constraints-interop.txt
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow interop coverage lint format types imports doctest docs schema build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV)"

venv: $(VENV)/.installed  ## make .venv: the tested versions, and this package editable

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
	    { echo "error: $(PYTHON) is not there; name Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: pyro-bbits needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1);" \
	           "name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV) (minutes the first time: PyTorch is large)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: venv  ## train a small network on the digits data set; results in runs/demo
	$(BIN)/bbits train --data digits --output runs/demo --overwrite

test: lint types imports docs  ## every check: lint, types, imports, pages, tests, docstring examples
	$(PYTEST) --doctest-modules -m "not slow" pyro_bbits tests

test-slow: venv  ## the tests that train networks or draw many samples
	$(PYTEST) -m slow tests

interop: $(VENV)-interop/.installed  ## exported files in qonnx, hls4ml, OpenVINO and AIMET, in a venv of their own
	$(VENV)-interop/bin/pytest -m interop tests

$(VENV)-interop/.installed: pyproject.toml constraints.txt constraints-interop.txt
	@echo "Installing into $(VENV)-interop (minutes the first time)"
	@"$(PYTHON)" -m venv "$(VENV)-interop"
	@$(PIP_INTEROP) torch
	@$(PIP_INTEROP) --editable '.[deploy,test]'
	@$(PIP_INTEROP) qonnx hls4ml openvino bokeh jsonschema psutil tqdm
	@$(PIP_INTEROP) --no-deps aimet-onnx  # what it asks for is another PyTorch, for GPUs
	@touch $@

coverage: venv  ## the quick tests, with the lines they miss
	$(PYTEST) --doctest-modules -m "not slow" --cov --cov-report term-missing pyro_bbits tests

lint: venv  ## style and formatting, read only
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --quiet --check

format: venv  ## apply the fixes that lint asks for, where they are mechanical
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: venv  ## mypy, strict
	$(BIN)/mypy

imports: venv  ## the import direction between the rooms
	$(BIN)/lint-imports --no-logo

doctest: venv  ## the examples in docstrings
	$(PYTEST) --doctest-modules pyro_bbits tests/conftest.py

docs: venv  ## the documentation site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

schema: venv  ## docs/bits.schema.json, after a change of the bit configuration
	$(BIN)/python -c 'import json; from pyro_bbits import BitConfiguration; \
	    print(json.dumps(BitConfiguration.model_json_schema(mode="serialization"), indent=1))' > docs/bits.schema.json

build: venv  ## sdist and wheel in dist/
	rm -rf build dist
	$(BIN)/python -m build

clean:  ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist site htmlcov *.egg-info .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache \
	    .pytest_cache .ruff_cache
	find pyro_bbits models inference analysis benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
