# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""benchmarks/gpu_check.sh: what it says without a GPU, how stages run, how their logs are read. `make test-cpp`
rehearses the whole script."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu_check  # dataclasses look their module up
spec.loader.exec_module(gpu_check)


def script(*arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = script("--out", str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "sees no CUDA device" in done.stderr


def test_list_and_bad_arguments(tmp_path):
    names = ["build", "wrappers", "driver", "tests", "cuda", "bench", "memcheck", "racecheck", "synccheck", "initcheck"]
    listed = script("--list", "--out", str(tmp_path))
    assert [line.split()[0] for line in listed.stdout.splitlines()[::2]] == names
    for arguments, message in (
        (("--rehearse", "--only", "build,lint"), f"no stage named lint; there are {', '.join(names)}"),
        (("--wheel", str(tmp_path / "a.whl")), "does not exist"),
        (("--wheelhouse", str(tmp_path / "wheels")), "does not exist"),
    ):
        done = script(*arguments, "--out", str(tmp_path))
        assert done.returncode == 2 and message in done.stderr, done.stderr


def stage(name, command, budget=20.0, judge=gpu_check.by_status):
    return gpu_check.Stage(name, "of the test", budget, command, judge)


def run_all(stages, out, total=60.0, commit="abc"):
    return gpu_check.run_all(stages, out, {"gpu": None, "commit": commit}, dict(os.environ), total)


def test_a_failing_stage_stops_no_other(tmp_path, capsys):
    sleeper = stage("slow", "sleep 60 & wait", 1.0)
    stages = [stage("first", "echo one; false; echo two"), sleeper, stage("last", "echo fine")]
    start = time.monotonic()
    assert run_all(stages, tmp_path) == 1
    assert time.monotonic() - start < 20
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["state"] for row in report["stages"]] == ["failed", "timed out", "passed"]
    assert report["stages"][0]["result"] == "one" and report["stages"][2]["result"] == "fine"
    assert (tmp_path / "first.log").read_text().endswith("one\n")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["stage", "first", "slow", "last"]


def test_what_a_stage_started_ends_with_it(tmp_path):
    assert run_all([stage("leaves", f"(sleep 2; touch {tmp_path}/late) & echo done")], tmp_path) == 0
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_all_stages_share_the_total(tmp_path):
    assert run_all([stage("long", "sleep 30"), stage("next", "echo")], tmp_path, total=1.0) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["result"] for row in report["stages"]][1] == "no time was left to start it"


def test_a_second_call_keeps_what_the_first_has_found(tmp_path):
    def found():
        return {r["stage"]: r["state"] for r in json.loads((tmp_path / "gpu_check.json").read_text())["stages"]}

    assert run_all([stage("one", "false"), stage("two", "true")], tmp_path) == 1
    assert run_all([stage("two", "false"), stage("three", "true")], tmp_path) == 1
    assert found() == {"one": "failed", "two": "failed", "three": "passed"}
    assert run_all([stage("two", "true")], tmp_path, commit="def") == 0
    assert found() == {"two": "passed"}


def test_pytest_report(tmp_path):
    path = tmp_path / "tests.xml"
    judge = gpu_check.by_junit(path)
    assert judge(4, "ERROR: usage\n").state == "failed"
    cases = '<testcase name="good"/><testcase name="bad[cuda]"><failure/></testcase>'
    path.write_text(f'<testsuites><testsuite tests="2" failures="1" errors="0">{cases}</testsuite></testsuites>')
    outcome = judge(1, "")
    assert outcome.state == "failed" and outcome.result == "2 tests, 1 wrong: bad[cuda]"
    path.write_text('<testsuites><testsuite tests="2" failures="0" errors="0"/></testsuites>')
    assert judge(0, "").state == "passed"
    path.write_text('<testsuites><testsuite tests="0" failures="0" errors="0"/></testsuites>')
    assert judge(0, "").state == "failed"


RAN = "cuda: 35 of 35 tests passed\n"


@pytest.mark.parametrize(
    ("status", "log", "state"),
    [
        (0, f"{RAN}========= ERROR SUMMARY: 0 errors\n", "passed"),
        (
            0,
            f"{RAN}========= LEAK SUMMARY: 0 bytes leaked in 0 allocations\n========= ERROR SUMMARY: 0 errors",
            "passed",
        ),
        (0, f"{RAN}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
        (0, f"{RAN}========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", "failed"),
        (0, RAN, "failed"),  # nobody looked
        (0, "========= ERROR SUMMARY: 0 errors\n", "failed"),  # nothing ran
        (99, f"========= Invalid __global__ read of size 4 bytes\n{RAN}========= ERROR SUMMARY: 1 error\n", "failed"),
        (1, "========= Error: Device not supported. Please refer to the manual\n", "unavailable"),
        (99, "========= Error: Device not supported.\n========= ERROR SUMMARY: 3 errors\n", "unavailable"),
        (1, "========= compute-sanitizer: not found\n", "unavailable"),
        (1, "prune_topk: wrong\ncuda: 34 of 35 tests passed\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (99, "========= Internal Sanitizer Error\n========= Race reported between Write access\n", "failed"),
    ],
)
def test_sanitizer_report(status, log, state):
    assert gpu_check.by_sanitizer(status, log).state == state


def test_a_skipped_cuda_test_fails_where_cuda_is_required(tmp_path):
    test = tmp_path / "test_any.py"
    test.write_text(
        "import pytest\n\n@pytest.mark.parametrize('on', ['cpu', 'cuda'])\ndef test(on): pytest.skip('why')\n"
    )
    code = (
        "import sys, torch, pytest; torch.cuda.is_available = lambda: True\n"
        f"sys.exit(pytest.main(['-p', 'conftest', '-p', 'no:cacheprovider', '--rootdir', {str(tmp_path)!r}, {str(test)!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def run(required):
        command = [sys.executable, "-c", code]
        environment["TOKRED_REQUIRE_CUDA"] = required
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout

    assert "2 skipped" in run("0")
    assert "1 failed, 1 skipped" in run("1") and "TOKRED_REQUIRE_CUDA=1, but skipped" in run("1")
