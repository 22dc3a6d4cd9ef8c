# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The commands of ``python -m tokred``."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

import tokred
from tokred import _doctor, _registry


def _ops_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _ops(arguments: argparse.Namespace) -> int:
    """List the ops: schema and devices."""
    for op in _registry.ops():
        devices = [key.lower() for key in ("CPU", "CUDA") if op.has_kernel(key)]
        summary = (op.function.__doc__ or "").strip().split("\n")[0]
        print(f"tokred.{op.name}  [{op.family}; {', '.join(devices)}]  {summary}")
        for schema in op.schemas.values():
            print(f"    {schema}")
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="try the ops on this device only")


def _run_doctor(arguments: argparse.Namespace) -> int:
    """Check this installation: torch, GPU, driver, build, and each op against its reference."""
    return _doctor.run(arguments.device)


def _methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="as the page docs/methods.md")


def _methods(arguments: argparse.Namespace) -> int:
    """List the published methods: paper, stage, basis, deviations."""
    from tokred import methods

    if arguments.markdown:
        print(methods.markdown(), end="")
        return 0
    for entry in methods.registry():
        print(f"tokred.methods.{entry.name}  [{entry.stage}]  {entry.paper}")
        print(f"    rests on: {entry.basis}")
        for deviation in entry.deviations:
            print(f"    differs: {deviation}")
        for switch, meaning in entry.compat.items():
            print(f"    compat={switch!r}: {meaning}")
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", default="1,2", help="CPU thread counts, comma-separated (default 1,2)")
    parser.add_argument("--seconds", type=float, default=1.5, help="time per candidate and row (default 1.5)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--aims", action="store_true", help="only the rows that state an aim, as in the README")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that everything runs")


def _benchmark_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _bench(arguments: argparse.Namespace) -> int:
    """Measure the ops against their peers (needs a checkout)."""
    from tokred.testing import bench

    root = Path(tokred.__file__).parents[1] / "benchmarks"
    if not root.is_dir():
        print(
            "tokred bench: needs a checkout of the repository, whose benchmarks/ is not part of the wheel",
            file=sys.stderr,
        )
        return 2
    known = {path.stem.removeprefix("bench_"): path for path in sorted(root.glob("*/bench_*.py"))}
    unknown = [name for name in arguments.op or [] if name not in known]
    if unknown:
        print(f"tokred bench: no benchmark of {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("tokred bench: torch sees no CUDA device", file=sys.stderr)
        return 2
    chosen = [known[name] for name in arguments.op or known]
    rows = []
    for path in chosen:
        cases = list(_benchmark_of(path).cases(arguments.device, arguments.smoke))
        if arguments.aims:
            cases = [case for case in cases if case.reach]
        threads = [int(t) for t in arguments.threads.split(",")]
        rows += bench.run(cases, arguments.device, threads, smoke=arguments.smoke, seconds=arguments.seconds)
        if arguments.json:  # after each op: a run that is cut short keeps what it has measured
            bench.save(rows, arguments.json, arguments.device)
    return 0


_Command = tuple[Callable[[argparse.ArgumentParser], None], str, Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, _Command] = {
    "doctor": (_doctor_arguments, (_run_doctor.__doc__ or ""), _run_doctor),
    "ops": (_ops_arguments, (_ops.__doc__ or ""), _ops),
    "methods": (_methods_arguments, (_methods.__doc__ or ""), _methods),
    "bench": (_bench_arguments, (_bench.__doc__ or ""), _bench),
}
