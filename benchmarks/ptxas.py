# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Registers and spills of every kernel, from the log of a CUDA build: python benchmarks/ptxas.py build/py311/build.log.

Fails when a kernel spills more than is written down here, so that a spill is a decision.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

#: Bytes of spill stores that a kernel may have, with the reason.
ALLOWED: dict[str, int] = {}


def kernels(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (registers, spilled bytes) by (mangled kernel, architecture)."""
    found, current, spill = {}, None, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            current, spill = (match[1], match[2]), 0
        elif match := re.search(r"(\d+) bytes spill stores", line):
            spill = int(match[1])
        elif (match := re.search(r"Used (\d+) registers", line)) and current:
            found[current] = (int(match[1]), spill)
            current = None
    return found


def main() -> int:
    """Print a table by kernel name; 1 when a kernel spills."""
    found = kernels(Path(sys.argv[1]).read_text())
    if not found:
        print("ptxas: the log names no kernel; was it a CUDA build from scratch?")
        return 1
    names = sorted({kernel for kernel, _ in found})
    demangled = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    short = {m: re.sub(r"^void |\(anonymous namespace\)::|tokred::|<.*|\(.*", "", d) for m, d in zip(names, demangled)}
    table: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for (kernel, arch), numbers in found.items():
        table[short[kernel], arch].append(numbers)
    print(f"{'kernel':36} {'arch':8} {'variants':>8} {'registers':>11} {'spill bytes':>11}")
    failed = False
    for (kernel, arch), numbers in sorted(table.items()):
        registers, spills = [r for r, _ in numbers], max(s for _, s in numbers)
        print(f"{kernel:36} {arch:8} {len(numbers):8} {min(registers):5}-{max(registers):<5} {spills:11}")
        failed = failed or spills > ALLOWED.get(kernel, 0)
    if failed:
        print("ptxas: a kernel spills more than benchmarks/ptxas.py allows")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
