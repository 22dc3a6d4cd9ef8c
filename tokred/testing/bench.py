# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The benchmark of an op: cases with their peers, compared with the reference first, then timed side by side.

``timing`` says how a call is timed, ``machine`` what is measured of the device, ``peers`` what a peer is, ``results`` how
rows are kept and ``report`` how they are shown. docs/benchmarks.md explains the numbers.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tokred import _registry
from tokred.testing.compare import assert_close
from tokred.testing.machine import Ceilings, num_threads
from tokred.testing.peers import NotApplicable, Peer, Peers
from tokred.testing.timing import CpuTimer, CudaTimer, Timer, interleave, rotate, spread, storages, wall


def _whole(out: Any, *inputs: Any) -> Any:
    return out


def _as_given(*inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inputs, {}


@dataclass
class Case:
    """One row of a benchmark: the same work done by tokred and by its peers.

    Args:
        op: The op's name.
        name: Sizes as people say them.
        dtype: Of the main input, as a word.
        make: Makes one copy of the inputs; called with the copy's number, the same each time. Copies may share storage.
        run: tokred and the compositions by name, "tokred" first; each is called with one copy's inputs.
        call: Maps a copy's inputs to the arguments of the public op, for its ``floor`` and ``reference``.
        peers: Plug-ins that can do this (``benchmarks/peers/NAME.py``).
        compiled: Names in ``run`` that are measured under torch.compile, too.
        compare: Reduces an output, given with the copy's inputs, to what must agree with the reference.
        reference: Computes the expected output from a copy's inputs; the op's ``reference`` by default.
        tolerance: rtol and atol of that comparison for the peers; by default, and for tokred always, the op's own.
        unlike: Names in ``run`` that return something else than the op, with the reason: they are not compared.
        min_copies: At least so many copies, for example 64 where branches could learn the data.
        reach: The ratio that is aimed at.
        against: To which of ``run``; to the best peer, whatever it is, by default.
        core: Whether it runs whenever there is a device for minutes only; rows with an aim do anyhow.
        note: One line printed with the row.
    """

    op: str
    name: str
    dtype: str
    make: Callable[[int], tuple[Any, ...]]
    run: dict[str, Callable[..., Any]]
    call: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = _as_given
    peers: Sequence[str] = ()
    compiled: Sequence[str] = ()
    compare: Callable[..., Any] = _whole
    reference: Callable[..., Any] | None = None
    tolerance: tuple[float, float] | None = None
    unlike: dict[str, str] = field(default_factory=dict)
    min_copies: int = 1
    reach: float | None = None
    against: str = ""
    core: bool = False
    note: str = ""


@dataclass
class Row:
    """What a case measured.

    Args:
        op: The op's name.
        case: Sizes as people say them.
        dtype: Of the main input.
        device: "cpu" or "cuda".
        threads: Of torch on the CPU.
        kind: "time" of the work, or "overhead" of a call with tiny inputs.
        copies: How many copies of the inputs a pass went through.
        seconds: Per call by candidate: the median of all passes.
        spread: Distance of the quartiles of the passes over their median, by candidate.
        eager: On CUDA, seconds per call as the host makes them one by one.
        how: "loop", "graph" or "events" by candidate.
        memory: Bytes at the highest beside the inputs, outputs included, by candidate.
        bytes: What a perfect kernel moves.
        flops: What its matrix products compute.
        floor: Seconds of a perfect kernel at the measured ceilings.
        reach: The ratio that is aimed at.
        against: The candidate that it is aimed at, or "" for the best peer.
        core: Whether the case is in the core matrix.
        unlike: Candidates that do something else, to compare with, but are no peers; with the reason.
        skipped: Peers that did not run, with the reason.
        note: One line.
    """

    op: str
    case: str
    dtype: str
    device: str
    threads: int
    kind: str
    copies: int
    seconds: dict[str, float]
    spread: dict[str, float]
    eager: dict[str, float] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    floor: float = 0.0
    reach: float | None = None
    against: str = ""
    core: bool = False
    unlike: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def speedup(self) -> dict[str, float]:
        """Return by how much tokred is faster than each peer."""
        return {name: t / self.seconds["tokred"] for name, t in self.seconds.items() if name != "tokred"}

    @property
    def best_peer(self) -> str | None:
        """Return the fastest peer, or None without any."""
        peers = [name for name in self.speedup if name not in self.unlike]
        return min(peers, key=lambda name: self.seconds[name], default=None)

    @property
    def reached(self) -> float | None:
        """Return the ratio to what the aim is set against, or None where that did not run."""
        return self.speedup.get(self.against or self.best_peer or "")

    @property
    def floor_share(self) -> float:
        """Return the share of the floor that tokred reaches; 0 where there is none."""
        return self.floor / self.seconds["tokred"]


def generator(device: str, seed: int) -> torch.Generator:
    """Return a seeded generator of the device: inputs are drawn where they are used."""
    return torch.Generator(device).manual_seed(seed)


def dtype_word(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def timer_of(device: str) -> Timer:
    """Return the way of timing on a device."""
    return CpuTimer() if device == "cpu" else CudaTimer()


def _candidates(case: Case, peers: Peers, skipped: dict[str, str], compiled: bool) -> Iterator[tuple[str, Peer]]:
    for name, function in case.run.items():
        if name == "tokred" or peers.wants("aten"):
            yield name, Peer(function)
    for name in case.compiled if compiled else ():
        if peers.wants("compile"):
            yield f"compiled {name}", Peer(torch.compile(case.run[name], dynamic=False))
    for name in case.peers:
        found = peers.find(name, case.op) if peers.wants(name) else None
        if found is not None:
            yield name, found
        elif name in peers.skipped:
            skipped[name] = peers.skipped[name]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, NotApplicable) else f"{type(error).__name__}: {lines[0]}"


def checks_of(case: Case, inputs: tuple[Any, ...]) -> Callable[[str, Peer, Any], None]:
    """Compute what the reference says; return ``check(name, peer, out)``, which raises where a candidate's output differs."""
    op = _registry.op(case.op)
    args, kwargs = case.call(*inputs)
    with torch.no_grad():
        wanted = case.reference(*inputs) if case.reference else op.module.reference(*args, **kwargs)
        expected = case.compare(wanted, *inputs)
    own = op.tolerance(getattr(torch, case.dtype))

    def check(name: str, peer: Peer, out: Any) -> None:
        rtol, atol = own if name == "tokred" else (case.tolerance or own)
        label = f"{case.op} {case.name} {case.dtype}: {name} against the reference"
        assert_close(case.compare(peer.finish(out), *inputs), expected, rtol=rtol, atol=atol, name=label)

    return check


def checked_candidates(
    case: Case,
    peers: Peers,
    inputs: tuple[Any, ...],
    check: Callable[[str, Peer, Any], None],
    skipped: dict[str, str],
    *,
    compiled: bool = True,
) -> dict[str, Peer]:
    """Run each candidate once and check its output; return those that may be timed.

    tokred or a composition that is wrong raises. A compiled composition or a plug-in that fails or differs is left out,
    with the reason in ``skipped``: its adapter may be at fault, and the other numbers are worth having.
    """
    found: dict[str, Peer] = {}
    for name, peer in _candidates(case, peers, skipped, compiled):
        try:
            out = peer.run(*peer.prepare(*inputs))
            if name not in case.unlike:
                check(name, peer, out)
        except Exception as error:
            if name in case.run:
                raise
            skipped[name] = _reason(error)
            continue
        found[name] = peer
    return found


def measure(
    case: Case, timer: Timer, ceilings: Ceilings, peers: Peers, *, smoke: bool = False, seconds: float = 1.5
) -> Row:
    """Compare the outputs of all candidates with the reference, then time them; ``seconds`` is aimed at per candidate."""
    skipped: dict[str, str] = {}
    if "torch._dynamo" in sys.modules:  # a compilation per case: more of one function would make it fall back to eager
        torch.compiler.reset()
    with num_threads(ceilings.threads):
        first = case.make(0)
        check = checks_of(case, first)
        found = checked_candidates(case, peers, first, check, skipped)
        args, kwargs = case.call(*first)
        num_bytes, flops = _registry.op(case.op).module.floor(*args, **kwargs)
        memory = {}
        for name, peer in found.items():
            peak = timer.peak_memory(peer.run, peer.prepare(*first))
            if peak is not None:
                memory[name] = peak
        touched = min(num_bytes, sum(storages(first).values()))
        copies = rotate(case.make, touched, timer, case.min_copies, 2 if smoke else 256)
        passes, eager = {}, {}
        for name, peer in found.items():
            try:
                prepared = [peer.prepare(*inputs) for inputs in copies]
                again = None if name in case.unlike else partial(check, name, peer)
                passes[name] = timer.ready(peer.run, prepared, again, captures=peer.captures)
            except Exception as error:
                if name in case.run:
                    raise
                skipped[name] = _reason(error)
                continue
            late = timer.eager(peer.run, prepared)
            if late is not None:
                eager[name] = late
        aim = 0.0 if smoke else seconds
        times = interleave({name: partial(timer.seconds, p) for name, p in passes.items()}, aim)
        late_times = interleave({name: partial(wall, p) for name, p in eager.items()}, aim / 4) if eager else {}
    return Row(
        op=case.op,
        case=case.name,
        dtype=case.dtype,
        device=timer.device,
        threads=ceilings.threads,
        kind="time",
        copies=len(copies),
        seconds={name: statistics.median(t) for name, t in times.items()},
        spread={name: spread(t) for name, t in times.items()},
        eager={name: statistics.median(t) for name, t in late_times.items()},
        how={name: p.how for name, p in passes.items()},
        memory=memory,
        bytes=num_bytes,
        flops=flops,
        floor=ceilings.floor(num_bytes, flops, case.dtype),
        reach=case.reach,
        against=case.against,
        core=case.core or case.reach is not None,
        unlike={name: why for name, why in case.unlike.items() if name in times},
        skipped=skipped,
        note="; ".join(part for part in (case.note, *(f"{n} {p.note}" for n, p in passes.items() if p.note)) if part),
    )


_MODES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def measure_overhead(case: Case, timer: Timer, peers: Peers, *, smoke: bool = False, seconds: float = 0.2) -> list[Row]:
    """Time what the host spends on a call with tiny inputs, under each mode of autograd; compiled peers are left out."""
    skipped: dict[str, str] = {}
    rows = []
    calls = 3 if smoke else 30  # few enough that a GPU's queue does not fill
    with num_threads(1):
        inputs = case.make(0)
        found = checked_candidates(case, peers, inputs, checks_of(case, inputs), skipped, compiled=False)
        ready = {name: (peer.run, peer.prepare(*inputs)) for name, peer in found.items()}
        for mode, context in _MODES.items():
            with context():
                turns = {n: partial(timer.queueing, run, prepared, calls) for n, (run, prepared) in ready.items()}
                times = interleave(turns, 0.0 if smoke else seconds)
            rows.append(
                Row(
                    op=case.op,
                    case=f"call overhead, {mode}",
                    dtype=case.dtype,
                    device=timer.device,
                    threads=1,
                    kind="overhead",
                    copies=1,
                    seconds={name: statistics.median(t) for name, t in times.items()},
                    spread={name: spread(t) for name, t in times.items()},
                    core=True,
                    unlike={name: why for name, why in case.unlike.items() if name in times},
                    skipped=skipped,
                    note=f"{case.name}: what the host spends on a call",
                )
            )
    return rows


def si(number: float, unit: str) -> str:
    """Return a number with three digits and a prefix: 1.5 GB/s, 12.3 us."""
    prefixes = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "u"}
    factor = next((f for f in prefixes if abs(number) >= f), 1e-6)
    scaled = number / factor
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {prefixes[factor]}{unit}"


def rate(row: Row) -> str:
    """Return what bounds the case: GB/s moved, or flops of the product."""
    ours = row.seconds["tokred"]
    if row.flops and row.flops / max(row.bytes, 1) > 20:  # more than any CPU or memory-bound kernel has per byte
        return si(row.flops / ours, "FLOP/s")
    return si(row.bytes / ours, "B/s")


def show(row: Row) -> str:
    """Return the row as one line."""
    peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.speedup.items())
    aim = f" (aim {row.reach:g}x{f' {row.against}' if row.against else ''})" if row.reach else ""
    ours = si(row.seconds["tokred"], "s")
    line = f"{row.op:16} {row.case:44} {row.dtype:9} {row.threads}t {ours:>8} +-{50 * row.spread['tokred']:.0f}%"
    if row.kind == "overhead":
        return f"{line}  {peers}".rstrip()
    memory = f"  +{row.memory['tokred'] / 2**20:.1f} MiB" if "tokred" in row.memory else ""
    eager = f"  eager {si(row.eager['tokred'], 's')}" if "tokred" in row.eager else ""
    return f"{line} {rate(row):>11} {100 * row.floor_share:4.0f}% of floor{eager}{memory}  {peers}{aim}".rstrip()
