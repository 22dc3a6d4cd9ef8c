# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Runs benchmark files: ceilings first, then every case of every op, a row printed as soon as it is there."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from tokred.testing.bench import Case, Row, measure, measure_overhead, show, si, timer_of
from tokred.testing.machine import Ceilings, facts, measure_ceilings
from tokred.testing.peers import Peers, load_file
from tokred.testing.results import Results, save


@dataclass
class Options:
    """How a run is made.

    Args:
        device: "cpu" or "cuda".
        threads: CPU thread counts.
        seconds: Aimed at per candidate and row.
        core: Only the rows of the core matrix.
        smoke: Tiny sizes, only that everything runs.
        json: Where to write the results, after each case.
    """

    device: str = "cpu"
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.5
    core: bool = False
    smoke: bool = False
    json: Path | None = None


class Progress:
    """How much is done: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total, self._done, self._stream = total, 0, stream or sys.stderr
        self._live = self._stream.isatty()
        self._start = time.monotonic()

    def begin(self, what: str) -> None:
        """Say what is under way."""
        left = "--:--"
        if self._done:
            seconds = (time.monotonic() - self._start) / self._done * (self._total - self._done)
            left = f"{int(seconds) // 60:02}:{int(seconds) % 60:02}"
        if self._live:
            filled = 20 * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (20 - filled)
            text = f"[{bar}] {self._done}/{self._total}, {left} left: {what}"
            self._stream.write(f"\r\x1b[K{text[:110]}")
        else:
            self._stream.write(f"{self._done + 1}/{self._total}, {left} left: {what}\n")
        self._stream.flush()

    def end(self, line: str) -> None:
        """Count one as done and print its line to the standard output."""
        self._done += 1
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        print(line, flush=True)


def _cases(path: Path, options: Options) -> Iterator[Case]:
    for case in load_file(path).cases(options.device, options.smoke):
        if not options.core or options.smoke or case.core or case.reach is not None:
            yield case


def _line(ceilings: Ceilings) -> str:
    products = ", ".join(f"{dtype} {si(rate, 'FLOP/s')}" for dtype, rate in ceilings.matrix.items())
    clock = f", SM clock {ceilings.sm_clock_mhz} MHz" if ceilings.sm_clock_mhz else ""
    threads = f", {ceilings.threads} thread{'s' * (ceilings.threads > 1)}" if ceilings.device == "cpu" else ""
    return f"ceilings of {ceilings.device}{threads}: copy {si(ceilings.copy, 'B/s')}, matrix product {products}{clock}"


def run(files: Mapping[str, Path], peers: Peers, options: Options) -> tuple[Results, list[str]]:
    """Measure the ops of ``files`` (a benchmark file by op); return the results and what failed.

    A case that fails, because an output is wrong or memory runs out, is reported and the others go on.
    """
    timer = timer_of(options.device)
    threads = options.threads if options.device == "cpu" else (1,)
    ceilings = [measure_ceilings(options.device, count, smoke=options.smoke) for count in threads]
    for ceiling in ceilings:
        print(_line(ceiling), flush=True)
    results = Results(facts(options.device), ceilings, [], peers.versions, peers.skipped)
    failures: list[str] = []
    # Cases are counted first and made again one by one, so that the inputs of one are gone before the next.
    counts = {op: sum(1 for _ in _cases(path, options)) for op, path in files.items()}
    progress = Progress(sum(len(threads) * count + 1 for count in counts.values()))

    told: set[tuple[str, str]] = set()  # reasons that were printed already

    def attempt(what: str, work: Callable[[], list[Row]]) -> None:
        progress.begin(what)
        lines = []
        try:
            for row in work():
                results.rows.append(row)
                lines.append(show(row))
                lines += [f"    without {name}: {why}" for name, why in row.skipped.items() if (name, why) not in told]
                told.update(row.skipped.items())
        except Exception as error:  # the next case may well run
            text = (str(error).strip().splitlines() or [""])[0]
            failures.append(f"{what}: {type(error).__name__}: {text}")
            lines.append(f"FAILED {failures[-1]}")
        progress.end("\n".join(lines))
        if options.json:  # a run that is cut short keeps what it has measured
            save(results, options.json)
        if options.device == "cuda":
            torch.cuda.empty_cache()

    def one(case: Case, ceiling: Ceilings) -> list[Row]:
        return [measure(case, timer, ceiling, peers, smoke=options.smoke, seconds=options.seconds)]

    for op, path in files.items():
        for ceiling in ceilings:
            for case in _cases(path, options):
                attempt(f"{op} {case.name} {case.dtype}", partial(one, case, ceiling))
        tiny = next(iter(load_file(path).cases(options.device, True)))
        attempt(f"{op} call overhead", partial(measure_overhead, tiny, timer, peers, smoke=options.smoke))
    return results, failures
