# The two commands of the README are `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-fast durations bench docs docs-setup torture fuzz sanitize avx512 aarch64 format lint clean cuda-setup test-cuda bench-cuda cuda-all cuda-check emulated op-tests mutants witness

# The native sources are part of the stamp: the extension is rebuilt when one changes.
SOURCES := $(shell find csrc tools -type f -not -name '*.pyc') CMakeLists.txt setup.py pyproject.toml

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.12"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

# The sources hold one compiled module at a time: that of the environment that was set up last.
setup: $(VENV)/.installed
	@$(BIN)/python -c "import pglcl_ext" 2>/dev/null || \
	  $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

demo: setup
	$(BIN)/pglcl demo --output build/demo

test: setup
	$(BIN)/python -m pytest --durations=15 --durations-min=5

test-fast: setup
	$(BIN)/python -m pytest -m "not slow" tests

# Measures which tests are slow: runs all of them, and writes the processor time of each.
durations: setup
	$(BIN)/python -m pytest --measure tests/durations.json

# Minutes in CI, hours by hand: MINUTES=120 SEED=1 make fuzz
MINUTES ?= 3
SEED ?= 0
fuzz: setup
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

sanitize: setup
	PYTHON="$(CURDIR)/$(BIN)/python" tools/sanitize.sh

# Tests the AVX-512 kernels on a processor without AVX-512.
avx512: setup
	PYTHON="$(CURDIR)/$(BIN)/python" tools/avx512.sh

# Compiles the module for aarch64, runs its kernels under qemu-user, and counts their instructions.
aarch64: setup
	PYTHON="$(CURDIR)/$(BIN)/python" tools/aarch64.sh

bench: setup
	$(BIN)/python -m benchmarks

# Kills, flipped bits and bad inputs, for half an hour. Writes the table of docs/reliability.md.
KILLS ?= 50
FLIPS ?= 200
torture: setup
	$(BIN)/python -W ignore -m tests.torture --kills $(KILLS) --flips $(FLIPS) --output docs/reliability.md

docs-setup: setup
	@$(BIN)/python -c "import sphinx, myst_parser, furo, latex2mathml" 2>/dev/null || \
	  $(BIN)/pip install --quiet --no-build-isolation --editable ".[docs]"

# A warning is an error, and so is a link that leads nowhere.
docs: docs-setup
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -c docs . build/site
	@echo "build/site/docs/index.html"

# Plants faults in the CUDA code: all of them, or MUTANTS of them, drawn with SEED.
mutants: setup
	$(BIN)/python -m tests.mutants --seed $(SEED) $(if $(MUTANTS),--draw $(MUTANTS))

# Runs all tests of the ops on emulated CUDA devices; `make test` runs a draw of them.
EMULATED ?= 75 80 86 90
OPS := semantic_disparity patch_statistics patch_contrast gaussian_contrast hard_negatives autograd
OP_TESTS := $(foreach op,$(OPS),$(wildcard tests/test_$(op).py tests/test_$(op)_*.py))
# What must pass wherever the ops are used: under another torch, and another Python.
op-tests:
	@echo $(OP_TESTS) tests/test_checks.py tests/test_embedding_queue.py
emulated: setup
	for device in $(EMULATED); do $(BIN)/python -m pytest --emulated $$device $(OP_TESTS) || exit 1; done

# Runs the CUDA code with threads under ThreadSanitizer, against plain loops.
witness: setup
	$(BIN)/python -m pytest tests/witness/witness_tests.py

# --- CUDA ---------------------------------------------------------------------------------------------------------------
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV := .venv-cuda

# A module without CUDA kernels also runs under this torch, so the one in the sources is built again if it has none.
cuda-setup:
	$(MAKE) setup VENV=$(CUDA_VENV) TORCH="$(CUDA_TORCH)"
	@$(CUDA_VENV)/bin/python -c "import pglcl_ext, sys; sys.exit(not pglcl_ext.build_info()['cuda_built'])" || \
	  PGLCL_CUDA=1 $(CUDA_VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .

# On a machine with a GPU: the tests that run on it, and the microbenchmarks.
test-cuda: cuda-setup
	$(CUDA_VENV)/bin/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || \
	  { echo "test-cuda: no GPU is visible to torch"; exit 1; }
	$(CUDA_VENV)/bin/python -m pytest -rA -k cuda | grep -E "^(PASSED|FAILED|ERROR)|passed|failed"

bench-cuda: cuda-setup
	$(CUDA_VENV)/bin/python -m benchmarks --device cuda --sizes 1024,4096,16384,65536

# Without a GPU: compile with nvcc, import, count registers. CUDA_ARCHS are those that CI has time for.
CUDA_ARCHS ?= 8.0;9.0+PTX
ALL_CUDA_ARCHS := 7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX

$(CUDA_VENV)/.torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet "$(CUDA_TORCH)" "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.12" numpy
	touch $@

# Installs into the environment. The module in the sources stays the one for CPUs.
cuda-check: $(CUDA_VENV)/.torch
	$(CUDA_VENV)/bin/pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	PATH="$(CURDIR)/$(CUDA_VENV)/bin:$$PATH" PGLCL_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" \
	  $(CUDA_VENV)/bin/pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd tools && ../$(CUDA_VENV)/bin/python check_cuda_build.py
	$(CUDA_VENV)/bin/python -m benchmarks.cuda_report --check \
	  --module $$(ls $(CUDA_VENV)/lib/python3*/site-packages/pglcl_ext/_C*.so) --output build/cuda_report.md --counts build/cuda_counts.json

cuda-all:
	$(MAKE) cuda-check CUDA_ARCHS="$(ALL_CUDA_ARCHS)"

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
	rm -rf build $(VENV) $(CUDA_VENV) *.egg-info
