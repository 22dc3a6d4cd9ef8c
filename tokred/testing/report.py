# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Results for people: the README's tables, and one page that needs nothing but itself."""

import html
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokred.testing.bench import Row, rate, si
from tokred.testing.results import Results, WrongFile, load, read_json

Cases = dict[tuple[str, str, str], list[Row]]


def by_case(rows: Iterable[Row]) -> Cases:
    """Return the rows of each (op, case, dtype): one for each thread count."""
    found: Cases = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.dtype), []).append(row)
    return found


def size(num_bytes: float) -> str:
    """Return bytes as KiB or MiB; what is below a page is nothing that was seen."""
    if num_bytes < 4096:
        return "none seen"
    scaled, unit = (num_bytes / 2**20, "MiB") if num_bytes >= 2**18 else (num_bytes / 2**10, "KiB")
    return f"{scaled:.0f} {unit}" if scaled >= 10 else f"{scaled:.1f} {unit}"


def _against_best(row: Row) -> str:
    best = row.best_peer
    return f"{row.speedup[best]:.2f}x {best}" if best else ""


def _aim_text(rows: Sequence[Row]) -> str:
    """Return the aim; where it is set against one candidate, that and the ratios to it, too."""
    first = rows[0]
    if not first.reach or not first.against:
        return f"{first.reach:g}x" if first.reach else ""
    return f"{first.reach:g}x {first.against}: {', '.join(f'{row.reached:.2f}x' for row in rows if row.reached)}"


def machine_line(results: Results) -> str:
    """Return the machine and versions in a line."""
    facts = results.facts
    where = facts.get("gpu") or facts["cpu"]
    driver = f", driver {facts['driver']}" if facts.get("driver") else ""
    return f"{where}, torch {facts['torch']}{driver}, tokred {facts['tokred']} at {facts['commit']}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def results_table(results: Results) -> str:
    """Return the rows that state an aim, or the core rows where none does, as Markdown."""
    rows = [row for row in results.rows if row.kind == "time"]
    chosen = [row for row in rows if row.reach] or [row for row in rows if row.core]
    on_cpu = not results.facts.get("gpu")
    counts = sorted({row.threads for row in chosen})
    head = [f"against the best peer{', ' + _threads(c) if on_cpu else ''}" for c in counts]
    lines = [
        f"{machine_line(results)}; `benchmarks/results/{results.name}`.",
        "",
        f"| op | case | dtype | time | of the floor | extra memory | {' | '.join(head)} | aim |",
        f"|---|---|---|--:|--:|--:|{'---|' * len(counts)}---|",
    ]
    for (op, case, dtype), found in by_case(chosen).items():
        first = found[0]
        ratios = {row.threads: _against_best(row) for row in found}
        floor = f"{100 * first.floor_share:.0f}%" if first.floor else ""
        memory = size(first.memory["tokred"]) if "tokred" in first.memory else ""
        cells = [f"`{op}`", case, dtype, si(first.seconds["tokred"], "s"), floor, memory]
        cells += [ratios.get(count, "") for count in counts]
        lines.append(f"| {' | '.join([*cells, _aim_text(found)])} |")
    return "\n".join(lines)


def demo_table(content: dict[str, Any]) -> str:
    """Return the table of the demo (``examples/demo.py``), whose results are a file of their own kind."""
    lines = ["| | mean tokens per block | accuracy | images/s | speed-up |", "|---|--:|--:|--:|--:|"]
    for r in content["rows"]:
        name = ", ".join(part for part in (r["method"], r["budget"]) if part)
        accuracy = 100 * (1 - r["num_wrong"] / r["num_images"])
        lines.append(
            f"| {name} | {r['mean_tokens']:.0f} | {accuracy:.1f}% | {r['images_per_second']:.0f} | {r['speedup']:.2f}x |"
        )
    return "\n".join(lines)


def table(path: Path) -> str:
    """Return the Markdown table of a results file, of the benchmarks or of the demo."""
    content = read_json(path)
    if "prune_layer" in content:
        return demo_table(content)
    return results_table(load(path))


def marks(name: str) -> tuple[str, str]:
    """Return the comments between which the README keeps the table of a file."""
    return f"<!-- table of {name} -->", f"<!-- end of {name} -->"


def put_table(text: str, path: Path) -> str:
    """Return the README's text with the table of a file brought up to date."""
    new = table(path)
    begin, end = marks(path.name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise WrongFile(f"README.md: expected one {begin} and, after it, one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def tables_in(text: str) -> list[str]:
    """Return the names of the files whose tables the README keeps."""
    return re.findall(r"<!-- table of (\S+) -->", text)


_STYLE = """
:root { color-scheme: light dark; --ink: #16202b; --soft: #5b6875; --line: #dde3e9; --page: #f5f7f9; --card: #ffffff;
  --ours: #0b7a75; --peer: #a9b6c2; --best: #6d7f90; --floor: #d98e04; --track: #eef2f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9aa8b5; --line: #2c3742; --page: #10161c;
  --card: #182029; --ours: #35b8ae; --peer: #4a5967; --best: #8396a8; --floor: #f0b23e; --track: #222d38; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; overflow-wrap: anywhere; }
h3 { font: 600 17px/1.3 ui-monospace, Menlo, Consolas, monospace; margin: 32px 0 10px; }
h4 { font-size: 14px; margin: 0; overflow-wrap: anywhere; }
p { margin: 4px 0 10px; max-width: 75ch; } a { color: var(--ours); } .soft, caption, th { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
caption { text-align: left; padding: 8px 0 2px; font-size: 13px; }
th { font-weight: 500; text-align: right; font-size: 12px; vertical-align: bottom; }
td { padding: 3px 0 3px 8px; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: anywhere; width: 99%; }
th { padding-left: 8px; } .plain td, .plain th { padding: 4px 0 4px 10px; border-top: 1px solid var(--line); }
.plain td:first-child, .plain th:first-child { padding-left: 0; white-space: nowrap; width: auto; }
.bar { display: block; height: 7px; border-radius: 4px; background: var(--track); margin-top: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--peer); }
.bar.cut i { -webkit-mask: linear-gradient(90deg, #000 88%, transparent); mask: linear-gradient(90deg, #000 88%, transparent); }
.best i { background: var(--best); } .ours i { background: var(--ours); } .floor i { background: var(--floor); }
.ours td { font-weight: 650; } .floor td { color: var(--soft); } .unlike td { font-style: italic; color: var(--soft); }
.badge { display: inline-block; border-radius: 9px; padding: 0 8px; font-size: 12px; border: 1px solid var(--line); }
.met { color: var(--ours); border-color: currentColor; } .missed { color: var(--floor); border-color: currentColor; }
.note { font-size: 12px; color: var(--soft); margin: 6px 0 0; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 8px 0; font-size: 13px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.card.wide { margin: 10px 0; }
"""


def _e(text: object) -> str:
    return html.escape(str(text))


def _name(text: str) -> str:
    """Return a candidate's name, which may break after its joints."""
    return re.sub(r"([+_])", r"\1<wbr>", _e(text))


def _bar(seconds: float, longest: float) -> str:
    """Return a bar; what is longer than the scale fades out at its end."""
    share = min(1.0, max(0.01, seconds / longest))
    cut = " cut" if seconds > longest else ""
    return f'<span class="bar{cut}" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'


def _row_table(row: Row, on_cpu: bool) -> str:
    """One measurement: the floor, tokred, and its peers from fast to slow."""
    # One peer that is far behind would shrink all other bars to nothing.
    longest = min(max(*row.seconds.values(), row.floor), 8 * max(row.seconds["tokred"], row.floor))
    where = _threads(row.threads) if on_cpu else "graph replay"
    caption = f"{where}: {rate(row)}"
    if row.floor:
        caption += f", <b>{100 * row.floor_share:.0f}% of the floor</b>"
    eager = bool(row.eager)
    head = ["", "time", *(["eager"] if eager else []), "ratio", "memory"]
    lines = [f"<table><caption>{caption}</caption><tr>{''.join(f'<th scope=col>{h}</th>' for h in head)}</tr>"]
    if row.floor:
        blank = "<td></td>" * (len(head) - 2)
        lines.append(
            f'<tr class="floor"><td>floor{_bar(row.floor, longest)}</td><td>{si(row.floor, "s")}</td>{blank}</tr>'
        )
    for name, seconds in sorted(row.seconds.items(), key=lambda item: (item[0] != "tokred", item[1])):
        kind = (
            "ours" if name == "tokred" else "unlike" if name in row.unlike else "best" if name == row.best_peer else ""
        )
        cells = [si(seconds, "s")]
        if eager:
            cells.append(si(row.eager[name], "s") if name in row.eager else "")
        cells.append("" if name == "tokred" else f"{row.speedup[name]:.2f}x")
        cells.append(size(row.memory[name]) if name in row.memory else "")
        inner = "".join(f"<td>{_e(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{kind}"><td>{_name(name)}{_bar(seconds, longest)}</td>{inner}</tr>')
    return "".join(lines) + "</table>"


def _aim(rows: Sequence[Row]) -> str:
    first = rows[0]
    ratios = [row.reached for row in rows if row.reached]
    if not first.reach or not ratios:
        return ""
    word = "met" if min(ratios) >= first.reach else "missed"  # under each thread count
    return f' <span class="badge {word}">aim {_e(_aim_text(rows))} {word}</span>'


def _card(rows: Sequence[Row], results: Results) -> str:
    first, on_cpu = rows[0], not results.facts.get("gpu")
    parts = [f'<article class="card"><h4>{_e(first.case)} <span class="soft">{_e(first.dtype)}</span>{_aim(rows)}</h4>']
    parts += [_row_table(row, on_cpu) for row in rows]
    notes = [first.note, *(f"{name}: {why}" for name, why in first.unlike.items())]
    # Why a peer did not run at all is said once, among the facts.
    notes += [f"without {name}: {why}" for name, why in first.skipped.items() if results.skipped.get(name) != why]
    parts += [f'<p class="note">{_e(note)}</p>' for note in notes if note]
    return "".join(parts) + "</article>"


def _overhead(rows: Sequence[Row]) -> str:
    """Call overhead, a column per mode."""
    names = list(rows[0].seconds)
    head = "".join(f"<th scope=col>{_e(row.case.removeprefix('call overhead, '))}</th>" for row in rows)
    lines = [f'<article class="card"><h4>call overhead <span class="soft">{_e(rows[0].dtype)}</span></h4>']
    lines.append(f"<table><caption>host time of a call with tiny inputs</caption><tr><th></th>{head}</tr>")
    for name in names:
        cells = "".join(f"<td>{si(row.seconds[name], 's')}</td>" for row in rows)
        lines.append(f'<tr class="{"ours" if name == "tokred" else ""}"><td>{_name(name)}</td>{cells}</tr>')
    return "".join(lines) + f'</table><p class="note">{_e(rows[0].note)}</p></article>'


def _overview(rows: Sequence[Row], prefix: str) -> str:
    lines = [
        '<table class="plain"><tr><th scope=col>op</th><th scope=col>cases</th><th scope=col>against the best peer</th>'
    ]
    lines.append("<th scope=col>of the floor</th></tr>")
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op and row.kind == "time"]
        ratios = [row.speedup[row.best_peer] for row in mine if row.best_peer]
        shares = [row.floor_share for row in mine if row.floor]
        against = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else ""
        share = f"{100 * statistics.median(shares):.0f}%" if shares else ""
        cases = len(by_case(mine))
        link = f'<a href="#{prefix}-{_e(op)}">{_e(op)}</a>'
        lines.append(f"<tr><td>{link}</td><td>{cases}</td><td>{against}</td><td>{share}</td></tr>")
    return (
        "".join(lines)
        + '</table><p class="note">Medians over the cases and thread counts; lowest and highest in brackets.</p>'
    )


def _facts(results: Results) -> str:
    shown = {key.replace("_", " "): value for key, value in results.facts.items() if value is not None}
    for ceiling in results.ceilings:
        products = ", ".join(f"{dtype} {si(rate_, 'FLOP/s')}" for dtype, rate_ in ceiling.matrix.items())
        clock = f"; SM clock {ceiling.sm_clock_mhz} MHz under it" if ceiling.sm_clock_mhz else ""
        where = f" {_threads(ceiling.threads)}" if ceiling.device == "cpu" else ""
        shown[f"ceilings{where}"] = f"copy {si(ceiling.copy, 'B/s')}; matrix product {products}{clock}"
    if results.peers:
        shown["peers"] = ", ".join(f"{name} {version}" for name, version in results.peers.items())
    if results.skipped:
        shown["not run"] = "; ".join(f"{name}: {why}" for name, why in results.skipped.items())
    return "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in shown.items()) + "</dl>"


def _run(results: Results, number: int) -> str:
    prefix = f"run{number}"
    where = results.facts.get("gpu") or results.facts["cpu"]
    parts = [f"<h2>{_e(where)}</h2>", f'<div class="card wide">{_facts(results)}</div>']
    parts.append(f'<div class="card wide">{_overview(results.rows, prefix)}</div>')
    for op in dict.fromkeys(row.op for row in results.rows):
        mine = [row for row in results.rows if row.op == op]
        cards = [_card(rows, results) for rows in by_case(row for row in mine if row.kind == "time").values()]
        late = [row for row in mine if row.kind == "overhead"]
        cards += [_overhead(late)] if late else []
        parts.append(f'<h3 id="{prefix}-{_e(op)}">{_e(op)}</h3><div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def page(runs: Sequence[Results]) -> str:
    """Return one HTML page of all runs: no script, no font, no picture, no network."""
    intro = (
        "Each box is one problem, solved by tokred and by its peers in the same run on the same inputs; outputs are compared "
        "with the reference before anything is timed. Bars are times: shorter is better; one that fades goes on. The floor is "
        "the time of a perfect kernel, which moves each byte once and computes no flop twice, at the copy bandwidth and matrix "
        "rate measured in the same run. The ratio is a peer's time over tokred's. Memory is what a call takes beside its "
        "inputs, outputs included."
    )
    body = "".join(_run(results, number) for number, results in enumerate(runs))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>tokred benchmarks</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>tokred benchmarks</h1><p>{intro}</p>{body}</main></body></html>\n"
    )
