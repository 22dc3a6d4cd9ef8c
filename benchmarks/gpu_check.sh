#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
# Everything that only a GPU can tell, in under ten minutes on an H200 with 16 cores: build, PTX wrappers, tests, benchmarks,
# compute-sanitizer. Needs torch with CUDA, setuptools (77 or newer), nvcc, cmake, ninja, pytest, hypothesis, pybind11; no
# network. pytest-xdist, where it is there, spreads the tests over processes.
#
#   benchmarks/gpu_check.sh [--wheel F] [--wheelhouse DIR] [--only STAGE[,STAGE]] [--out DIR] [--list] [--rehearse]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
