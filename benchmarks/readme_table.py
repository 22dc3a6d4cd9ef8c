# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The README's result tables, from the JSON in benchmarks/results/: python benchmarks/readme_table.py."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CPU, DIGITS = "cpu-cascade-lake-2-cores.json", "digits-cpu.json"


def cpu_table() -> str:
    """Return the rows that have an aim, one thread beside two."""
    content = json.loads((RESULTS / CPU).read_text())
    facts, rows = content["facts"], content["rows"]
    lines = [
        f"{facts['cpu']}, torch {facts['torch']}, medians of interleaved runs; `benchmarks/results/{CPU}`.",
        "",
        "| op | case | dtype | 1 thread | 2 threads | aim |",
        "|---|---|---|---|---|--:|",
    ]
    by_key = {(r["op"], r["case"], r["dtype"], r["threads"]): r for r in rows}

    def ratios(row: dict[str, Any]) -> str:
        return ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["speedup"].items())

    for r in rows:
        if r["threads"] == 1 and r["reach"]:
            other = by_key[r["op"], r["case"], r["dtype"], 2]
            lines.append(
                f"| `{r['op']}` | {r['case']} | {r['dtype']} | {ratios(r)} | {ratios(other)} | {r['reach']:g}x |"
            )
    return "\n".join(lines)


def digits_table() -> str:
    """Return the demo's table."""
    content = json.loads((RESULTS / DIGITS).read_text())
    lines = ["| | mean tokens per block | accuracy | images/s | speed-up |", "|---|--:|--:|--:|--:|"]
    for r in content["rows"]:
        name = ", ".join(part for part in (r["method"], r["budget"]) if part)
        accuracy = 100 * (1 - r["num_wrong"] / r["num_images"])
        lines.append(
            f"| {name} | {r['mean_tokens']:.0f} | {accuracy:.1f}% | {r['images_per_second']:.0f} | {r['speedup']:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(digits_table(), cpu_table(), sep="\n\n")
