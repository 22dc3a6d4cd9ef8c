# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Break the kernels in small ways and report which breaks their tests notice.

    python -m tests.simt.mutate [OP ...] [--only csrc/common/FILE.cuh] [--kind barrier] [--list]

Each mutant removes a barrier, a ``__syncwarp`` or an asynchronous copy's wait, turns a comparison into its neighbour
(``<`` and ``<=``), replaces one term of an ``&&`` or ``||`` by what leaves the others to decide, or drops a ``+ 1``. The
test files of every op that includes the mutated file run on the emulator's race build, then on its address build; a
failing test, a crash or a test that never ends kills the mutant. Survivors that change nothing that can be observed are
listed with a reason in SURVIVORS.md, and are not counted. Offline, not in CI.

All mutants are compiled into one library, as branches on a number that is set at run time, and mutate_forks.py forks a
process per mutant from one that has imported and collected everything. What the compiler must know (``constexpr``, array
sizes) is left alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SURVIVORS = HERE / "SURVIVORS.md"
KINDS = ("barrier", "bound", "term", "step")
OPTIMISE = {"race": "-O2", "address": "-O1"}  # -O3 of what both add takes minutes
REQUIRED = 0.95  # of the mutants that are not in SURVIVORS.md

_SYNC = re.compile(
    r"__syncthreads\(\);|__syncwarp\([^()]*\);|named_barrier_(?:sync|arrive)\([^()]*\);|cp_async_wait<[^<>]*>\(\);"
    r"|__threadfence\(\);"
)
_COMPARE = re.compile(r"(?<= )(<=|>=|<|>)(?= )")  # with spaces around: template brackets have none
_FLIP = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_LOGIC = re.compile(r" (&&|\|\|) ")
_STEP = re.compile(r"(?<= [+-] )1(?![\w.])")
_RUNTIME = """\
#pragma once
// Constant in a process, so that the compiler asks once per function; not instrumented, as a global's load would be.
extern "C" __attribute__((const, visibility("hidden"))) int tokred_active_mutant();
namespace mutant {
inline bool on(int number) { return tokred_active_mutant() == number; }
// a < mutant::lt{7} > b is a < b, or a <= b when mutant 7 is on: the operands keep their extent.
template <bool kLess, bool kEqual>
struct Compare {
  int number;
};
using lt = Compare<true, false>;
using le = Compare<true, true>;
using gt = Compare<false, false>;
using ge = Compare<false, true>;
template <typename T, bool kLess, bool kEqual>
struct Left {
  T value;
  int number;
};
template <typename T, bool kLess, bool kEqual>
inline Left<T, kLess, kEqual> operator<(T value, Compare<kLess, kEqual> compare) {
  return {value, compare.number};
}
template <typename T, bool kLess, bool kEqual, typename U>
inline bool operator>(Left<T, kLess, kEqual> left, U right) {
  const bool equal = kEqual != on(left.number);
  if constexpr (kLess) {
    return equal ? left.value <= right : left.value < right;
  } else {
    return equal ? left.value >= right : left.value > right;
  }
}
}  // namespace mutant
"""
_ACTIVE = """\
extern "C" {
__attribute__((visibility("default"))) int tokred_mutant = 0;
__attribute__((visibility("hidden"))) int tokred_active_mutant() { return tokred_mutant; }
}
"""


@dataclass(frozen=True)
class Mutant:
    """One replacement of ``text[start:end]`` in a file."""

    path: Path  # relative to the root
    kind: str
    line: int
    start: int
    end: int
    original: str
    replacement: str
    before: str  # the line, stripped
    after: str
    nth: int  # of those in the file that read the same

    @property
    def key(self) -> str:
        """What SURVIVORS.md names it by: no line number, so that edits elsewhere do not matter."""
        which = f" ({self.nth})" if self.nth > 1 else ""
        return f"`{self.path}`: `{self.before}` -> `{self.after}`{which}: "

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.before} -> {self.after}"

    def edits(self, number: int) -> list[tuple[int, int, str]]:
        """Replacements that apply the mutant while ``number`` is on; those of nested mutants nest."""
        on = f"::mutant::on({number})"
        if self.kind == "barrier":
            return [(self.start, self.end, f"{{ if (!{on}) {self.original} }}")]
        if self.kind == "bound":
            name = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge"}[self.original]
            return [(self.start, self.end, f"< ::mutant::{name}{{{number}}} >")]
        if self.kind == "step":
            return [(self.start, self.end, f"({on} ? 0 : 1)")]
        opening = f"({on} || (" if self.replacement == "true" else f"(!{on} && ("
        return [(self.start, self.start, opening), (self.end, self.end, "))")]


def code_only(text: str) -> str:
    """Blank out, in place, comments, strings, preprocessor lines, constants, and code for nvcc alone."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for_nvcc = r"(?<=#ifdef TOKRED_SIMT\n)(?:(?!#endif).)*?#else\n.*?#endif"
    text = re.sub(for_nvcc, lambda m: re.sub("#else.*", blank, m[0], flags=re.DOTALL), text, flags=re.DOTALL)
    pattern = (
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\bconstexpr\b[^;{]*|static_assert\([^;]*;'
        r"|__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
    )
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
    found: set[tuple[int, int, str, str]] = set()  # a term between two && is found twice

    def add(kind: str, start: int, end: int, replacement: str) -> None:
        found.add((start, end, replacement, kind))

    for m in _SYNC.finditer(code):
        add("barrier", m.start(), m.end(), ";")
    for m in _COMPARE.finditer(code):
        if not code[: m.start()].rstrip().endswith("template"):
            add("bound", m.start(), m.end(), _FLIP[m[0]])
    for m in _STEP.finditer(code):
        add("step", m.start(), m.end(), "0")
    for m in _LOGIC.finditer(code):
        neutral = "true" if m[1] == "&&" else "false"
        sides = (operand(code, m.start() - 1, -1) + 1, m.start()), (m.end(), operand(code, m.end(), +1))
        for left, right in sides:
            term = code[left:right]
            if term.strip():
                start, end = left + len(term) - len(term.lstrip()), left + len(term.rstrip())
                add("term", start, end, neutral)
    seen: Counter[tuple[str, str]] = Counter()
    mutants = []
    for start, end, replacement, kind in sorted(found):
        first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
        before = " ".join(text[first:last].split())
        after = " ".join((text[first:start] + replacement + text[end:last]).split())
        seen[before, after] += 1
        line, original = text.count("\n", 0, start) + 1, text[start:end]
        nth = seen[before, after]
        mutants.append(Mutant(path, kind, line, start, end, original, replacement, before, after, nth))
    return mutants


def schemata(path: Path, mutants: dict[int, Mutant]) -> str:
    """Return a file's text with its mutants built in, each on its own lines."""
    text = (ROOT / path).read_text()
    edits = [e for number, m in mutants.items() for e in m.edits(number)]
    parts, at = [], 0
    for start, end, replacement in sorted(
        edits, key=lambda e: (e[0], e[2] != "))")
    ):  # a term ends before another begins
        parts += [text[at:start], replacement]
        at = end
    return "".join([*parts, text[at:]])


@cache
def device_files(path: Path) -> frozenset[Path]:
    """Return a kernel file, the kernel headers that it includes and the shared kernels that it calls."""
    found: set[Path] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^#include "(.*\.c?u?h)"', (ROOT / file).read_text(), flags=re.MULTILINE):
            header = Path("csrc") / name
            kernel = header.with_suffix(".cu")
            todo += [header, kernel] if name.startswith("common/") and (ROOT / kernel).exists() else [header]
    return frozenset(file for file in found if file.suffix in (".cu", ".cuh"))


def tests_of(kernel: str) -> list[Path]:
    """Return the test file of the op that a kernel file belongs to: ``op.cu``, or ``op_part.cu``."""
    ops = {p.stem.removeprefix("test_"): p for p in sorted(ROOT.glob("tests/*/test_*.py"))}
    return [p for op, p in ops.items() if f"{kernel}_".startswith(f"{op}_")]


class Tree:
    """A copy of the sources in build/mutate with mutants built in, and its two builds."""

    path = ROOT / "build" / "mutate"

    def write(self, path: Path, text: str) -> None:
        """Write a file, unless it is that already, which would cost a build."""
        target = self.path / path
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    def fill(self, mutants: dict[int, Mutant]) -> dict[int, Mutant]:
        """Copy the sources with all mutants built in but those that are none at run time; return the others."""
        folders = [ROOT / folder for folder in ("csrc", "tests/simt", "third_party")]
        sources = {p.relative_to(ROOT) for f in folders for p in f.rglob("*.*") if p.is_file()}
        self.write(Path("mutant.h"), _RUNTIME)
        self.write(Path("tests/simt/mutant.cpp"), _ACTIVE)
        while True:
            for path in sources | {Path("CMakeLists.txt")}:
                if path.suffix not in (".py", ".pyc", ".md"):
                    self.write(path, schemata(path, {n: m for n, m in mutants.items() if m.path == path}))
            output = self.make("race")
            if not output:
                return mutants
            places = re.findall(r"(csrc/[\w./]+):(\d+):\d+: error", output)
            wrong = {n for n, m in mutants.items() if (str(m.path), str(m.line)) in places}
            if not wrong:
                raise SystemExit(f"{output}\nno mutant is to blame")
            mutants = {n: m for n, m in mutants.items() if n not in wrong}

    def make(self, build: str) -> str:
        """Bring a library up to date; return what the compiler says if it fails."""
        import torch

        folder = self.path / build
        if not (folder / "CMakeCache.txt").exists():
            # A loop that leaves its array is a mutant, not a promise to the optimiser.
            flags = f"-include {self.path}/mutant.h -fno-aggressive-loop-optimizations"
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            options = ["-DTOKRED_SIMT=ON", f"-DTOKRED_SANITIZE={build}", f"-DCMAKE_CXX_FLAGS={flags}"]
            options += ["-DCMAKE_BUILD_TYPE=Mutate", f"-DCMAKE_CXX_FLAGS_MUTATE={OPTIMISE[build]}"]
            options += [f"-DTOKRED_TORCH_DIR={Path(torch.__file__).parent}"]
            command = ["cmake", "-S", str(self.path), "-B", str(folder), *generator, *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        command = ["cmake", "--build", str(folder), "-j", "2", "--", "-k" + ("0" if shutil.which("ninja") else "")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout if done.returncode else ""

    def test(self, build: str, tests: Sequence[str], numbers: Sequence[int]) -> Iterator[tuple[int, str, str]]:
        """Run tests with each mutant; yield its number, "passed", "failed" or "endless", and the test that says so."""
        env = os.environ | {
            "TOKRED_LIBRARY": str(self.path / build / "libtokred_simt.so"),
            "TOKRED_MUTANTS": " ".join(map(str, numbers)),
            "TOKRED_SIMT_ADDR2LINE": "0",
            "TOKRED_SIMT_THREADS": "1",
        }
        if build == "address":
            # The second for the exceptions that the first watches.
            libraries = (f"-print-file-name={name}.so" for name in ("libasan", "libstdc++"))
            paths = (subprocess.check_output(["g++", option], text=True).strip() for option in libraries)
            env |= {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
        plugins = ["-p", "tests.simt.mutate_forks", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", "-s", *plugins, *tests]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            for line in server.stdout:
                if line.startswith("mutant "):
                    _, number, verdict, test = line.rstrip("\n").split(" ", 3)
                    yield int(number), verdict, test
                elif line.startswith(("E ", "ERROR")):
                    print(line, end="")


def try_all(tree: Tree, mutants: dict[int, Mutant], tests: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield each mutant's number with its verdict and the test behind it."""

    def run(build: str, numbers: Sequence[int]) -> Iterator[tuple[int, str, str]]:
        for number, verdict, test in tree.test(build, tests, [0, *numbers]):
            if number:
                yield number, verdict, test
            elif verdict != "passed":
                raise SystemExit(f"{build} build: the tests must pass on the unchanged kernel first; {test} {verdict}")

    survivors: list[int] = []
    for number, verdict, test in run("race", list(mutants)):
        if verdict == "passed" and mutants[number].kind != "barrier":
            survivors.append(number)
        else:
            yield number, verdict, test
    if survivors:
        if output := tree.make("address"):
            raise SystemExit(output)
        for number, verdict, test in run("address", survivors):
            yield number, verdict, f"{test} (address)" if test else ""


def row_of(mutant: Mutant, users: Sequence[str]) -> str:
    """Return the row of the final table: an op, or what several share."""
    return users[0] if len(users) == 1 else mutant.path.name


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simt.mutate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("op", nargs="*", help="ops with a .cu file, such as prune_topk; default: all, and common/")
    parser.add_argument("--only", action="append", metavar="FILE", help="mutate this file only")
    parser.add_argument("--kind", choices=KINDS, action="append", help="these mutants only")
    parser.add_argument("--excused", action="store_true", help="try those of SURVIVORS.md, too")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    args = parser.parse_args()

    kernels = {p.stem: p.relative_to(ROOT) for p in sorted(ROOT.glob("csrc/*/*.cu")) if p.parent.name != "common"}
    for op in args.op:
        if op not in kernels:
            parser.error(f"no csrc/*/{op}.cu; ops with one: {', '.join(kernels)}")
    files = {f for kernel in kernels.values() for f in device_files(kernel)}
    numbered = dict(enumerate((m for path in sorted(files) for m in mutants_of(path)), start=1))
    if args.only:
        if unknown := set(map(Path, args.only)) - files:
            parser.error(f"no kernel includes {', '.join(map(str, unknown))}")
        files = set(map(Path, args.only))
    elif args.op:  # without what is common: that needs the tests of all
        files = {f for op in args.op for f in device_files(kernels[op]) if f.parts[1] != "common"}
    chosen = {n: m for n, m in numbered.items() if m.path in files and m.kind in (args.kind or KINDS)}
    if args.list:
        print(*chosen.values(), sep="\n")
        return 0
    tree = Tree()
    built_in = tree.fill(numbered)
    # Files with the same users are one job: one process collects their tests.
    jobs: dict[tuple[str, ...], list[int]] = {}
    rows: dict[str, Counter[str]] = {}
    excused = SURVIVORS.read_text() if SURVIVORS.exists() else ""
    for n, m in chosen.items():
        if n not in built_in:
            continue  # an array's size
        users = tuple(op for op, kernel in kernels.items() if m.path in device_files(kernel))
        if m.key in excused and not args.excused:
            rows.setdefault(row_of(m, users), Counter())["excused"] += 1
        else:
            jobs.setdefault(users, []).append(n)

    survivors: list[Mutant] = []
    done, total = 0, sum(map(len, jobs.values()))
    for users, numbers in jobs.items():
        tests = list(dict.fromkeys(str(p.relative_to(ROOT)) for kernel in users for p in tests_of(kernel)))
        for n, verdict, test in try_all(tree, {n: chosen[n] for n in numbers}, tests):
            m = chosen[n]
            if verdict == "passed":
                verdict = "excused" if m.key in excused else "survived"
                survivors += [m] if verdict == "survived" else []
            elif m.key in excused:
                verdict += ", though excused"
            counted_as = verdict if verdict in ("excused", "survived") else "killed"
            rows.setdefault(row_of(m, users), Counter())[counted_as] += 1
            done += 1
            print(f"[{done}/{total}] {verdict}: {m}" + (f" by {test}" if test else ""), flush=True)
    return report(rows, survivors)


def report(rows: dict[str, Counter[str]], survivors: Sequence[Mutant]) -> int:
    """Print the table and the survivors; return the exit status."""
    print("\n| kernels | mutants | killed | excused | survived | share |\n|---|---|---|---|---|---|")
    rows["all"] = sum(rows.values(), Counter())
    for name, row in rows.items():
        counted = row["killed"] + row["survived"]
        share = row["killed"] / counted if counted else 1.0
        mutants_in_row = counted + row["excused"]
        print(f"| {name} | {mutants_in_row} | {row['killed']} | {row['excused']} | {row['survived']} | {share:.0%} |")
    print("Survivors, as SURVIVORS.md would list them with a reason:")
    for m in survivors:
        print(f"- {m.key}")
    return 0 if share >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
