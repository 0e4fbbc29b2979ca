# `make venv` first installs everything into .venv; every other target does so by itself when it has to.

PYTHON ?= python3
BIN := .venv/bin
# Where tools may look for Python files: those of these folders that exist.
SOURCES := $(wildcard src tests bench docker)

.DEFAULT_GOAL := help
.PHONY: help venv docker-tools demo test lint types imports check format clean

help:
	@echo "make venv      install everything for development into .venv"
	@echo "make docker-tools  what the tests of docker/ look at it with"
	@echo "make demo      run the demo"
	@echo "make test      run the whole test suite"
	@echo "make lint      ruff: rules and format"
	@echo "make types     mypy, strict"
	@echo "make imports   the import contracts"
	@echo "make check     lint, types, imports and test"
	@echo "make format    let ruff format the code and fix what it safely can"
	@echo "make clean     remove caches and .venv"

venv: .venv/installed

# The stamp is written last: an install that was cut off is done again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "kvgds needs Python 3.11 or newer; '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Name another one, for example: make venv PYTHON=python3.12" >&2; \
		exit 1; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv; the first time takes a minute or two.'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt \
		--build-constraint constraints.txt --group dev --editable '.[demo]'
	@# On all cores, where pip takes one. Some packages bring files that are for another Python.
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@

docker-tools: venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement docker/tools.txt

demo: venv
	$(BIN)/kvgds demo

# On all cores, but for a large machine: each test may have servers and processes of its own.
test: venv
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: venv
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: venv
	$(BIN)/mypy

imports: venv
	$(BIN)/lint-imports --no-logo

check: lint types imports test

format: venv
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
