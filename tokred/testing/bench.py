# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Timing that is honest: side by side in one run, inputs rotated past the cache, medians, outputs compared first.

CPU: the candidates take turns (A B B A ...), each turn a pass over all copies of the inputs; one and two threads.
CUDA: each candidate's pass over the copies is captured in a graph and replayed, timed by events.
"""

import itertools
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.compare import assert_close

SCHEMA = 1  # of the results file


def _whole(out: Any) -> Any:
    return out


@dataclass
class Case:
    """One row of a benchmark: the same work done by tokred and by its peers.

    Args:
        op: The op's name.
        name: Sizes as people say them.
        dtype: Of the main input, as a word.
        make: Makes one copy of the inputs; called with the copy's number.
        run: Candidates by name, "tokred" first; each is called with one copy's inputs.
        bytes: What a perfect kernel moves.
        flops: What a perfect kernel computes.
        compare: Reduces an output to what must agree between candidates, or None for no comparison at all with a reason
            in ``note``.
        tolerance: rtol and atol of that comparison.
        min_copies: At least so many copies, for example 64 where branches could learn the data.
        reach: The ratio to the best peer that is aimed at.
        note: One line printed with the row.
    """

    op: str
    name: str
    dtype: str
    make: Callable[[int], tuple[Any, ...]]
    run: dict[str, Callable[..., Any]]
    bytes: float = 0.0
    flops: float = 0.0
    compare: Callable[[Any], Any] | None = _whole
    tolerance: tuple[float, float] | None = None
    min_copies: int = 1
    reach: float | None = None
    note: str = ""


@dataclass
class Row:
    """What a case measured: seconds per call by candidate (median of passes), their spread, and what follows."""

    op: str
    case: str
    dtype: str
    device: str
    threads: int
    copies: int
    seconds: dict[str, float]
    spread: dict[str, float]
    bytes: float
    flops: float
    gbps: float
    gflops: float
    copy_share: float
    speedup: dict[str, float] = field(default_factory=dict)
    reach: float | None = None
    note: str = ""


def llc_bytes() -> int:
    """Return the size of the last-level cache, or 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
        elif text.endswith("M"):
            sizes.append(int(text[:-1]) << 20)
    return max(sizes[1:] or sizes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _num_copies(case: Case, inputs: Any, device: str) -> int:
    cache = llc_bytes() if device == "cpu" else 60 << 20
    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(inputs)}.values())
    wanted = math.ceil((4 if device == "cpu" else 5) * cache / max(size, 1)) + 1
    most = max(2, int(1e9 / max(size, 1)))  # 1 GB of copies at the most
    return min(max(case.min_copies, wanted), most, 256)


def copy_bandwidth(device: str) -> float:
    """Return bytes per second (read plus written) of a large torch copy under the present thread count."""
    source = torch.empty(64 << 20, device=device).fill_(1.0)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(8):
        best = min(best, _pass(lambda: target.copy_(source), device))
    return 2 * source.nbytes / best


def _pass(work: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _prepared(function: Callable[..., Any], inputs: list[tuple[Any, ...]], device: str) -> Callable[[], Any]:
    """Return one pass over all copies; on CUDA as the replay of a captured graph."""

    def work() -> None:
        for copy in inputs:
            function(*copy)

    if device == "cpu":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure(
    case: Case, device: str, threads: int, bandwidth: float, *, smoke: bool = False, seconds: float = 1.5
) -> Row:
    """Compare the outputs of all candidates, then time them. ``seconds`` is aimed at per candidate."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = case.make(0)
        expected = None
        for name, function in case.run.items():
            out = function(*first)
            if case.compare is None:
                continue
            out = case.compare(out)
            if expected is None:
                expected = out
            else:
                rtol, atol = case.tolerance or (None, None)
                assert_close(expected, out, rtol=rtol, atol=atol, name=f"{case.op} {case.name}: tokred against {name}")
        copies = 2 if smoke else _num_copies(case, first, device)
        inputs = [first, *(case.make(i) for i in range(1, copies))]
        passes = {name: _prepared(function, inputs, device) for name, function in case.run.items()}
        once = {name: _pass(work, device) for name, work in passes.items()}  # warm-up
        rounds = 1 if smoke else max(5, min(60, int(seconds * len(once) / max(sum(once.values()), 1e-9))))
        times: dict[str, list[float]] = {name: [] for name in passes}
        for i in range(rounds):
            order = list(passes.items())
            for name, work in order if i % 2 == 0 else reversed(order):
                times[name].append(_pass(work, device) / copies)
    finally:
        torch.set_num_threads(before)
    median = {name: statistics.median(t) for name, t in times.items()}
    spread = {name: (max(t) - min(t)) / median[name] for name, t in times.items()}
    ours = median["tokred"]
    return Row(
        op=case.op,
        case=case.name,
        dtype=case.dtype,
        device=device,
        threads=threads,
        copies=copies,
        seconds=median,
        spread=spread,
        bytes=case.bytes,
        flops=case.flops,
        gbps=case.bytes / ours / 1e9,
        gflops=case.flops / ours / 1e9,
        copy_share=case.bytes / ours / bandwidth,
        speedup={name: median[name] / ours for name in median if name != "tokred"},
        reach=case.reach,
        note=case.note,
    )


def show(row: Row) -> str:
    """Return the row as one line."""
    peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.speedup.items())
    reach = f" (aim {row.reach:g}x)" if row.reach else ""
    rate = f"{row.gflops:7.1f} GF/s" if row.flops else f"{row.gbps:7.1f} GB/s"
    return (
        f"{row.op:16} {row.case:34} {row.dtype:9} {row.threads}t {row.seconds['tokred'] * 1e6:10.1f} us {rate} "
        f"{100 * row.copy_share:5.0f}% of copy  {peers}{reach}"
    )


def facts(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: machine, versions, commit."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    try:
        here = Path(tokred.__file__).parent
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        revision = commit.stdout.strip() or "unknown"
    except OSError:
        revision = "unknown"
    found: dict[str, Any] = {
        "cpu": name,
        "cores": torch.get_num_threads(),
        "llc_mib": llc_bytes() / 2**20,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "tokred": tokred.__version__,
        "commit": revision,
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def run(
    cases: Sequence[Case],
    device: str = "cpu",
    threads: Sequence[int] = (1, 2),
    *,
    smoke: bool = False,
    seconds: float = 1.5,
) -> list[Row]:
    """Measure every case under every thread count, printing a row as soon as it is there."""
    rows = []
    for count, case in itertools.product(threads if device == "cpu" else (1,), cases):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        bandwidth = 1e10 if smoke else copy_bandwidth(device)
        torch.set_num_threads(before)
        row = measure(case, device, count, bandwidth, smoke=smoke, seconds=seconds)
        print(show(row), flush=True)
        rows.append(row)
    return rows


def save(rows: Sequence[Row], path: Path, device: str) -> None:
    """Write rows and facts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "facts": facts(device), "rows": [row.__dict__ for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
