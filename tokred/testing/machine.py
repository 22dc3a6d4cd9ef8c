# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What a number depends on: caches, ceilings measured in the same run, clocks, versions, and memory that a call takes."""

import ctypes
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tokred

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_RSS_STEP = 1 << 18  # the kernel counts pages in batches per thread: below this a peak is noise


@dataclass
class Ceilings:
    """What the device reaches, measured at the beginning of a run.

    Args:
        device: "cpu" or "cuda".
        threads: Of torch, on the CPU.
        copy: Bytes per second, read plus written, of a large copy.
        matrix: Flops per second of a large matrix product by dtype; float32 to float32 accuracy.
        sm_clock_mhz: Under the matrix product, by nvidia-smi; None where that is not there.
    """

    device: str
    threads: int
    copy: float
    matrix: dict[str, float] = field(default_factory=dict)
    sm_clock_mhz: int | None = None

    def floor(self, num_bytes: float, flops: float, dtype: str) -> float:
        """Return the seconds that a perfect kernel takes here."""
        rate = self.matrix.get("float32" if dtype == "float32" else "bfloat16")
        return max(num_bytes / self.copy, flops / rate if rate else 0.0)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch's CPU ops use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def llc_bytes(caches: Path = _CACHES) -> int:
    """Return the size of the last-level cache, or 32 MiB where the system does not say."""
    units = {"K": 10, "M": 20, "G": 30}
    texts = [path.read_text().strip() for path in caches.glob("index*/size")]
    return max((int(t[:-1]) << units[t[-1]] for t in texts if t and t[-1] in units), default=32 << 20)


def l2_bytes() -> int:
    """Return the size of the current GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def _best(work: Callable[[], Any], device: str, times: int = 8) -> float:
    """Return the shortest of several runs in seconds; one more warms up."""
    best = math.inf
    for i in range(times + 1):
        if device == "cpu":
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            work()  # keeps the GPU busy while the host queues what is timed
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        best = min(best, seconds if i else math.inf)
    return best


def _matrix_rate(device: str, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b, out=out), device, times=4)


def _sm_clock_under_load() -> int | None:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(500):  # a good half second of work, queued
        a @ a
    clock = sm_clock()
    torch.cuda.synchronize()
    return clock


def measure_ceilings(device: str, threads: int, *, smoke: bool = False) -> Ceilings:
    """Measure what the device reaches under ``threads`` CPU threads; ``smoke`` takes sizes that mean nothing."""
    with num_threads(threads):
        source = torch.randn((1 << 16) if smoke else (64 << 20), device=device)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
        n = 64 if smoke else 1024 if device == "cpu" else 8192
        matrix = {str(t).removeprefix("torch."): _matrix_rate(device, t, n) for t in (torch.float32, torch.bfloat16)}
        if device == "cpu":  # bfloat16 can be widened, exactly: faster where the CPU has no product for it
            matrix["bfloat16"] = max(matrix.values())
            return Ceilings(device, threads, copy, matrix)
        # Three TF32 products give float32 accuracy, on most GPUs faster than float32 units do.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            matrix["float32"] = max(matrix["float32"], _matrix_rate(device, torch.float32, n) / 3)
        finally:
            torch.set_float32_matmul_precision(before)
        return Ceilings(device, threads, copy, matrix, _sm_clock_under_load())


def _nvidia_smi(query: str) -> str | None:
    # By its name: CUDA_VISIBLE_DEVICES renumbers GPUs for torch, but not for nvidia-smi.
    device = f"GPU-{torch.cuda.get_device_properties().uuid}" if torch.cuda.is_available() else "0"
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def sm_clock() -> int | None:
    """Return the SM clock in MHz now, or None without nvidia-smi."""
    text = _nvidia_smi("clocks.sm")
    return int(text) if text and text.isdigit() else None


def facts(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: machine, versions, commit."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].strip() if models else cpu
    try:
        here = str(Path(tokred.__file__).parent)
        done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = done.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "llc_mib": llc_bytes() / 2**20,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokred": tokred.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "l2_mib": l2_bytes() / 2**20,
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
        }
    return found


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field_name}")


def peak_resident(call: Callable[[], Any]) -> int | None:
    """Return by how many bytes a call raises the resident memory of this process at its highest; None off Linux.

    This is what the kernel sees: outputs, torch's buffers, and what C++ code allocates without torch, once touched. Freed
    memory is handed back to the system first, so that the call cannot hide in pages that are there already. Peaks below
    0.25 MiB are noise and returned as 0.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM") - before
    except (OSError, AttributeError):
        return None
    del result
    return peak if peak >= _RSS_STEP else 0
