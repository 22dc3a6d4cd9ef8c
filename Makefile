# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
#   make demo    a real vision transformer on real images, pruned and merged: table and pictures in out/
#   make test    everything that runs without a GPU: the CPU kernels, and the CUDA kernels on the emulator
#   make check   the developer's loop: format, types, build with warnings as errors, fast tests
#   make test-all  make test, the sanitizers, the C++ tests and the CUDA build: all that shows without a GPU
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
python_tag = $(shell $(BIN)/python -c "import sys; print('%d%d' % sys.version_info[:2])")
families = $(wildcard $(patsubst csrc/%,tests/%,$(wildcard csrc/*)))
# The emulator's order of threads: another one in each run. A failure names it; make test TOKRED_SIMT_SEED=... repeats it.
ifndef TOKRED_SIMT_SEED
TOKRED_SIMT_SEED := $(shell date +%s)
endif
export TOKRED_SIMT_SEED
sources = $(shell find csrc tests/simt third_party -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-all test-cpp test-asan test-cpu test-simt test-race check format lint cuda ptxas wheel clean env build

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

# The emulator, and the CPU kernels, for the sanitizers; race finds unordered accesses too.
build/race/%: sanitize = race
build/asan/% build/asan-simt/%: sanitize = address,undefined
build/simt/libtokred_simt.so build/race/libtokred_simt.so build/asan-simt/libtokred_simt.so build/asan/libtokred.so: \
  $(VENV)/.env $(sources)
	@$(BIN)/cmake -S . -B $(@D) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DTOKRED_WERROR=ON \
	  -DTOKRED_SIMT=$(if $(findstring simt,$(@F)),ON,OFF) -DTOKRED_SANITIZE=$(sanitize) -DTOKRED_TORCH_DIR=$(torch_dir) \
	  > $(@D).log 2>&1 || { cat $(@D).log; exit 1; }
	$(BIN)/cmake --build $(@D) -j $(JOBS)

test: test-cpu test-simt test-race
	@echo "all tests passed"
test-cpu: build
	$(BIN)/python -m pytest tests --ignore=tests/simt -n $(JOBS)
test-simt: build build/simt/libtokred_simt.so
	$(BIN)/python -m pytest tests/simt
	TOKRED_LIBRARY=$(abspath build/simt/libtokred_simt.so) TOKRED_SIMT_THREADS=1 \
	  $(BIN)/python -m pytest $(families) tests/test_contract.py tests/test_cuda.py -n $(JOBS)
# The same tests under the race detector: half as much again as the plain build takes.
test-race: build build/race/libtokred_simt.so
	TOKRED_LIBRARY=$(abspath build/race/libtokred_simt.so) TOKRED_SIMT_ADDR2LINE=0 \
	  $(BIN)/python -m pytest $(families) -n $(JOBS)

# The kernels without torch: the CPU ones under valgrind, the CUDA ones on the emulator. Then what benchmarks/gpu_check.sh
# does on a GPU, rehearsed.
build/cpp-cpu/tokred_cpp_tests build/cpp-simt/tokred_cpp_tests: build/cpp-%/tokred_cpp_tests: $(VENV)/.env $(sources) $(shell find tests/cpp -type f)
	@mkdir -p build
	@$(BIN)/cmake -S . -B build/cpp-$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DTOKRED_CPP_TESTS=ON \
	  -DTOKRED_SIMT=$(if $(filter simt,$*),ON,OFF) -DTOKRED_WERROR=ON -DTOKRED_TORCH_DIR=$(torch_dir) > build/cpp-$*.log 2>&1 \
	  || { cat build/cpp-$*.log; exit 1; }
	$(BIN)/cmake --build build/cpp-$* -j $(JOBS) --target tokred_cpp_tests
	@touch $@
test-cpp: build build/cpp-cpu/tokred_cpp_tests build/cpp-simt/tokred_cpp_tests
	@command -v valgrind > /dev/null || { echo "test-cpp: valgrind is not installed"; exit 1; }
	valgrind -q --error-exitcode=9 --leak-check=full build/cpp-cpu/tokred_cpp_tests
	build/cpp-simt/tokred_cpp_tests
	PYTHON=$(abspath $(BIN))/python benchmarks/gpu_check.sh --rehearse --out build/rehearsal
# Each op's tests where an access out of bounds or undefined behaviour ends the process; the report names the line.
# What compiles would compile the sanitizers' libraries into the compiler, too.
test-asan: build/asan/libtokred.so build/asan-simt/libtokred_simt.so
	for library in $(filter %.so,$(abspath $^)); do \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" TOKRED_LIBRARY=$$library \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TOKRED_SIMT_THREADS=1 \
	  $(BIN)/python -m pytest $(families) tests/test_contract.py tests/test_sanitizers.py \
	  -k "not compil and not export and not opcheck" -n $(JOBS) || exit 1; done
test-all: test test-asan test-cpp ptxas
	@echo "all that can be shown without a GPU passed"

demo: build
	$(BIN)/python examples/demo.py --out out

$(VENV)/.dev: $(VENV)/.env
	$(BIN)/python -m pip install --quiet "clang-format==20.1.8" "mypy==1.18.2" "ruff==0.14.0"
	@touch $@
lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
	$(BIN)/mypy
format: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
check: format lint
	TOKRED_WERROR=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $(VENV)/.build
	$(BIN)/python -m pytest tests --ignore=tests/simt -n $(JOBS)

# What the CUDA build shows without a GPU: warnings are errors; registers, spills and size are held against what is stored
# (UPDATE=1 stores them anew).
cuda ptxas: $(VENV)/.env
	rm -f dist/*.whl
	TOKRED_CUDA=1 TOKRED_WERROR=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(BIN)/python benchmarks/ptxas.py build/py$(python_tag)/build.log dist/*.whl $(if $(UPDATE),--update)
wheel: $(VENV)/.env
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist out $(VENV) tokred/*.so tokred/build_info.json
