# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""One shareable page: what is installed, whether it fits, and each op tried against its reference."""

import ctypes
import importlib
import platform
import re
import sys
import time

import torch

import tokred
from tokred import _ext, _registry
from tokred.testing import assert_close

#: The oldest driver that runs binaries of a CUDA release, by its major version.
OLDEST_DRIVER = {"12": (525, "CUDA 12"), "13": (580, "CUDA 13")}


def driver_cuda_version() -> int | None:
    """Return the CUDA version that the driver speaks, 13000 for 13.0, or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def driver_release() -> str | None:
    """Return the release of the NVIDIA kernel driver, for example 580.65.06, or None."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", file.read())
    except OSError:
        return None
    return found.group(1) if found else None


def fits(capability: tuple[int, int], archs: list[str]) -> str | None:
    """Return None if a build for ``archs`` ("80-real", "90a-real", "120-virtual") runs on a GPU, else what to do."""
    wanted = 10 * capability[0] + capability[1]
    for arch in archs:
        name, kind = arch.split("-")
        number, exact = int(re.sub(r"\D", "", name)), not name.isdigit()
        same_major = number // 10 == capability[0]
        if kind == "real" and (number == wanted if exact else same_major and number <= wanted):
            return None
        if kind == "virtual" and number <= wanted:
            return None
    arch = f"{capability[0]}.{capability[1]}"
    return f'no kernel for sm_{wanted} in this build; rebuild from source with TOKRED_CUDA_ARCH_LIST="{arch}"'


def _gpu_report(build_cuda: str | None, archs: list[str]) -> tuple[list[str], list[str], bool]:
    """Return lines, problems, and whether ops can be tried on CUDA."""
    lines: list[str] = []
    problems: list[str] = []
    speaks, release = driver_cuda_version(), driver_release()
    if speaks is None:
        lines.append("driver        none: no NVIDIA driver on this machine")
        return lines, problems, False
    lines.append(f"driver        {release or 'unknown release'}, speaks CUDA {speaks // 1000}.{speaks % 1000 // 10}")
    if build_cuda is None:
        lines.append("build         has no CUDA kernels: install nvcc and rebuild with TOKRED_CUDA=1 to use the GPU")
        return lines, problems, False
    major = build_cuda.split(".")[0]
    if speaks // 1000 < int(major):
        oldest, name = OLDEST_DRIVER.get(major, (0, f"CUDA {major}"))
        problems.append(
            f"the kernels were built by CUDA {build_cuda} and need a driver that speaks {name} (release {oldest} or newer); "
            f"update the driver, or rebuild with an older nvcc"
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda
        lines.append(
            f"torch.cuda    not available: {'this torch has no CUDA' if built is None else 'no usable device'}"
        )
        return lines, problems, False
    usable = not problems
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        lines.append(f"gpu {i}         {torch.cuda.get_device_name(i)}, sm_{capability[0]}{capability[1]}")
        wrong = fits(capability, archs)
        if wrong:
            problems.append(f"gpu {i}: {wrong}")
            usable = usable and i > 0
    return lines, problems, usable


def _try_ops(device: str) -> tuple[list[str], list[str]]:
    lines, problems = [], []
    for op in _registry.ops():
        start, failed = time.perf_counter(), None
        try:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for args, kwargs in op.module.sample_inputs(device, dtype):
                    with torch.no_grad():
                        actual, expected = op.function(*args, **kwargs), op.module.reference(*args, **kwargs)
                        rtol, atol = op.tolerance(dtype)
                        assert_close(actual, expected, rtol=rtol, atol=atol, name=str(dtype))
        except Exception as error:
            failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ms = 1e3 * (time.perf_counter() - start)
        lines.append(f"  {op.name:24} {device:5} {'ok' if failed is None else 'FAILED':7} {ms:7.1f} ms")
        if failed is not None:
            problems.append(f"{op.name} on {device}: {failed}")
    return lines, problems


def run(device: str | None = None) -> int:
    """Print the page; 0 when healthy."""
    build = tokred.build_info()
    archs = build.get("cuda_archs", [])
    print(f"tokred        {tokred.__version__} ({_ext.LIBRARY.name})")
    print(f"build         target torch {build.get('torch_target', '?')}, {build.get('compiler', 'unknown compiler')}")
    print(f"cuda kernels  {'nvcc ' + build['cuda'] + ' for ' + ', '.join(archs) if build.get('cuda') else 'none'}")
    try:
        native = importlib.import_module("tokred._native")
        print(f"native        loaded, plans for {len(native.planned_ops())} ops")
    except ImportError:
        print("native        not for this Python; tokred works without it")
    print(
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    lines, problems, has_gpu = _gpu_report(build.get("cuda"), archs)
    print("\n".join(lines))
    if device == "cuda" and not has_gpu:
        problems.append("--device cuda, but no GPU can be used")
    devices = [device] if device else ["cpu", *(["cuda"] if has_gpu else [])]
    for name in devices:
        if name == "cuda" and not has_gpu:
            continue
        lines, failures = _try_ops(name)
        print("\n".join(lines))
        problems += failures
    for problem in problems:
        print(f"problem       {problem}")
    print("healthy" if not problems else f"not healthy: {len(problems)} problem{'s' * (len(problems) > 1)}")
    sys.stdout.flush()
    return 1 if problems else 0
