# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import html
import json
import re
import shutil
import subprocess

import pytest

from tokred.testing import report
from tokred.testing.bench import Row
from tokred.testing.machine import Ceilings
from tokred.testing.results import SCHEMA, Results, WrongFile, load, save

FACTS = {"cpu": "A CPU of some <kind>", "cores": 2, "torch": "2.13", "tokred": "0.1.0", "commit": "abc"}


def row(**changes):
    fields = {
        "op": "prune_topk",
        "case": "(8, 576, 1024) keep 192",
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 1,
        "kind": "time",
        "copies": 3,
        "seconds": {"tokred": 2e-4, "topk+sort+index_select": 5e-4, "numpy": 4e-4, "product": 1e-4},
        "spread": {"tokred": 0.02, "topk+sort+index_select": 0.01, "numpy": 0.1, "product": 0.1},
        "memory": {"tokred": 3 << 20, "numpy": 0, "topk+sort+index_select": 5000},
        "bytes": 1e6,
        "floor": 1e-4,
        "reach": 1.6,
        "core": True,
        "unlike": {"product": "no selection"},
        "skipped": {"cub": "needs a GPU & nvcc"},
        "note": "scores without ties",
    }
    return Row(**{**fields, **changes})


@pytest.fixture
def results():
    late = {"tokred": 1e-5, "numpy": 4e-6}
    rows = [row(), row(threads=2, seconds={"tokred": 1e-4, "numpy": 1.2e-4}, spread={"tokred": 0, "numpy": 0})]
    rows.append(row(op="segment_merge", reach=None, case="a" * 60, skipped={}, unlike={}))
    modes = ("plain", "no_grad", "inference_mode")
    rows += [row(kind="overhead", case=f"call overhead, {m}", seconds=late, spread=late, floor=0.0) for m in modes]
    ceilings = [Ceilings("cpu", 1, 1e10, {"float32": 1e11, "bfloat16": 2e11}), Ceilings("cpu", 2, 1.1e10)]
    return Results(FACTS, ceilings, rows, {"numpy": "2.4"}, {"cub": "ImportError: no nvcc"}, "some.json")


@pytest.fixture
def gpu_results():
    eager = {"tokred": 3e-4, "numpy": 6e-4}
    rows = [row(device="cuda", reach=None, eager=eager), row(device="cuda", reach=None, core=False, case="more")]
    return Results(
        FACTS | {"gpu": "GPU X", "driver": "580.1"}, [Ceilings("cuda", 1, 4e12, {}, 1980)], rows, name="g.json"
    )


def test_files_come_back(results, tmp_path):
    path = tmp_path / "new" / "some.json"
    save(results, path)
    assert load(path) == results


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "expected JSON, got"),
        ("[]", "expected an object with results, got list"),
        ('{"schema": 1}', f"expected results of schema {SCHEMA}, got 1; measure again"),
        ('{"rows": []}', f"expected results of schema {SCHEMA}, got None"),
        (json.dumps({"schema": SCHEMA}), "does not hold it: 'facts'"),
        (
            json.dumps({"schema": SCHEMA, "facts": {}, "ceilings": [], "rows": [{"x": 1}], "peers": {}, "skipped": {}}),
            "unexpected keyword argument 'x'",
        ),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WrongFile) as error:
        load(path)
    assert message in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_the_table_holds_the_rows_with_an_aim(results):
    lines = report.results_table(results).splitlines()
    assert lines[0] == "A CPU of some <kind>, torch 2.13, tokred 0.1.0 at abc; `benchmarks/results/some.json`."
    assert lines[4:] == [
        "| `prune_topk` | (8, 576, 1024) keep 192 | bfloat16 | 200 us | 50% | 3.0 MiB | 2.00x numpy | 1.20x numpy | 1.6x |"
    ]


def test_an_aim_may_be_set_against_one_candidate(results):
    """The best peer is shown as ever, and beside the aim the ratios to what it names; what is unlike will do."""
    results.rows = [row(against="topk+sort+index_select"), row(against="topk+sort+index_select", threads=2)]
    assert report.results_table(results).endswith(
        "| 2.00x numpy | 2.00x numpy | 1.6x topk+sort+index_select: 2.50x, 2.50x |"
    )
    assert "aim 1.6x topk+sort+index_select: 2.50x, 2.50x met<" in report.page([results])
    results.rows = [row(against="product")]
    assert "aim 1.6x product: 0.50x missed<" in report.page([results])
    results.rows = [row(against="missing")]
    assert "aim" not in re.sub(r"<[^>]+>", " ", report.page([results]).split("<h3")[1])


def test_the_table_of_a_gpu_holds_its_core_rows(gpu_results):
    lines = report.results_table(gpu_results).splitlines()
    assert lines[0].startswith("GPU X, torch 2.13, driver 580.1") and "| against the best peer |" in lines[2]
    assert len(lines) == 5 and lines[4].endswith("| 2.00x numpy |  |")


def test_the_readme_is_brought_up_to_date(results, tmp_path):
    path = tmp_path / "some.json"
    save(results, path)
    begin, end = report.marks("some.json")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    new = report.put_table(text, path)
    assert new == f"before\n{begin}\n{report.table(path)}\n{end}\nafter\n" and report.put_table(new, path) == new
    assert report.tables_in(new) == ["some.json"]
    for wrong in ("nothing", f"{end}{begin}", text + text):
        with pytest.raises(WrongFile, match=r"README.md: expected one <!-- table of some.json -->"):
            report.put_table(wrong, path)


def test_the_page_needs_nothing_but_itself(results, gpu_results):
    text = report.page([results, gpu_results])
    assert "http" not in text and "<script" not in text and "@import" not in text and "url(" not in text
    assert 'name="viewport" content="width=device-width' in text and "prefers-color-scheme: dark" in text
    assert "A CPU of some &lt;kind&gt;" in text and "without cub: needs a GPU &amp; nvcc" in text


def test_the_page_says_in_text_what_bars_show(results, gpu_results):
    text = report.page([results, gpu_results])
    plain = re.sub(r"<[^>]+>", " ", text)
    for said in (
        "50% of the floor",
        "2.00x",
        "aim 1.6x missed",
        "200 us",
        "3.0 MiB",
        "call overhead",
        "10.0 us",
        "2.4",
    ):
        assert said in plain, said
    assert "SM clock 1980 MHz" in plain and "graph replay" in plain and "eager" in plain and "600 us" in plain
    assert text.count('class="bar" aria-hidden="true"') == text.count('class="bar"') > 0


def test_bars_end_at_eight_times_ours():
    slow = row(seconds={"tokred": 1e-3, "near": 4e-3, "far": 1e-1}, floor=5e-4)
    widths = re.findall(r'bar( cut)?" aria-hidden="true"><i style="width:([\d.]+)%', report._row_table(slow, True))
    assert widths == [("", "6.2"), ("", "12.5"), ("", "50.0"), (" cut", "100.0")]


def test_why_a_peer_is_missing_is_said_once(results):
    results.skipped = {"cub": "needs a GPU & nvcc"}
    results.rows = [row(), row(dtype="float32", skipped={"cub": "one row only"})]
    text = report.page([results])
    assert text.count("needs a GPU &amp; nvcc") == 1 and "without cub: one row only" in text


def test_an_aim_is_met_under_each_thread_count(results):
    slow = {"seconds": {"tokred": 1e-4, "numpy": 1.2e-4}, "spread": {}}
    for rows, word in (([row()], "met"), ([row(), row(threads=2)], "met"), ([row(), row(threads=2, **slow)], "missed")):
        results.rows = rows
        assert f"aim 1.6x {word}<" in report.page([results])


# A window of Chromium is 500 pixels wide at the least; a frame may be as narrow as a phone.
FRAME = """<!doctype html><title>none</title><iframe width={width} height=3000 style="border: 0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
const page = document.querySelector("iframe"), root = page.contentDocument;
const count = root.querySelectorAll("article").length;
document.title = [root.scrollingElement.scrollWidth, page.contentWindow.innerWidth, count].join(" "); }});</script>"""


@pytest.mark.parametrize("width", [390, 1300])
def test_the_page_in_a_browser(results, gpu_results, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium: the page itself is tested above, how a browser lays it out is not")
    text = report.page([results, gpu_results])
    page = tmp_path / "page.html"
    page.write_text(FRAME.format(width=width, page=html.escape(text)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,3000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    scroll_width, inner_width, articles = map(int, found.groups())
    assert inner_width == width and scroll_width <= inner_width
    assert articles == text.count("<article")
    assert "CONSOLE" not in done.stderr, done.stderr
