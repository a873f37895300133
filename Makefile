# Every target does its own set-up in $(VENV), created when it is absent and reused when present.
#
#   make test                  compile, and run the tests but the slow ones
#   make demo                  compile, and train on real data with torch's batch norm and this one
#   make demo-distributed      compile, and train on two processes with synchronised batch norm
#   make test VENV=            the same in the current environment: python3 and the torch it has
#   make test TORCH=torch==2.11.0 VENV=.venv-2.11        with another torch
#   make test WORKERS=1        in as many processes; as many as there are cores, but no more than 4
#   make test-torches          build and test it with every torch that is promised (slow)
#   make install-matrix        install it in every way that users do (slow)
#   make bench                 measure it beside torch
#   make docs                  the API reference as HTML, in build/docs
#   make mutants               whether the tests see CUDA kernels that were broken on purpose
#   make mutants-host          the same of the Python code, the operators and the CPU kernels
#   make test-ptx              the CUDA kernels' tests on the PTX that nvcc makes of them (slow)
#   make sanitize              the CPU kernels and operators under sanitizers (slow)
#   make other-machines        the CPU kernels on aarch64 and without AVX, emulated; with Clang (slow)
#   make gpu-check             what only a GPU can show
#
# pip's own variables (PIP_INDEX_URL ...) and the build's (BNORM_EXT_CUDA, MAX_JOBS, CXX ...) are
# passed on.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1
PYTEST_ARGS ?=
# A file stays in one process: what its tests compile is compiled once.
WORKERS ?= auto
PARALLEL := --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile
PTX_ARGS ?=
SANITIZE_ARGS ?=
OTHER_MACHINES_ARGS ?=
INSTALL_ARGS ?=

# On Linux torch's usual packages are CUDA builds. Beside an nvcc the CUDA kernels would then be
# compiled, which takes minutes and is of no use without a GPU (on WSL it is /dev/dxg).
# `cuda-build` compiles them all the same.
ifeq ($(wildcard /dev/nvidia[0-9]* /dev/dxg),)
BNORM_EXT_CUDA ?= 0
export BNORM_EXT_CUDA
endif

BUILD_TOOLS := "setuptools>=77" ninja
CXX_FILES = $(shell find csrc cuda_emulator tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
CLANG_FORMAT := clang-format
STAMPS := build/current-environment
# What the current environment contains may have changed since: look every time.
AGAIN := FORCE
else
PY := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
STAMPS := $(VENV)/stamps
AGAIN :=
endif

.PHONY: sanitize other-machines test test-all test-ptx test-install test-torches install-matrix demo demo-distributed build lint format cuda-build gpu-check mutants mutants-host bench docs clean FORCE
.DELETE_ON_ERROR:

test: build
	$(PY) -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-all: export BNORM_EXT_EXAMPLES ?= 20000
test-all: build mutants mutants-host
	$(PY) -m pytest $(PYTEST_ARGS)

# Whether the tests see CUDA kernels that were broken on purpose (docs/kernels.md).
mutants: build
	$(PY) tests/mutants/run.py

# The same of the Python code, the operators and the CPU kernels (CONTRIBUTING.md).
mutants-host: build
	$(PY) tests/mutants/host/run.py

# PTX_ARGS="--archs 80" for one architecture; says why where there is no nvcc.
test-ptx: build
	$(PY) tests/ptx/run.py $(PTX_ARGS)

# The CPU extension under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (slow).
# SANITIZE_ARGS="address --isa avx2" for a part.
sanitize: build
	$(PY) .ci/sanitize.py $(SANITIZE_ARGS)

# OTHER_MACHINES_ARGS="aarch64 --without-torch" for a part; says what is missing on this machine.
other-machines: build
	$(PY) .ci/other_machines.py $(OTHER_MACHINES_ARGS)

# In each of the ways that users do, one environment for each (slow); INSTALL_ARGS="wheel spaces" for some.
install-matrix: $(if $(strip $(VENV)),$(STAMPS)/torch)
	$(PY) .ci/install_matrix.py $(INSTALL_ARGS)

# An sdist in a clean environment, and the messages that pip shows.
test-install: build
	$(PY) -m pytest -m slow tests/packaging/test_install.py $(PYTEST_ARGS)

# Environments of its own, one for each version; --help for single versions and other tests.
test-torches:
	$(PYTHON) .ci/torch_matrix.py

demo: build
	$(PY) demo/digits.py

demo-distributed: build
	$(PY) demo/distributed.py

# Compiles what has changed, so that tests never see an old binary; seconds when nothing has. The
# extra `test` contains `demo`, whose program is tested too.
build: $(STAMPS)/extra-test
	$(PY) setup.py --quiet build_ext --inplace

lint: $(STAMPS)/extra-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: $(STAMPS)/extra-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

# A CUDA build of torch beside nvcc: says what registers and shared memory each kernel takes on two
# architectures, compiles the package for one, imports it and computes, GPU or not. Into a folder of
# its own, so that the copy which `make test` compiled stays as it is.
cuda-build: export TORCH_CUDA_ARCH_LIST ?= 9.0
cuda-build: $(STAMPS)/torch
	$(PY) .ci/check_kernels.py
	rm -rf build/cuda
	BNORM_EXT_CUDA=1 $(PY) -m pip install --verbose --no-build-isolation --no-deps --target build/cuda .
	PYTHONPATH=$(CURDIR)/build/cuda $(PY) .ci/check_install.py build/cuda

# The microbenchmarks; `python -m bench --help` for all that they can do.
bench: build $(STAMPS)/extra-bench
	$(PY) -m bench

# Generated from the docstrings; open build/docs/index.html.
docs: build $(STAMPS)/extra-docs
	$(PY) .ci/api_reference.py build/docs

# On a machine with a GPU; VENV= for the current environment, which needs no network then. The script
# installs the package, so that it is compiled once, for the GPU that is there.
gpu-check: $(if $(strip $(VENV)),$(STAMPS)/torch)
	$(PY) .ci/gpu_check.py $(if $(strip $(VENV)),--install)

clean:
	rm -rf build dist *.egg-info bnorm_ext/_build.py bnorm_ext/_C.*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------------------

define NO_VENV
$(PYTHON) cannot create virtual environments: its ensurepip module is missing. Debian and Ubuntu: \
apt install python3-venv. Or use the current environment: make test VENV=
endef

$(VENV)/bin/python:
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { echo "$(NO_VENV)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch and the build tools; again when TORCH names another one. The file changes only then, so
# that what depends on it stays valid. The current environment keeps the torch that it has.
$(STAMPS)/torch: FORCE $(if $(strip $(VENV)),| $(VENV)/bin/python)
	@mkdir -p $(STAMPS)
ifeq ($(strip $(VENV)),)
	@$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install "$(TORCH)"
	@$(PY) -m pip install --quiet $(BUILD_TOOLS)
	@test -e $@ || touch $@
else
	@test "$$(cat $@ 2>/dev/null)" = "$(TORCH)" || { \
	    $(PY) -m pip install "$(TORCH)" $(BUILD_TOOLS) && echo "$(TORCH)" > $@; }
endif

# bnorm_ext itself, editable, with the packages of one extra.
$(STAMPS)/extra-%: $(STAMPS)/torch pyproject.toml setup.py build_cuda.py build_support.py $(AGAIN)
	$(PY) -m pip install --no-build-isolation -e ".[$*]"
	@touch $@

FORCE:
