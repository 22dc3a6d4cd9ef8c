# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Builds of selftest.cu: plain and race on the emulator, cuda by nvcc where torch sees a GPU."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE = HERE / "selftest" / "selftest.cu"
CXX = os.environ.get("CXX", "g++")
INCLUDES = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-DTOKRED_SIMT"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE / 'include'}", *INCLUDES),
]
LIBRARIES = ("libasan", "libstdc++")  # to preload; the second for exceptions
BUILDS = ["plain", "race", *(["cuda"] if torch.cuda.is_available() else [])]


class Selftest:
    """One build of selftest.cu; ``run`` returns the error's text, or None."""

    def __init__(self, kind, path):
        self.kind = kind
        # Of sums in a tensor core, relative to the sum of the magnitudes: the emulator rounds once, the hardware cuts
        # each of up to 16 terms to the bits of the largest.
        self.rounding = 2.0**-18 if kind == "cuda" else 2.0**-23
        self.lib = ctypes.CDLL(str(path))
        pointer = ctypes.c_void_p
        self.lib.selftest_run.argtypes = [ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_int]
        self.lib.selftest_error.restype = ctypes.c_char_p
        self.lib.selftest_names.restype = ctypes.c_char_p
        self.names = set(self.lib.selftest_names().decode().split())

    def run(self, name, a=None, b=None, out=None, n=0):
        given = [a, b, out]
        tensors = [t.cuda() if t is not None and self.kind == "cuda" else t for t in given]
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        error = self.lib.selftest_run(name.encode(), *addresses, n)
        assert error >= 0, f"selftest.cu has no {name}"
        for mine, theirs in zip(tensors, given, strict=True):
            if mine is not theirs:
                theirs.copy_(mine)  # waits for the kernel
        return self.lib.selftest_error(error).decode() if error else None


@pytest.fixture(scope="session")
def nvcc():
    """Return what compiles the right kernels of selftest.cu for a compute capability into a library."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", shutil.which("nvcc")]
    found = next((place for place in places if place and Path(place).exists()), None)
    if not found:
        pytest.skip("nvcc is not installed")  # `.ci/run` fails without it
    options = ["-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr", "-cudart", "static"]

    def compile_for(capability, target):
        strict = "-Werror=all-warnings"
        command = [found, *options, strict, f"-arch=sm_{capability}", *INCLUDES, str(SOURCE), "-o", str(target)]
        subprocess.run(command, check=True)

    return compile_for


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The emulator's builds, plain and race, made side by side."""
    folder = tmp_path_factory.mktemp("simt")
    jobs = [[CXX, *FLAGS, "-c", str(f), "-o", str(folder / f"{f.stem}.o")] for f in sorted(HERE.glob("*.cpp"))]
    parts = [job[-1] for job in jobs]
    for build, flags in (("plain", []), ("race", ["-fsanitize=thread", "-fsanitize=bounds-strict"])):
        jobs.append([CXX, *FLAGS, *flags, "-x", "c++", "-c", str(SOURCE), "-o", str(folder / f"selftest_{build}.o")])
    running = [subprocess.Popen(job) for job in jobs]
    assert [process.wait() for process in running] == [0] * len(jobs)
    for build in ("plain", "race"):
        inputs = [str(folder / f"selftest_{build}.o"), *parts]
        subprocess.run([CXX, "-shared", *inputs, "-o", str(folder / f"{build}.so"), "-ldl", "-lpthread"], check=True)
    return {build: Selftest(build, folder / f"{build}.so") for build in ("plain", "race")}


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """Run kernels, one after the other, in a process of their own with the address build; returns what it says."""
    library = tmp_path_factory.mktemp("simt") / "address.so"
    flags = [*FLAGS, "-O1", "-fsanitize=address", "-DTOKRED_SANITIZE"]
    sources = [*sorted(HERE.glob("*.cpp")), SOURCE]
    jobs = [[CXX, *flags, "-x", "c++", "-c", str(f), "-o", str(library.with_name(f"{f.stem}.o"))] for f in sources]
    running = [subprocess.Popen(job) for job in jobs]
    assert [process.wait() for process in running] == [0] * len(jobs)
    objects = [job[-1] for job in jobs]
    subprocess.run(
        [CXX, "-shared", "-fsanitize=address", *objects, "-o", str(library), "-ldl", "-lpthread"], check=True
    )
    preload = [subprocess.check_output([CXX, f"-print-file-name={lib}.so"], text=True).strip() for lib in LIBRARIES]
    script = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.selftest_run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
libc = ctypes.CDLL(None)  # of Python's own memory the sanitizer knows nothing
libc.calloc.restype = ctypes.c_void_p
a, out = libc.calloc(4096, 4), libc.calloc(4096, 4)
for name in sys.argv[2:]:
    print(name, lib.selftest_run(name.encode(), a, None, out, 4096), flush=True)
"""

    def run(*names):
        env = os.environ | {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
        command = [sys.executable, "-c", script, str(library), *names]
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    return run


@pytest.fixture(scope="session")
def on_gpu(nvcc, tmp_path_factory):
    target = tmp_path_factory.mktemp("gpu") / "cuda.so"
    nvcc("".join(map(str, torch.cuda.get_device_capability())), target)
    return Selftest("cuda", target)


@pytest.fixture(params=BUILDS)
def build(request):
    """Every build, for kernels that are right."""
    if request.param == "cuda":
        return request.getfixturevalue("on_gpu")
    return request.getfixturevalue("emulated")[request.param]


@pytest.fixture(params=range(3))
def seed(request, monkeypatch):
    monkeypatch.setenv("TOKRED_SIMT_SEED", str(request.param))
    return request.param
