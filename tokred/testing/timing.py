# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""How calls are timed: a pass runs a candidate over all copies of its inputs; candidates take turns, A B B A.

CPU: a pass is a loop. CUDA: a pass is the replay of a graph that was captured from such a loop, or, for what cannot be
captured, the loop itself between two events.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.testing import machine
from tokred.testing.compare import assert_close

Run = Callable[..., Any]
_POISON = 0x7F  # as every byte: no float, index or bool that an op returns


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def storages(value: Any) -> dict[int, int]:
    """Return the bytes of each distinct storage in ``value`` by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)}


@dataclass
class Pass:
    """One pass over all copies, which can be run again and again.

    Args:
        once: Runs it.
        calls: How many calls of the candidate it holds.
        how: "loop", "graph" or "events".
        note: Why it is not a graph.
        keep: What a captured graph reads and writes: it must live as long as ``once``.
    """

    once: Callable[[], Any]
    calls: int
    how: str
    note: str = ""
    keep: tuple[Any, ...] = ()


def _loop(run: Run, copies: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    def once() -> None:
        for inputs in copies:
            run(*inputs)

    return once


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class CpuTimer:
    """Times passes by the clock; inputs are rotated until they exceed four times the last-level cache."""

    device = "cpu"
    most_copied = 1 << 30  # bytes of input copies

    def rotated_bytes(self) -> int:
        """Return how many touched bytes the copies of the inputs must exceed."""
        return 4 * machine.llc_bytes()

    def ready(self, run: Run, copies: Sequence[tuple[Any, ...]], *, captures: bool = True) -> Pass:
        """Return a pass over the copies."""
        return Pass(_loop(run, copies), len(copies), "loop")

    def seconds(self, done: Pass) -> float:
        """Run a pass; return the seconds per call."""
        start = time.perf_counter()
        done.once()
        return (time.perf_counter() - start) / done.calls

    def eager(self, run: Run, copies: Sequence[tuple[Any, ...]]) -> Pass | None:
        """Return the pass that also times what the host does, or None where ``ready`` gives that already."""
        return None

    def queueing(self, run: Run, inputs: tuple[Any, ...], calls: int) -> float:
        """Return the seconds that the host spends on one call."""
        start = time.perf_counter()
        for _ in range(calls):
            run(*inputs)
        return (time.perf_counter() - start) / calls

    def peak_memory(self, run: Run, inputs: tuple[Any, ...]) -> int | None:
        """Return the bytes that a call takes beside its inputs, outputs included."""
        return machine.peak_resident(lambda: run(*inputs))


class CudaTimer:
    """Times passes by events around the replay of a graph; inputs are rotated past five times the L2 cache.

    ``api`` stands for ``torch.cuda``, so that tests can run this without a GPU.
    """

    device = "cuda"
    most_copied = 8 << 30

    def __init__(self, api: Any = torch.cuda) -> None:
        self._api = api
        # Warm-up and capture share one side stream: what libraries keep per stream (the workspace of cuBLAS) is made in
        # the warm-up and not inside the capture.
        self._stream = api.Stream()

    def rotated_bytes(self) -> int:
        """Return how many touched bytes the copies of the inputs must exceed."""
        properties = self._api.get_device_properties(self._api.current_device())
        return 5 * int(properties.L2_cache_size)

    def _warm_up(self, run: Run, copies: Sequence[tuple[Any, ...]], times: int = 3) -> None:
        self._stream.wait_stream(self._api.current_stream())
        with self._api.stream(self._stream):
            for i in range(times):
                run(*copies[i % len(copies)])
        self._api.current_stream().wait_stream(self._stream)
        self._api.synchronize()

    def _why_not(self, run: Run, inputs: tuple[Any, ...]) -> str:
        """Return why a call cannot be captured, found outside of any capture, which a failure would leave broken."""
        self._api.set_sync_debug_mode("error")
        try:
            run(*inputs)
        except RuntimeError as error:
            return f"waits for the GPU ({_first_line(error)})"
        finally:
            self._api.set_sync_debug_mode("default")
        return ""

    def ready(self, run: Run, copies: Sequence[tuple[Any, ...]], *, captures: bool = True) -> Pass:
        """Return a pass over the copies: a graph if the candidate can be captured, else a loop with a note.

        The graph keeps the outputs of all copies, so that their writes go past the L2 cache, too. It is replayed once over
        spoilt outputs and must give what eager calls give: a kernel that missed the capture would not be timed.
        """
        self._warm_up(run, copies)
        why = self._why_not(run, copies[0]) if captures else "the peer says so"
        graph, outputs = self._api.CUDAGraph(), []
        before = self._api.current_stream()
        if not why:
            try:
                with self._api.graph(graph, stream=self._stream):
                    for inputs in copies:
                        outputs.append(run(*inputs))
            except RuntimeError as error:
                why = _first_line(error)
                self._api.set_stream(before)  # torch leaves the stream of a failed capture current
        if why:
            self._api.synchronize()
            return Pass(_loop(run, copies), len(copies), "events", f"not captured: {why}; timed by events")
        self._check_replay(run, copies, graph, outputs)
        return Pass(graph.replay, len(copies), "graph", keep=(graph, outputs, list(copies)))

    def _check_replay(self, run: Run, copies: Sequence[tuple[Any, ...]], graph: Any, outputs: Sequence[Any]) -> None:
        checked = sorted({0, len(copies) - 1})
        expected = [[t.clone() for t in tensors(run(*copies[i]))] for i in checked]
        given = storages(list(copies))
        for t in tensors(list(outputs)):
            if t.untyped_storage().data_ptr() not in given:  # an output may be a view of an input
                t.untyped_storage().fill_(_POISON)
        graph.replay()
        self._api.synchronize()
        for i, wanted in zip(checked, expected):
            # Float atomics of a peer add in another order each time: eight roundings of the widest kind.
            for a, e in zip(tensors(outputs[i]), wanted):
                rtol = 8 * torch.finfo(a.dtype).eps if a.is_floating_point() else None
                scale = float(e.abs().nan_to_num(0, 0, 0).max()) if a.is_floating_point() and a.numel() else 0.0
                assert_close(a, e, rtol=rtol, atol=(rtol or 0) * scale, name=f"replay of the captured graph, copy {i}")

    def seconds(self, done: Pass) -> float:
        """Run a pass twice and return the seconds per call of the second.

        The first keeps the GPU busy while the host queues the second, so that the events see no gap before it.
        """
        begin, end = self._api.Event(enable_timing=True), self._api.Event(enable_timing=True)
        done.once()
        begin.record()
        done.once()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / done.calls

    def eager(self, run: Run, copies: Sequence[tuple[Any, ...]]) -> Pass | None:
        """Return the pass as users run it, one call after the other from the host, until the GPU is done."""

        def once() -> None:
            for inputs in copies:
                run(*inputs)
            self._api.synchronize()

        return Pass(once, len(copies), "eager")

    def queueing(self, run: Run, inputs: tuple[Any, ...], calls: int) -> float:
        """Return the seconds that the host spends on one call, while the GPU does not hold it up."""
        self._api.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run(*inputs)
        seconds = time.perf_counter() - start
        self._api.synchronize()
        return seconds / calls

    def peak_memory(self, run: Run, inputs: tuple[Any, ...]) -> int | None:
        """Return the bytes that a call takes from torch's allocator at its highest, outputs included."""
        self._api.synchronize()
        before = self._api.memory_allocated()
        self._api.reset_peak_memory_stats()
        result = run(*inputs)
        self._api.synchronize()
        del result
        return int(self._api.max_memory_allocated()) - int(before)


Timer = CpuTimer | CudaTimer


def wall(done: Pass) -> float:
    """Run a pass; return the seconds per call by the clock."""
    start = time.perf_counter()
    done.once()
    return (time.perf_counter() - start) / done.calls


def rotate(make: Callable[[int], tuple[Any, ...]], touched: float, timer: Timer, least: int, most: int) -> list[Any]:
    """Make copies of the inputs until what their calls touch exceeds the cache many times.

    Args:
        make: Makes a copy; copies may share storage, for example lists over one KV cache.
        touched: Bytes that one call touches of its inputs.
        timer: Knows the cache and how much may be copied.
        least: At least so many copies, two anyhow.
        most: At most so many.
    """
    copies: list[Any] = []
    held: dict[int, int] = {}
    while len(copies) < most:
        copies.append(make(len(copies)))
        held |= storages(copies[-1])
        size = sum(held.values())
        enough = len(copies) * max(touched, 1) > timer.rotated_bytes() and len(copies) >= max(least, 2)
        if enough or (size * (1 + 1 / len(copies)) > timer.most_copied and len(copies) >= 2):
            break
    return copies


def interleave(turns: Mapping[str, Callable[[], float]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Let the candidates take turns, A B B A; each turn runs a pass and returns its seconds per call.

    Args:
        turns: Candidates by name.
        seconds: Aimed at per candidate; 0 takes one turn each.
        least: At least so many turns each, unless ``seconds`` is 0; 60 at the most.
    """
    start = time.perf_counter()
    for turn in turns.values():
        turn()  # warm-up, and how long a round takes
    once = (time.perf_counter() - start) / len(turns)
    rounds = max(least, min(60, int(seconds / max(once, 1e-9)))) if seconds else 1
    times: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns.items())
    for i in range(rounds):
        for name, turn in order if i % 2 == 0 else reversed(order):
            times[name].append(turn())
    return times


def spread(times: Sequence[float]) -> float:
    """Return the distance of the quartiles over the median: half of the turns lie within it."""
    if len(times) < 4:
        return (max(times) - min(times)) / statistics.median(times)
    low, median, high = statistics.quantiles(times, n=4)
    return (high - low) / median
