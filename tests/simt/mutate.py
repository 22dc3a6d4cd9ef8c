# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Break an op's kernel in small ways and report which breaks its tests notice.

    python -m tests.simt.mutate OP [--also csrc/common/FILE.cuh] [--kind barrier] [--list]

Each mutant removes a barrier, a ``__syncwarp`` or an asynchronous copy's wait, turns a comparison into its neighbour
(``<`` and ``<=``), or drops one term of an ``&&`` or ``||``. It is built into the emulator's race build and the op's
test file runs on it; a failing test, a crash or a run that never ends kills the mutant. Survivors that change nothing
that can be observed are listed with a reason in SURVIVORS.md, and are not counted. Offline: minutes per op.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SURVIVORS = HERE / "SURVIVORS.md"
KINDS = ("barrier", "bound", "term")
REQUIRED = 0.95  # of the mutants that are not in SURVIVORS.md

_SYNC = re.compile(
    r"__syncthreads\(\);|__syncwarp\([^()]*\);|named_barrier_(?:sync|arrive)\([^()]*\);|cp_async_wait<[^<>]*>\(\);"
    r"|__threadfence\(\);"
)
_COMPARE = re.compile(r"(?<= )(<=|>=|<|>)(?= )")  # with spaces around: template brackets have none
_FLIP = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_LOGIC = re.compile(r" (&&|\|\|) ")


@dataclass(frozen=True)
class Mutant:
    """One replacement of ``text[start:end]`` in a file."""

    path: Path  # relative to the root
    kind: str
    line: int
    start: int
    end: int
    replacement: str
    before: str  # the line, stripped
    after: str

    @property
    def key(self) -> str:
        """What SURVIVORS.md names it by: no line number, so that edits elsewhere do not matter."""
        return f"`{self.path}`: `{self.before}` -> `{self.after}`"


def code_only(text: str) -> str:
    """Blank out comments, strings and preprocessor lines, keeping every position."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|static_assert\([^;]*;'
    return re.sub(pattern, blank, text, flags=re.DOTALL | re.MULTILINE)


def operand(code: str, at: int, step: int) -> int:
    """Return where the operand of ``&&`` or ``||`` that begins at ``at`` ends, to the right (+1) or left (-1)."""
    opening, closing = ("([{", ")]}") if step > 0 else (")]}", "([{")
    depth = 0
    i = at
    while 0 <= i < len(code):
        c = code[i]
        if c in opening:
            depth += 1
        elif c in closing:
            if depth == 0:
                break
            depth -= 1
        elif depth == 0:
            if c in ";?,{}" or (c == ":" and code[i - 1] != ":" and code[i + 1] != ":"):
                break
            if code[i : i + 2] in ("&&", "||") or code[i - 1 : i + 1] in ("&&", "||"):
                break
            if c == "=" and code[i - 1] not in "=!<>" and code[i + 1] != "=":
                break
            if step < 0 and code[i - 5 : i + 1] == "return":
                break
        i += step
    return i


def mutants_of(path: Path) -> list[Mutant]:
    """List the mutants of one file, in order of place."""
    text = (ROOT / path).read_text()
    code = code_only(text)
    found: list[Mutant] = []

    def add(kind: str, start: int, end: int, replacement: str) -> None:
        first = text.rfind("\n", 0, start) + 1
        last = text.find("\n", end)
        before = " ".join(text[first:last].split())
        after = " ".join((text[first:start] + replacement + text[end:last]).split())
        line = text.count("\n", 0, start) + 1
        found.append(Mutant(path, kind, line, start, end, replacement, before, after))

    for m in _SYNC.finditer(code):
        add("barrier", m.start(), m.end(), ";")
    for m in _COMPARE.finditer(code):
        if not code[: m.start()].rstrip().endswith("template"):
            add("bound", m.start(), m.end(), _FLIP[m[0]])
    for m in _LOGIC.finditer(code):
        right = operand(code, m.end(), +1)
        left = operand(code, m.start() - 1, -1) + 1
        if code[left : m.start()].strip() and code[m.end() : right].strip():
            add("term", m.start(), right, "")
            add("term", left, m.end(), " ")
    return sorted(found, key=lambda m: (m.start, m.end))


def copy_tree(to: Path) -> None:
    """Copy what the emulator's library is built from."""
    for name in ("csrc", "tests/simt", "third_party"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, to / name)
    shutil.copy(ROOT / "CMakeLists.txt", to)


def build(tree: Path, timeout: float = 600) -> bool:
    """Bring the library up to date; False if the source does not compile."""
    command = ["cmake", "--build", str(tree / "build")]
    return (
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=timeout).returncode == 0
    )


def configure(tree: Path) -> None:
    """Configure the race build with the running Python's torch."""
    import torch

    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    torch_dir = Path(torch.__file__).parent
    options = ["-DTOKRED_SIMT=ON", "-DTOKRED_SANITIZE=race", f"-DTOKRED_TORCH_DIR={torch_dir}"]
    command = ["cmake", "-S", str(tree), "-B", str(tree / "build"), *generator, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_tests(tree: Path, tests: list[str], timeout: float) -> str:
    """Return "passed", "failed" or "endless"."""
    env = os.environ | {"TOKRED_LIBRARY": str(tree / "build" / "libtokred_simt.so"), "TOKRED_SIMT_ADDR2LINE": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=timeout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "endless"
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise SystemExit(f"pytest could not run {' '.join(tests)} (exit status {done.returncode})")
    return "passed" if done.returncode == 0 else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simt.mutate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("op", help="an op with a .cu file, such as prune_topk")
    parser.add_argument("--also", action="append", default=[], metavar="FILE", help="mutate this file, too")
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="mutate this file instead")
    parser.add_argument("--kind", choices=KINDS, action="append", help="these mutants only")
    parser.add_argument("--tests", action="append", metavar="FILE", help="default: the op's test file")
    parser.add_argument("-k", dest="select", metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run of the tests")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    args = parser.parse_args()

    sources = sorted(ROOT.glob(f"csrc/*/{args.op}.cu"))
    if not sources:
        known = sorted(p.stem for p in ROOT.glob("csrc/*/*.cu"))
        parser.error(f"no csrc/*/{args.op}.cu; ops with one: {', '.join(known)}")
    tests = args.tests or [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob(f"tests/*/test_{args.op}.py"))]
    if not tests:
        parser.error(f"no tests/*/test_{args.op}.py; name one with --tests")
    tests += ["-k", args.select] if args.select else []
    files = [Path(f) for f in args.only] or [p.relative_to(ROOT) for p in sources] + [Path(f) for f in args.also]
    mutants = [m for f in files for m in mutants_of(f) if m.kind in (args.kind or KINDS)]
    if args.list:
        for m in mutants:
            print(f"{m.path}:{m.line}: {m.kind}: {m.before} -> {m.after}")
        return 0

    excused = SURVIVORS.read_text() if SURVIVORS.exists() else ""
    counts = {"killed": 0, "survived": 0, "excused": 0, "invalid": 0}
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="tokred-mutate-") as name:
        tree = Path(name)
        copy_tree(tree)
        configure(tree)
        if not build(tree) or run_tests(tree, tests, args.timeout) != "passed":
            raise SystemExit("the tests must pass on the unchanged kernel first")
        for i, m in enumerate(mutants):
            original = (ROOT / m.path).read_text()
            (tree / m.path).write_text(original[: m.start] + m.replacement + original[m.end :])
            if not build(tree):
                verdict = "invalid"
            elif run_tests(tree, tests, args.timeout) != "passed":
                verdict = "killed"
            elif m.key in excused:
                verdict = "excused"
            else:
                verdict = "survived"
                survivors.append(m)
            (tree / m.path).write_text(original)
            counts[verdict] += 1
            print(f"[{i + 1}/{len(mutants)}] {verdict}: {m.path}:{m.line}: {m.before} -> {m.after}", flush=True)
    counted = counts["killed"] + counts["survived"]
    share = counts["killed"] / counted if counted else 1.0
    print(
        f"{args.op}: {counts['killed']} of {counted} killed ({share:.0%}), {counts['excused']} excused in SURVIVORS.md,"
    )
    print(f"{counts['invalid']} did not compile. Survivors, as SURVIVORS.md would list them with a reason:")
    for m in survivors:
        print(f"- {m.key}: ")
    return 0 if share >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
