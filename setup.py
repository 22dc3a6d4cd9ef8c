# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Finds torch and drives CMake; everything about the package is in pyproject.toml, about the build in CMakeLists.txt.

TOKRED_CUDA=auto|0|1    CUDA kernels if nvcc is there (auto), never, or fail without it
TOKRED_CUDA_ARCH_LIST   architectures, for example "80;90a"; else TORCH_CUDA_ARCH_LIST; else the default below
MAX_JOBS                parallel compile jobs; capped by the memory that is free
TOKRED_WERROR=1         warnings are errors
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = ["80", "90a", "100", "120"]
GIB_PER_JOB = 2.0  # nvcc with two architectures peaks near 1 GiB for these files


def say(text):
    print(f"tokred: {text}", file=sys.stderr, flush=True)


def find_nvcc():
    """Return the real nvcc (not a wrapper script beside no toolkit), or None."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    if found := shutil.which("nvcc"):
        if (Path(found).resolve().parent.parent / "include").exists() and Path(found).resolve().parent.name == "bin":
            with open(Path(found).resolve(), "rb") as file:
                if file.read(4) == b"\x7fELF":
                    return found
        if Path("/usr/local/cuda/bin/nvcc").exists():
            return "/usr/local/cuda/bin/nvcc"
        return found
    return "/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None


def cuda_archs(nvcc):
    """Return (CMake architecture list, the same as words, what was skipped)."""
    wanted = os.environ.get("TOKRED_CUDA_ARCH_LIST") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = [a for a in re.split(r"[;,\s]+", wanted) if a] if wanted else DEFAULT_ARCHS
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    archs, skipped = [], []
    for name in names:
        base = name.removesuffix("+PTX").removesuffix("-real").removesuffix("-virtual").replace(".", "")
        if re.sub(r"\D", "", base) not in known or int(re.sub(r"\D", "", base)) < 80:
            skipped.append(name)
            continue
        archs.append(f"{base}-real")
        if name.endswith("+PTX"):
            archs.append(f"{base}-virtual")
    if not wanted and archs:  # wheels carry PTX of the newest, for GPUs to come
        archs.append(archs[-1].replace("-real", "-virtual"))
    return archs, skipped


def max_jobs():
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        jobs = min(jobs, max(1, int(free / GIB_PER_JOB)))
    except (ValueError, OSError):
        pass
    return max(1, jobs)


def manylinux(libraries, platform):
    """Return the oldest manylinux tag whose glibc and libstdc++ have every symbol version that the libraries name.

    Nothing but torch's libtorch_cpu and the system's libraries is linked, so the symbol versions decide.
    """
    content = b"".join(Path(library).read_bytes() for library in libraries)
    newest = [
        max((int(found) for found in re.findall(pattern, content)), default=0)
        for pattern in (rb"GLIBC_2\.(\d+)", rb"GLIBCXX_3\.4\.(\d+)")
    ]
    for glibc, glibcxx in ((28, 24), (34, 29), (39, 33)):
        if newest[0] <= glibc and newest[1] <= glibcxx:
            return platform.replace("linux_", f"manylinux_2_{glibc}_")
    return platform


class CMakeBuild(build_ext):
    def run(self):
        import torch

        torch_dir = Path(torch.__file__).parent
        build = Path(
            os.environ.get("TOKRED_BUILD_DIR") or ROOT / "build" / f"py{sys.version_info[0]}{sys.version_info[1]}"
        )
        build.mkdir(parents=True, exist_ok=True)
        jobs = max_jobs()
        version = re.search(r'__version__ = "(.+)"', (ROOT / "tokred/_version.py").read_text()).group(1)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "TOKRED_TORCH_DIR": torch_dir,
            "TOKRED_VERSION": version,
            "TOKRED_WERROR": "ON" if os.environ.get("TOKRED_WERROR") == "1" else "OFF",
            "TOKRED_CUDA": "OFF",
            "TOKRED_NATIVE": "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        mode = os.environ.get("TOKRED_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"tokred: expected TOKRED_CUDA to be auto, 0 or 1, got {mode!r}")
        nvcc = None if mode == "0" else find_nvcc()
        archs, cuda_version = [], None
        if nvcc:
            printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            cuda_version = re.search(r"release ([\d.]+)", printed).group(1)
            archs, skipped = cuda_archs(nvcc)
            if skipped:
                say(f"skipped architectures {', '.join(skipped)}: below sm_80, or unknown to nvcc {cuda_version}")
            if not archs:
                raise SystemExit("tokred: no architecture is left to build for; see TOKRED_CUDA_ARCH_LIST")
            options |= {"TOKRED_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": ";".join(archs)}
            say(f"CUDA kernels by nvcc {cuda_version} for {', '.join(archs)}")
        elif mode == "1":
            raise SystemExit("tokred: TOKRED_CUDA=1, but no nvcc was found (PATH, CUDA_HOME, /usr/local/cuda)")
        else:
            say("CUDA kernels skipped: " + ("TOKRED_CUDA=0" if mode == "0" else "no nvcc was found"))
        try:
            import pybind11  # noqa: F401

            options["TOKRED_NATIVE"] = "ON"
        except ImportError:
            say("tokred._native skipped: pybind11 is not installed")
        say(f"{jobs} compile jobs, torch {torch.__version__}")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *defines], check=True)
        log = build / "build.log"
        with open(log, "a") as file:  # a later build that compiles nothing keeps what ptxas said
            done = subprocess.run(
                ["cmake", "--build", str(build), "-j", str(jobs), "--verbose"], stdout=file, stderr=subprocess.STDOUT
            )
        if done.returncode:
            sys.stderr.write("\n".join(log.read_text().splitlines()[-60:]) + "\n")
            raise SystemExit(f"tokred: the build failed, the whole log is {log}")

        target = (ROOT if self.inplace else Path(self.build_lib)) / "tokred"
        target.mkdir(parents=True, exist_ok=True)
        for old in [*target.glob("libtokred*.so"), *target.glob("_native*.so")]:
            old.unlink()
        for file in [build / "libtokred.so", *build.glob("_native*.so")]:
            if file.exists():
                shutil.copy2(file, target)
        info = {
            "version": version,
            "torch_target": "2.10",
            "torch_built_with": torch.__version__,
            "cuda": cuda_version,
            "cuda_archs": archs,
            "compiler": subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.split("\n")[0],
        }
        (target / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self):
        return []


class Wheel(bdist_wheel):
    """py3-none: no part of the library depends on the Python version; _native is an extra for the one that built it."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        _, _, platform = super().get_tag()
        libraries = list(Path(self.bdist_dir).glob("tokred/*.so")) if self.bdist_dir else []
        if platform == "linux_x86_64" and libraries:
            platform = manylinux(libraries, platform)
        return "py3", "none", platform


setup(ext_modules=[Extension("tokred.libtokred", [])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
