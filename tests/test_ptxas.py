# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""benchmarks/ptxas.py: what it reads from a build's log, and which changes it lets pass."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ptxas  # noqa: E402

PLAIN = "_ZN6tokred12_GLOBAL__N_16simpleENS_4ArgsE"  # void tokred::(anonymous namespace)::simple(tokred::Args)
TILED = "_ZN6tokred12_GLOBAL__N_15tiledIN3c104HalfELi8ELNS_4ModeE1EEEvPFviEi"  # takes a function: brackets in brackets


def entry(mangled, arch, registers, spill=0, shared=""):
    return f"""ptxas info    : Compiling entry function '{mangled}' for '{arch}'
ptxas info    : Function properties for {mangled}
    {spill} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}, 404 bytes cmem[0]
"""


def compiled(op, *entries):
    return (
        f"[1/9] /usr/local/cuda/bin/nvcc -O3 -x cu -c /src/csrc/{op}.cu -o CMakeFiles/x.dir/csrc/{op}.cu.o\n"
        + "".join(entries)
    )


LOG = (
    compiled("merge/one", entry(PLAIN, "sm_80", 99), entry(TILED, "sm_80", 50))
    + compiled("merge/two", entry(PLAIN, "sm_80", 40, spill=16), entry(PLAIN, "sm_90a", 44, shared=", 128 bytes smem"))
    + "[2/9] /usr/bin/c++ -c /src/csrc/merge/one.cpp -o one.cpp.o\n"
    + compiled("merge/one", entry(TILED, "sm_80", 51))  # a later build: simple is gone from this file
)
TILED_NAME = "tiled<Half, 8, (Mode)1>"
USAGES = {
    ptxas.Kernel("merge/one", TILED_NAME, "sm_80"): ptxas.Usage(51, 0, 0),
    ptxas.Kernel("merge/two", "simple", "sm_80"): ptxas.Usage(40, 0, 16),
    ptxas.Kernel("merge/two", "simple", "sm_90a"): ptxas.Usage(44, 128, 0),
}


def test_log_is_read():
    assert ptxas.parse_log(LOG) == USAGES
    assert ptxas.parse_log("[1/2] c++ -c /src/csrc/merge/one.cpp -o one.o\n") == {}


def test_report_is_what_was_built():
    assert ptxas.read_report(ptxas.write_report("13.0", USAGES)) == ("13.0", USAGES)


def test_stored_report_covers_every_kernel_file():
    _, stored = ptxas.read_report(ptxas.STORED.read_text())
    kernels = [path for path in ROOT.glob("csrc/*/*.cu") if "__global__" in path.read_text()]  # others only launch
    files = {str(path.relative_to(ROOT / "csrc").with_suffix("")) for path in kernels}
    assert {kernel.op for kernel in stored} == files, "run: make ptxas UPDATE=1"


KERNEL = ptxas.Kernel("merge/one", "simple", "sm_80")


@pytest.mark.parametrize(
    ("before", "after", "told", "worse"),
    [
        ((40, 0, 0), (40, 0, 0), None, False),
        ((40, 0, 0), (48, 0, 0), "-> 48 registers", False),
        ((40, 0, 0), (49, 0, 0), "-> 49 registers", True),
        ((40, 0, 0), (30, 0, 4), "4 spilled", True),
        ((40, 0, 8), (40, 0, 4), "8 spilled -> ", False),
        ((40, 0, 0), (40, 256, 0), "256 bytes shared", False),
        (None, (200, 0, 0), "new -> 200", False),
        (None, (40, 0, 4), "new -> 40", True),
        ((40, 0, 0), None, "-> gone", False),
    ],
)
def test_what_is_worse(before, after, told, worse):
    other = {ptxas.Kernel("merge/two", "simple", "sm_80"): ptxas.Usage(1, 0, 0)}  # so that sm_80 was built
    stored, built = ({**other, **({KERNEL: ptxas.Usage(*u)} if u else {})} for u in (before, after))
    changes = ptxas.compare(stored, built)
    assert len(changes) == (told is not None)
    if told:
        assert told in changes[0][0] and "merge/one: simple sm_80" in changes[0][0] and changes[0][1] == worse


def test_architectures_that_were_not_built_do_not_count():
    built = {kernel: usage for kernel, usage in USAGES.items() if kernel.arch == "sm_80"}
    assert ptxas.compare(USAGES, built) == []


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script on LOG with registers of one kernel raised by ``rise``; (exit status, printed)."""
    monkeypatch.setattr(ptxas, "STORED", tmp_path / "ptxas.txt")
    monkeypatch.setattr(ptxas, "find_cuobjdump", lambda: "cuobjdump")
    inside = {"80-real", "90-real"}
    monkeypatch.setattr(ptxas, "archs_inside", lambda library, tool: inside)

    def call(*arguments, rise=0, size=1000, nvcc="13.0"):
        (tmp_path / "build.log").write_text(LOG.replace("Used 51", f"Used {51 + rise}"))
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
            wheel.writestr("tokred/build_info.json", json.dumps({"cuda": nvcc, "cuda_archs": ["80-real", "90a-real"]}))
            wheel.writestr("tokred/libtokred.so", bytes(size))
        monkeypatch.setattr(sys, "argv", ["ptxas.py", str(tmp_path / "build.log"), str(tmp_path / "a.whl"), *arguments])
        return ptxas.main(), capsys.readouterr().out

    call.inside = inside
    return call


def test_script(run):
    assert run("--update")[0] == 0
    assert run()[0] == 0
    status, printed = run(rise=9)
    assert status == 1 and f"WORSE merge/one: {TILED_NAME} sm_80: 51 registers" in printed and "UPDATE=1" in printed
    assert run(rise=9, nvcc="13.1")[0] == 0  # another compiler allocates otherwise: shown, not judged
    assert run("--update", rise=9)[0] == 0
    assert run(rise=9)[0] == 0
    status, printed = run(rise=9, size=2 * 2 * ptxas.SIZE_BUDGET + 1)
    assert status == 1 and "size budget" in printed
    run.inside.remove("90-real")
    status, printed = run(rise=9)
    assert status == 1 and "expected 80-real, 90a-real inside" in printed
