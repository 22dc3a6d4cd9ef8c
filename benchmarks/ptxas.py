# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What a CUDA build shows without a GPU: python benchmarks/ptxas.py build/py311/build.log dist/tokred-*.whl [--update].

Holds registers, shared memory and spills of every kernel against benchmarks/ptxas.txt and shows what changed; lists the
architectures inside the library where cuobjdump is there; holds the library against its size budget. --update writes the
file anew, so that a spill or a rise in registers is a decision that a reviewer sees.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

STORED = Path(__file__).with_name("ptxas.txt")
#: A rise beyond this fails. Hardware hands out registers 8 to a thread at a time, so less is noise of the allocator.
REGISTER_MARGIN = 8
#: Bytes of library per op and architecture: 40 ops for 5 architectures then fit 100 MB, the largest file that the Python
#: package index takes.
SIZE_BUDGET = 500_000


class Kernel(NamedTuple):
    """One instantiation for one architecture."""

    op: str  # family/name, after the file
    name: str  # with template arguments
    arch: str


class Usage(NamedTuple):
    """What ptxas said. ``shared`` is static; kernels here ask for theirs at launch (see the op's plan)."""

    registers: int
    shared: int  # bytes a block
    spill: int  # bytes of stores a thread

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} bytes shared, {self.spill} spilled"


def short_names(mangled: list[str]) -> list[str]:
    """Return kernels as the source names them, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for name in done.stdout.splitlines():
        name = re.sub(r"^void |\(anonymous namespace\)::|tokred::|c10::", "", name)
        depth, end = 0, len(name)
        while name.endswith(")") and (end == len(name) or depth):  # back to the bracket that opens the parameters
            end -= 1
            depth += (name[end] == ")") - (name[end] == "(")
        names.append(name[:end])
    return names


def parse_log(log: str) -> dict[Kernel, Usage]:
    """Return what the log of a verbose build says. A log of several builds counts by each file's last."""
    found: dict[str, dict[tuple[str, str], Usage]] = {}
    op, current, spill = "", None, 0
    for line in log.splitlines():
        if match := re.search(r" -c \S*/csrc/(\S+)\.cu(?: |$)", line):
            op, current = match[1], None
            found[op] = {}
        elif match := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            current, spill = (match[1], match[2]), 0
        elif match := re.search(r"(\d+) bytes spill stores", line):
            spill = int(match[1])
        elif (match := re.search(r"Used (\d+) registers", line)) and current:
            shared = re.search(r"(\d+) bytes smem", line)
            found[op][current] = Usage(int(match[1]), int(shared[1]) if shared else 0, spill)
            current = None
    flat = [(op, *key, usage) for op, usages in found.items() for key, usage in usages.items()]
    names = short_names([mangled for _, mangled, _, _ in flat])
    return {Kernel(op, name, arch): usage for name, (op, _, arch, usage) in zip(names, flat)}


def write_report(nvcc: str, usages: dict[Kernel, Usage]) -> str:
    """Return the stored form, one line per instantiation and architecture."""
    width = max(len(kernel.name) for kernel in usages)
    op_width = max(len(kernel.op) for kernel in usages)
    lines = [f"nvcc {nvcc}", f"{'op':{op_width}} {'kernel':{width}} {'arch':7} registers shared spill"]
    for kernel, usage in sorted(usages.items()):
        numbers = f"{usage.registers:9} {usage.shared:6} {usage.spill:5}"
        lines.append(f"{kernel.op:{op_width}} {kernel.name:{width}} {kernel.arch:7} {numbers}")
    return "\n".join(lines) + "\n"


def read_report(text: str) -> tuple[str, dict[Kernel, Usage]]:
    """Return (nvcc release, usages) of the stored form."""
    first, _, *lines = text.splitlines()
    usages = {}
    for line in lines:
        rest, registers, shared, spill = line.rsplit(None, 3)
        left, arch = rest.rsplit(None, 1)
        op, name = left.split(None, 1)
        usages[Kernel(op, name.rstrip(), arch)] = Usage(int(registers), int(shared), int(spill))
    return first.removeprefix("nvcc "), usages


def compare(
    stored: dict[Kernel, Usage], built: dict[Kernel, Usage], margin: float = REGISTER_MARGIN
) -> list[tuple[str, bool]]:
    """Return (line, whether it fails) for each change. Architectures that were not built are left out."""
    archs = {kernel.arch for kernel in built}
    changes = []
    for kernel in sorted({k for k in stored if k.arch in archs} | built.keys()):
        before, after = stored.get(kernel), built.get(kernel)
        if before == after:
            continue
        worse = after is not None and (
            after.spill > (before.spill if before else 0)
            or (before is not None and after.registers > before.registers + margin)
        )
        changes.append((f"{kernel.op}: {kernel.name} {kernel.arch}: {before or 'new'} -> {after or 'gone'}", worse))
    return changes


def find_cuobjdump() -> str | None:
    """Return a cuobjdump: on PATH, in the toolkit, or one that triton brings, here or beside CI's other torches."""
    spec = importlib.util.find_spec("triton")
    tritons = list((spec.submodule_search_locations if spec else None) or ())
    tritons += sorted(STORED.resolve().parents[1].glob(".venvs/*/lib/python*/site-packages/triton"))
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    places += [Path(place, "backends/nvidia/bin") for place in tritons]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def archs_inside(library: Path, cuobjdump: str) -> set[str]:
    """Return the architectures of a library: "80-real", "120-virtual". Of 90a, a cuobjdump of CUDA 12 reads 90."""
    found = set()
    for option, kind in (("--list-elf", "real"), ("--list-ptx", "virtual")):
        listed = subprocess.run([cuobjdump, option, str(library)], capture_output=True, text=True).stdout
        found |= {f"{arch}-{kind}" for arch in re.findall(r"\.(?:sm|compute)_(\d+)\w*\.", listed)}
    return found


def main() -> int:
    """Print the comparison; 1 when something is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what the build printed: build/py*/build.log")
    parser.add_argument("wheel", type=Path, help="the wheel of that build")
    parser.add_argument("--update", action="store_true", help=f"write {STORED.name} instead of comparing with it")
    options = parser.parse_args()

    built = parse_log(options.log.read_text())
    if not built:
        print(f"ptxas: {options.log} names no kernel; was it a CUDA build?")
        return 1
    problems = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.wheel) as wheel:
        info = json.loads(wheel.read("tokred/build_info.json"))
        library = Path(wheel.extract("tokred/libtokred.so", folder))
        num_ops = len({kernel.op for kernel in built})
        budget, size = num_ops * len(info["cuda_archs"]) * SIZE_BUDGET, library.stat().st_size
        print(f"library: {size / 1e6:.1f} MB of at most {budget / 1e6:.1f} MB, {num_ops} ops")
        if size > budget:
            problems.append("the library is over its size budget")
        if cuobjdump := find_cuobjdump():
            inside = archs_inside(library, cuobjdump)
            print(f"architectures inside, by cuobjdump: {', '.join(sorted(inside))}")
            if inside != {re.sub(r"[a-z]+-", "-", arch) for arch in info["cuda_archs"]}:
                problems.append(f"expected {', '.join(info['cuda_archs'])} inside the library")
        else:
            print("architectures inside: not listed, no cuobjdump was found (PATH, CUDA_HOME, triton)")

    if options.update:
        STORED.write_text(write_report(info["cuda"], built))
        print(f"kernels: {len(built)} written to {STORED.name}")
    else:
        nvcc, stored = read_report(STORED.read_text())
        same = nvcc == info["cuda"]
        changes = compare(stored, built, REGISTER_MARGIN if same else float("inf"))
        print(
            f"kernels: {len(built)} built by nvcc {info['cuda']}, {len(changes)} changes from {STORED.name} (nvcc {nvcc})"
        )
        for line, worse in changes:
            print(f"  {'WORSE ' if worse else ''}{line}")
        if any(worse for _, worse in changes):
            problems.append(
                f"a kernel spills more, or takes over {REGISTER_MARGIN} registers more; if it is worth it: make ptxas UPDATE=1"
            )
    for problem in problems:
        print(f"ptxas: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
