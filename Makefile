# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
#   make demo    a real vision transformer on real images, pruned and merged: table and pictures in out/
#   make test    everything that runs without a GPU: the CPU kernels, and the CUDA kernels on the emulator
#   make check   the developer's loop: format, types, build with warnings as errors, fast tests
# A bare checkout is enough: the environment is made on first use and reuses a torch that is already there.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
# Ops use the stable ABI, so any torch from 2.10 on will do; the bound keeps a fresh environment to one known release.
TORCH  ?= torch>=2.10,<2.14
# Which GPUs a build in the checkout serves: sm_80 code runs on 80, 86 and 89; 90a is Hopper.
export TOKRED_CUDA_ARCH_LIST ?= 80;90a
export PIP_DISABLE_PIP_VERSION_CHECK = 1
torch_dir = $(shell $(BIN)/python -c "import os, torch; print(os.path.dirname(torch.__file__))")
sources = $(shell find csrc tests/simt third_party -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-cpu test-simt test-race check format lint cuda wheel clean env build

env: $(VENV)/.env
$(VENV)/.env: pyproject.toml
	@if $(PYTHON) -c "import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))" 2>/dev/null; \
	then echo "environment in $(VENV), with the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else echo "environment in $(VENV), with a torch of its own"; $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" "cmake>=3.22" ninja "pybind11>=2.13,<4" \
	  "pytest>=8" "pytest-xdist>=3" "hypothesis>=6" "numpy>=1.26" "scikit-learn>=1.5" "scikit-image>=0.24" "matplotlib>=3.9"
	@touch $@

# The package, installed in place. MAX_JOBS is capped by memory in setup.py.
build: $(VENV)/.build
$(VENV)/.build: $(VENV)/.env $(sources)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# The emulator's libraries; race finds unordered accesses too.
build/simt/libtokred_simt.so build/race/libtokred_simt.so: build/%/libtokred_simt.so: $(VENV)/.env $(sources)
	@$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DTOKRED_SIMT=ON -DTOKRED_WERROR=ON \
	  -DTOKRED_SANITIZE=$(if $(filter race,$*),race,) -DTOKRED_TORCH_DIR=$(torch_dir) > build/$*.log 2>&1 \
	  || { cat build/$*.log; exit 1; }
	$(BIN)/cmake --build build/$* -j $(JOBS)

test: test-cpu test-simt test-race
	@echo "all tests passed"
test-cpu: build
	$(BIN)/python -m pytest tests --ignore=tests/simt -n $(JOBS)
test-simt: build build/simt/libtokred_simt.so
	$(BIN)/python -m pytest tests/simt
	TOKRED_LIBRARY=$(abspath build/simt/libtokred_simt.so) TOKRED_SIMT_THREADS=1 \
	  $(BIN)/python -m pytest tests/score tests/select tests/compact tests/merge tests/attend tests/test_contract.py -n $(JOBS)
# Every kernel once under the race detector, which is too slow for every test.
test-race: build build/race/libtokred_simt.so
	TOKRED_LIBRARY=$(abspath build/race/libtokred_simt.so) TOKRED_SIMT_ADDR2LINE=0 \
	  $(BIN)/python -m pytest tests/test_contract.py -k "matches_reference" -n $(JOBS)

demo: build
	$(BIN)/python examples/demo.py --out out

$(VENV)/.dev: $(VENV)/.env
	$(BIN)/python -m pip install --quiet "clang-format==20.1.8" "mypy==1.18.2" "ruff==0.14.0"
	@touch $@
lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu')
	$(BIN)/mypy
format: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu')
check: format lint
	TOKRED_WERROR=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $(VENV)/.build
	$(BIN)/python -m pytest tests --ignore=tests/simt -n $(JOBS)

# What the CUDA build shows without a GPU: warnings are errors, registers and spills are reported.
cuda: $(VENV)/.env
	rm -f dist/*.whl
	TOKRED_CUDA=1 TOKRED_WERROR=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(BIN)/python benchmarks/ptxas.py build/py*/build.log
	@ls -l dist/*.whl
wheel: $(VENV)/.env
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist out $(VENV) tokred/*.so tokred/build_info.json
