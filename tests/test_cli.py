# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from tokred import _doctor, _registry
from tokred.testing import assert_close, bench


def tokred_command(*args):
    return subprocess.run([sys.executable, "-m", "tokred", *args], capture_output=True, text=True)


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
    assert plan["bytes"] == 8 * (576 * 4 + 2 * 192 * 2048 + 192 * 8)
    with pytest.raises(ValueError, match="expected a size named k"):
        native.plan("prune_topk", {n: v for n, v in sizes.items() if n != "k"})


def test_every_benchmark_runs(tmp_path):
    path = tmp_path / "results.json"
    done = tokred_command("bench", "--smoke", "--threads", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert {row["op"] for row in content["rows"]} == {op.name for op in _registry.ops()}
    assert all(row["seconds"]["tokred"] > 0 and row["speedup"] for row in content["rows"])


def test_bench_names_what_it_does_not_know():
    done = tokred_command("bench", "--op", "prune_everything")
    assert done.returncode == 2 and "no benchmark of prune_everything; there are" in done.stderr


def test_bench_compares_before_it_times():
    case = bench.Case(
        op="wrong",
        name="by one",
        dtype="float32",
        make=lambda i: (torch.arange(4.0),),
        run={"tokred": lambda x: x + 1, "peer": lambda x: x},
    )
    with pytest.raises(AssertionError, match="wrong by one: tokred against peer"):
        bench.measure(case, "cpu", 1, 1e9, smoke=True)


def test_comparison_notices():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert_close(x, x.clone())
    for other in (torch.tensor([1.1, float("nan"), float("inf")]), torch.tensor([1.0, 2.0, float("inf")]), -x):
        with pytest.raises(AssertionError):
            assert_close(x, other)
    with pytest.raises(AssertionError, match="1 of 2 differ"):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]))
