# The two commands of the README are `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test bench format lint clean test-cuda bench-cuda cuda-all cuda-check

# The native sources are part of the stamp: the extension is rebuilt when one changes.
SOURCES := $(shell find csrc tools -type f) CMakeLists.txt setup.py pyproject.toml

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.12"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks

# --- formatting ---------------------------------------------------------------------------------------------------------
NATIVE := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: setup
	$(BIN)/clang-format -i $(NATIVE)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build $(VENV) *.egg-info
