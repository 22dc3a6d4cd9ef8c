# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokred import _cli, _doctor, _registry
from tokred.__main__ import main
from tokred.testing import assert_close, report, results


def tokred_command(*args):
    return subprocess.run([sys.executable, "-m", "tokred", *args], capture_output=True, text=True)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process: (exit status, output, errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tokred", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


def test_doctor_is_healthy_and_names_every_op():
    done = tokred_command("doctor", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("healthy")
    for op in _registry.ops():
        assert f"  {op.name} " in done.stdout
    assert torch.__version__ in done.stdout


def test_doctor_reports_a_wrong_op(monkeypatch, capsys):
    module = _registry.op("segment_expand").module
    monkeypatch.setattr(module, "reference", lambda y, dst_idx: torch.full((1,), 7.0))
    assert _doctor.run("cpu") == 1
    printed = capsys.readouterr().out
    assert "problem       segment_expand on cpu" in printed and "not healthy: 1 problem" in printed


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["80-real", "90a-real"], True),
        ((8, 6), ["80-real"], True),
        ((8, 0), ["86-real"], False),
        ((10, 0), ["80-real", "90a-real"], False),
        ((10, 0), ["90a-real", "90-virtual"], True),
        ((7, 5), ["80-real", "80-virtual"], False),
    ],
)
def test_doctor_knows_what_fits(capability, archs, runs):
    told = _doctor.fits(capability, archs)
    assert (told is None) == runs
    assert runs or "TOKRED_CUDA_ARCH_LIST" in told


def test_doctor_knows_old_drivers(monkeypatch):
    monkeypatch.setattr(_doctor, "driver_cuda_version", lambda: 12080)
    monkeypatch.setattr(_doctor, "driver_release", lambda: "570.10")
    _, problems, usable = _doctor._gpu_report("13.0", ["90a-real"])
    assert not usable and "580 or newer" in problems[0]
    monkeypatch.setattr(_doctor, "driver_cuda_version", lambda: 13000)
    assert _doctor._gpu_report("13.0", ["90a-real"])[1] == [] or torch.cuda.is_available()


def test_ops_and_methods_list():
    printed = tokred_command("ops").stdout
    for op in _registry.ops():
        assert f"tokred.{op.name}  [{op.family};" in printed and op.schemas[""] in printed
    assert "tokred.methods.tome" in tokred_command("methods").stdout


def test_native_plans_every_op():
    """tokred._native is there for the Python that built the library, and only then."""
    if importlib.util.find_spec("tokred._native") is None:
        assert "native        not for this Python" in tokred_command("doctor", "--device", "cpu").stdout
        return
    native = importlib.import_module("tokred._native")
    assert set(native.planned_ops()) == {op.name for op in _registry.ops()}
    sizes = {"batch_size": 8, "num_tokens": 576, "dim": 1024, "k": 192, "element_size": 2}
    plan = native.plan("prune_topk", sizes)
    assert plan["launches"][0]["kernel"] == "select_and_copy"
    with pytest.raises(ValueError, match="expected a size named k"):
        native.plan("prune_topk", {n: v for n, v in sizes.items() if n != "k"})


def test_every_benchmark_runs(tmp_path):
    path = tmp_path / "results.json"
    done = tokred_command("bench", "--smoke", "--threads", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.load(path)
    names = {op.name for op in _registry.ops()}
    for kind in ("time", "overhead"):
        rows = [row for row in found.rows if row.kind == kind]
        assert {row.op for row in rows} == names
        assert all(row.seconds["tokred"] > 0 and row.best_peer for row in rows)
    assert all(row.floor > 0 and row.memory for row in found.rows if row.kind == "time")
    assert found.peers["numpy"] and any("numpy" in row.seconds for row in found.rows)
    assert re.search(r"^1/\d+, --:-- left: ", done.stderr, re.M)
    page = tmp_path / "page.html"
    assert tokred_command("report", str(path), "--html", str(page)).returncode == 0
    assert all(name in page.read_text() for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "prune_everything"), "no benchmark of prune_everything; there are attend_selected, "),
        (("--peers", "numpy,cudnn"), "no peer cudnn; there are aten, compile, cub, "),
        (("--device", "tpu"), "expected --device cpu or cuda, got tpu"),
        (("--threads", "1,x"), "expected --threads like 1,2, got 1,x"),
        (("--threads", "0"), "expected --threads like 1,2, got 0"),
        (("--seconds", "-1"), "expected --seconds above 0, got -1"),
    ],
)
def test_bench_names_what_it_does_not_know(command, arguments, said):
    status, out, err = command("bench", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"tokred bench: {said}") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_needs_the_device(command):
    assert command("bench", "--device", "cuda") == (2, "", "tokred bench: torch sees no CUDA device\n")


def test_bench_needs_a_checkout(tmp_path):
    arguments = argparse.Namespace(op=None, device="cpu")
    with pytest.raises(ValueError, match="needs a checkout"):
        _cli._bench_request(arguments, tmp_path / "benchmarks")


def test_report_refuses_other_files(command, tmp_path):
    old, lost, page = tmp_path / "old.json", tmp_path / "lost.json", tmp_path / "page.html"
    old.write_text('{"schema": 1, "rows": []}')
    wrong = {old: "expected results of schema 2, got 1; measure again with tokred bench", lost: "No such file"}
    for path, said in wrong.items():
        for options in ((), ("--readme",), ("--html", page)):
            status, out, err = command("report", path, *options)
            assert (status, out) == (2, "") and not page.exists()
            assert err.startswith(f"tokred report: {path}: ") and said in err and err.count("\n") == 1


def test_report_prints_the_tables(command):
    paths = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
    status, out, err = command("report", *paths)
    assert (status, err) == (0, "")
    assert out == "\n\n".join(report.table(path) for path in paths) + "\n"


def test_a_failing_case_is_an_exit_status(command, monkeypatch):
    def failing(files, peers, options):
        assert set(files) == {"prune_topk"} and peers.wanted == [] and options.seconds == 0.3 and options.core
        return None, ["prune_topk (1, 2, 3): AssertionError: differs"]

    monkeypatch.setattr("tokred.testing.suite.run", failing)
    status, _, err = command("bench", "--op", "prune_topk", "--peers", "none", "--core")
    assert (status, err) == (1, "tokred bench: failed: prune_topk (1, 2, 3): AssertionError: differs\n")


def test_comparison_notices():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert_close(x, x.clone())
    for other in (torch.tensor([1.1, float("nan"), float("inf")]), torch.tensor([1.0, 2.0, float("inf")]), -x):
        with pytest.raises(AssertionError):
            assert_close(x, other)
    with pytest.raises(AssertionError, match="1 of 2 differ"):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]))
