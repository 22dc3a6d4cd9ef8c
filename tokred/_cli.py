# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The commands of ``python -m tokred``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument(
        "--peers", help="only these, comma-separated: aten, compile, or a file of benchmarks/peers/; or none"
    )
    parser.add_argument("--core", action="store_true", help="only the core rows: minutes on a GPU")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--threads", default="1,2", help="CPU thread counts, comma-separated (default 1,2)")
    parser.add_argument("--seconds", type=float, help="time per candidate and row (default 1.5, with --core 0.4)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that everything runs")


def _bench_request(arguments: argparse.Namespace, root: Path) -> Any:
    """Return (files, peers, options) of a run; ValueError with one line for what is not known."""
    from tokred.testing.peers import Peers
    from tokred.testing.suite import Options

    if not root.is_dir():
        raise ValueError("needs a checkout of the repository, whose benchmarks/ is not part of the wheel")
    files = {path.stem.removeprefix("bench_"): path for path in sorted(root.glob("*/bench_*.py"))}
    unknown = [name for name in arguments.op or [] if name not in files]
    if unknown:
        raise ValueError(f"no benchmark of {', '.join(unknown)}; there are {', '.join(files)}")
    if arguments.device not in ("cpu", "cuda"):
        raise ValueError(f"expected --device cpu or cuda, got {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device")
    peers = Peers(arguments.device, root / "peers", quick=arguments.smoke)
    if arguments.peers is not None:
        peers.wanted = [name for name in arguments.peers.split(",") if name != "none"]
        unknown = [name for name in peers.wanted if name not in peers.known()]
        if unknown:
            raise ValueError(f"no peer {', '.join(unknown)}; there are {', '.join(peers.known())}, or none")
    counts = arguments.threads.split(",")
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise ValueError(f"expected --threads like 1,2, got {arguments.threads}")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise ValueError(f"expected --seconds above 0, got {arguments.seconds:g}")
    options = Options(
        device=arguments.device,
        threads=tuple(int(count) for count in counts),
        seconds=arguments.seconds or (0.4 if arguments.core else 1.5),
        core=arguments.core,
        smoke=arguments.smoke,
        json=arguments.json,
    )
    return {name: files[name] for name in arguments.op or files}, peers, options


def _bench(arguments: argparse.Namespace) -> int:
    """Measure the ops against their peers (needs a checkout)."""
    from tokred.testing import suite

    try:
        files, peers, options = _bench_request(arguments, Path(tokred.__file__).parents[1] / "benchmarks")
    except ValueError as error:
        print(f"tokred bench: {error}", file=sys.stderr)
        return 2
    _, failures = suite.run(files, peers, options)
    for failure in failures:
        print(f"tokred bench: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="results of bench --json")
    parser.add_argument("--html", type=Path, help="write one self-contained page here")
    parser.add_argument(
        "--readme", action="store_true", help="bring the tables in README.md up to date (in a checkout)"
    )


def _report(arguments: argparse.Namespace) -> int:
    """Turn results into the README's tables and a page."""
    from tokred.testing import report, results

    try:
        if arguments.html:
            runs = [results.load(path) for path in arguments.files]
            arguments.html.write_text(report.page(runs))
            print(f"wrote {arguments.html}")
        readme = Path(tokred.__file__).parents[1] / "README.md"
        if arguments.readme:
            text = readme.read_text()
            for path in arguments.files:
                text = report.put_table(text, path)
            readme.write_text(text)
            print(f"wrote {readme}")
        if not arguments.html and not arguments.readme:
            print("\n\n".join(report.table(path) for path in arguments.files))
    except (results.WrongFile, OSError) as error:
        print(f"tokred report: {error}", file=sys.stderr)
        return 2
    return 0


_Command = tuple[Callable[[argparse.ArgumentParser], None], str, Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, _Command] = {
    "doctor": (_doctor_arguments, (_run_doctor.__doc__ or ""), _run_doctor),
    "ops": (_ops_arguments, (_ops.__doc__ or ""), _ops),
    "methods": (_methods_arguments, (_methods.__doc__ or ""), _methods),
    "bench": (_bench_arguments, (_bench.__doc__ or ""), _bench),
    "report": (_report_arguments, (_report.__doc__ or ""), _report),
}
