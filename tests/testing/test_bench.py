# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import io
import json
import sys
from pathlib import Path

import pytest
import torch

import tokred
from tokred import _registry
from tokred.testing import bench, machine, suite
from tokred.testing.peers import Peers, load_file
from tokred.testing.timing import CpuTimer, CudaTimer, storages, tensors

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import FakeCuda

BENCHMARKS = Path(tokred.__file__).parents[1] / "benchmarks"
FILES = {path.stem.removeprefix("bench_"): path for path in sorted(BENCHMARKS.glob("*/bench_*.py"))}
CEILINGS = machine.Ceilings("cpu", 1, copy=1e10, matrix={"float32": 1e11, "bfloat16": 1e11})


def add_case(**changes):
    """A case of segment_expand, whose reference defines what is right."""
    y, dst_idx = torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[2, 0, 1, 2]])
    right = _registry.op("segment_expand").module.reference
    fields = {
        "op": "segment_expand",
        "name": "tiny",
        "dtype": "float32",
        "make": lambda i: (y, dst_idx),
        "run": {"tokred": tokred.segment_expand, "peer": right},
    }
    return bench.Case(**{**fields, **changes})


def measured(case, peers=None):
    return bench.measure(case, CpuTimer(), CEILINGS, peers or Peers("cpu"), smoke=True)


def test_a_row_states_what_was_measured():
    row = measured(add_case(reach=2.0, unlike={"peer": "for the test"}))
    assert row.seconds.keys() == row.spread.keys() == row.how.keys() == {"tokred", "peer"}
    assert (row.copies, row.threads, row.kind, row.core) == (2, 1, "time", True)
    assert row.bytes == 32 + 7 * 8 and row.floor == row.bytes / 1e10
    assert row.floor_share == row.floor / row.seconds["tokred"]
    assert row.speedup == {"peer": row.seconds["peer"] / row.seconds["tokred"]}
    assert row.best_peer is None, "what is unlike is no peer"
    assert row.reached is None
    assert "segment_expand" in bench.show(row) and "(aim 2x)" in bench.show(row)
    row = measured(add_case(reach=2.0, against="peer", unlike={"peer": "for the test"}))
    assert row.reached == row.speedup["peer"] and "(aim 2x peer)" in bench.show(row)


@pytest.mark.parametrize("wrong", ["tokred", "peer"])
def test_wrong_outputs_are_not_timed(wrong):
    case = add_case()
    case.run[wrong] = lambda y, dst_idx: y[:, dst_idx[0]] + 1
    with pytest.raises(AssertionError, match=f"segment_expand tiny float32: {wrong} against the reference"):
        measured(case)


def plug_in(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "lib.py").write_text(text)
    return Peers("cpu", folder)


HEAD = "from tokred.testing.peers import NotApplicable, Peer\nVERSION, DEVICES = '1.2', ('cpu',)\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise OSError('no driver')", "OSError: no driver"),
        (HEAD.replace("'cpu'", "'cuda'") + "OPS = {}", "runs on cuda, not on cpu"),
        (
            HEAD + "def no(*a): raise NotApplicable('even sizes only')\nOPS = {'segment_expand': Peer(no, no)}",
            "even sizes only",
        ),
        (HEAD + "OPS = {'segment_expand': Peer(lambda y, d: y[:, d[0]] + 1)}", "AssertionError: segment_expand tiny"),
        (HEAD + "OPS = {'segment_expand': Peer(lambda y, d: 1 / 0)}", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_plug_in_that_cannot_run_is_left_out_with_the_reason(tmp_path, text, reason):
    row = measured(add_case(peers=("lib",)), plug_in(tmp_path, text))
    assert "lib" not in row.seconds and row.skipped["lib"].startswith(reason)


def test_a_plug_in_that_runs(tmp_path):
    text = HEAD + (
        "OPS = {'segment_expand': Peer(lambda y, d: [y, d], lambda y, d: (y.numpy(), d), lambda o: "
        "__import__('torch').from_numpy(o[0])[:, o[1][0]])}"
    )
    peers = plug_in(tmp_path, text)
    row = measured(add_case(peers=("lib",)), peers)
    assert row.seconds["lib"] > 0 and peers.versions == {"lib": "1.2"} and not row.skipped
    peers.wanted = ["lib"]
    assert measured(add_case(peers=("lib",)), peers).seconds.keys() == {"tokred", "lib"}
    peers.wanted = []
    assert measured(add_case(peers=("lib",)), peers).seconds.keys() == {"tokred"}


def test_a_smoke_run_leaves_out_what_compiles(tmp_path):
    peers = plug_in(tmp_path, HEAD + "COMPILES, OPS = True, {'segment_expand': Peer(lambda y, d: y[:, d[0]])}")
    peers.quick = True
    row = measured(add_case(peers=("lib",), compiled=("peer",)), peers)
    assert row.seconds.keys() == {"tokred", "peer"} and "smoke" in row.skipped["lib"]


def test_plug_ins_are_known_by_name(tmp_path):
    peers = plug_in(tmp_path, HEAD + "OPS = {}")
    assert peers.known() == ["aten", "compile", "lib"]
    with pytest.raises(KeyError, match="has no segment_expand"):
        measured(add_case(peers=("lib",)), peers)
    with pytest.raises(KeyError, match="no peer named other"):
        measured(add_case(peers=("other",)), peers)


def test_compiled_compositions_are_peers():
    compiled = load_file(FILES["segment_expand"])
    case = next(iter(compiled.cases("cpu", True)))
    case.compiled = ("index_select",)
    row = measured(case, Peers("cpu", wanted=["compile"]))
    assert row.seconds.keys() == {"tokred", "compiled index_select"} and not row.skipped


def test_call_overhead_is_a_row_per_mode():
    seen = set()

    def run(y, dst_idx):
        seen.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return tokred.segment_expand(y, dst_idx)

    rows = bench.measure_overhead(add_case(run={"tokred": run}), CpuTimer(), Peers("cpu"), smoke=True)
    assert [row.case for row in rows] == [f"call overhead, {mode}" for mode in ("plain", "no_grad", "inference_mode")]
    assert seen == {(True, False), (False, False), (False, True)}
    assert all(row.kind == "overhead" and row.floor == 0 and row.seconds["tokred"] > 0 for row in rows)


def test_numbers_are_readable():
    said = [bench.si(x, "s") for x in (0.0, 1.234e-5, 0.0999, 2.0, 345.6)]
    assert said == ["0.00 us", "12.3 us", "99.9 ms", "2.00 s", "346 s"]
    assert bench.si(9.39e9, "B/s") == "9.39 GB/s"


class Terminal(io.StringIO):
    def __init__(self, live):
        super().__init__()
        self.live = live

    def isatty(self):
        return self.live


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys):
    for live in (True, False):
        stream = Terminal(live)
        progress = suite.Progress(2, stream)
        for what in ("first", "second"):
            progress.begin(what)
            progress.end(f"{what} row")
        shown = stream.getvalue()
        assert "0/2, --:-- left: first" in shown or not live
        assert "[##########..........] 1/2, 00:00 left: second" in shown or not live
        assert shown.count("\n") == (0 if live else 2) and ("\r" in shown) == live
    assert capsys.readouterr().out == "first row\nsecond row\n" * 2


BROKEN = """
import torch, tokred
from tokred.testing.bench import Case
def cases(device, smoke):
    y, idx = torch.ones(1, 3, 2), torch.tensor([[2, 0]])
    for name, shift in (("wrong", 1), ("right", 0)):
        run = {"tokred": lambda y, i, shift=shift: tokred.segment_expand(y, i) + shift}
        yield Case("segment_expand", name, "float32", lambda i: (y, idx), run, core=name == "right")
"""


def test_a_failing_case_is_told_and_the_others_go_on(tmp_path, capsys):
    path = tmp_path / "bench_segment_expand.py"
    path.write_text(BROKEN)
    options = suite.Options(threads=(1,), smoke=True, json=tmp_path / "out" / "r.json")
    results, failures = suite.run({"segment_expand": path}, Peers("cpu"), options)
    assert [row.case for row in results.rows] == ["right"]
    assert len(failures) == 2 and failures[0].startswith("segment_expand wrong float32: AssertionError: segment_expand")
    assert "FAILED segment_expand wrong float32" in capsys.readouterr().out
    assert [row["case"] for row in json.loads(options.json.read_text())["rows"]] == ["right"]


def test_core_rows_only(tmp_path):
    path = tmp_path / "bench_segment_expand.py"
    path.write_text(BROKEN)
    cases = list(suite._cases(path, suite.Options(core=True)))
    assert [case.name for case in cases] == ["right"]


@pytest.mark.parametrize("op", FILES)
def test_aims_name_a_candidate(op):
    for case in load_file(FILES[op]).cases("cpu", False):
        assert not case.against or case.against in case.run, case.name


@pytest.mark.parametrize("op", FILES)
def test_the_same_number_gives_the_same_inputs(op):
    for case in load_file(FILES[op]).cases("cpu", True):
        first, _, again, other = (list(tensors(case.make(i))) for i in (0, 1, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("op", FILES)
def test_a_gpu_for_minutes_gets_core_rows_of_every_op(op):
    """Cases make no data until they are asked to, so those of a GPU can be looked at here."""
    module = load_file(FILES[op])
    core = [case for case in module.cases("cuda", False) if case.core]
    assert core and all(case.op == op for case in core)
    assert len({(case.name, case.dtype) for case in module.cases("cuda", False)}) == len(
        list(module.cases("cuda", False))
    )
    assert not any(case.reach for case in module.cases("cuda", False)), "the aims are those of the CPU"


def test_core_rows_of_a_gpu_fit_their_budget():
    """0.15 s of timing per candidate and a second for making and checking each case; compilation is budgeted with 8 s.

    With 40 ops, one has four seconds: two cases with four candidates each.
    """
    seconds = 0.0
    for path in FILES.values():
        for case in load_file(path).cases("cuda", False):
            if case.core:
                candidates = len(case.run) + len(case.peers) + len(case.compiled)
                seconds += 1 + 0.35 * candidates + 8 * (len(case.compiled) + ("flex_attention" in case.peers))
    assert seconds < 175  # of three minutes


@pytest.mark.parametrize("op", FILES)
def test_every_op_by_graph_replay_on_a_stand_in(op):
    """The path of a GPU, from the capture to the row, with ops on the CPU behind a fake ``torch.cuda``."""
    api = FakeCuda()
    with api.watch():
        for case in load_file(FILES[op]).cases("cpu", True):
            case.compiled = ()
            row = bench.measure(case, CudaTimer(api), CEILINGS, Peers("cpu", wanted=["aten"]), smoke=True)
            assert set(row.how) == set(case.run) and row.how["tokred"] == "graph", row.note
            # A peer may be a loop on the host, which waits for the device.
            assert all(how == "graph" or f"{name} not captured: waits" in row.note for name, how in row.how.items())
            assert set(row.eager) == set(row.memory) == set(case.run)
            # A call takes at least its outputs; nothing is freed in the stand-in, so that more means nothing.
            outputs = sum(storages(case.run["tokred"](*case.make(0))).values())
            assert row.memory["tokred"] >= outputs > 0
        rows = bench.measure_overhead(case, CudaTimer(api), Peers("cpu", wanted=["aten"]), smoke=True)
        assert [row.device for row in rows] == ["cuda"] * 3


def test_a_row_says_what_was_not_captured():
    right = _registry.op("segment_expand").module.reference

    def waits(y, dst_idx):
        return right(y, dst_idx) + 0 * (dst_idx == 0).nonzero().shape[0]

    api = FakeCuda()
    with api.watch():
        case = add_case(note="two rows")
        case.run["peer"] = waits
        row = bench.measure(case, CudaTimer(api), CEILINGS, Peers("cpu"), smoke=True)
    assert row.how == {"tokred": "graph", "peer": "events"}
    assert row.note == (
        "two rows; peer not captured: waits for the GPU (called a synchronizing CUDA operation); timed by events"
    )


def test_a_plug_in_that_is_wrong_in_replay_is_left_out(tmp_path):
    """Its eager output was right; in the graph it is stale, as a buffer of its own would be."""
    text = HEAD + (
        "kept = {}\n"
        "def run(y, d):\n"
        "    if id(y) not in kept: kept[id(y)] = y[:, d[0]]\n"
        "    return kept[id(y)]\n"
        "OPS = {'segment_expand': Peer(run)}"
    )
    api = FakeCuda()
    with api.watch():
        row = bench.measure(add_case(peers=("lib",)), CudaTimer(api), CEILINGS, plug_in(tmp_path, text), smoke=True)
    assert row.how == {"tokred": "graph", "peer": "graph"}
    assert row.skipped["lib"].startswith("AssertionError: segment_expand tiny float32: lib against the reference")
