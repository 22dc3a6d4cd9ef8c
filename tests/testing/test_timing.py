# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import sys
from pathlib import Path

import pytest
import torch

from tokred.testing import timing
from tokred.testing.timing import CpuTimer, CudaTimer, interleave, rotate, spread

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import FakeCuda


@pytest.fixture
def api():
    found = FakeCuda()
    with found.watch():
        yield found


def copies(n=3):
    return [(torch.arange(4.0) + i, torch.tensor([i, 1])) for i in range(n)]


def double(x, idx):
    return 2 * x, idx + 1


def test_graph_replays_every_copy_and_keeps_its_outputs(api):
    timer, inputs = CudaTimer(api), copies()
    done = timer.ready(double, inputs)
    assert (done.how, done.calls, done.note) == ("graph", 3, "")
    graph, outputs, kept = done.keep
    assert [len(outputs), len(kept)] == [3, 3] and done.once == graph.replay
    inputs[2][0].fill_(7)  # the inputs are the graph's: changed data gives changed outputs
    done.once()
    assert outputs[2][0].tolist() == [14.0] * 4 and outputs[1][0].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert api.current is api.default


def test_warm_up_is_on_the_stream_of_the_capture(api):
    streams = []

    def run(x, idx):
        streams.append((api.current.name, api.capturing is not None))
        return x + 1

    CudaTimer(api).ready(run, copies(2))
    assert streams[:3] == [("side", False)] * 3, "three warm-up calls before anything else"
    assert ("side", True) in streams and ("default", True) not in streams


def test_what_waits_is_timed_by_events_and_never_captured(api):
    timer = CudaTimer(api)
    done = timer.ready(lambda x, idx: x.nonzero(), copies())
    assert done.how == "events" and done.calls == 3
    assert done.note == ("not captured: waits for the GPU (called a synchronizing CUDA operation); timed by events")
    assert api.sync_mode == "default", "the debug mode is put back"
    assert timer.seconds(done) > 0


def test_failed_capture_falls_back_and_puts_the_stream_back(api):
    api.refuse = True
    done = CudaTimer(api).ready(double, copies())
    assert done.how == "events" and "previous error during capture; timed by events" in done.note
    assert api.current is api.default


def test_a_peer_may_refuse_capture(api):
    assert CudaTimer(api).ready(double, copies(), captures=False).how == "events"


def test_a_kernel_that_missed_the_capture_is_noticed(api):
    """As a kernel on a stream of its own would be: it ran while capturing, but is not in the graph."""

    def elsewhere(x, idx):
        out = torch.empty_like(x)
        recording, api.capturing = api.capturing, None
        out.copy_(x)
        api.capturing = recording
        return out

    with pytest.raises(AssertionError, match="replay of the captured graph, copy 0"):
        CudaTimer(api).ready(elsewhere, copies())


def test_a_replay_passes_the_check_of_the_outputs(api):
    seen = []
    done = CudaTimer(api).ready(double, copies(), check=seen.append)
    assert done.how == "graph" and seen[0] is done.keep[1][0] and seen[0][0].tolist() == [0.0, 2.0, 4.0, 6.0]

    def refuse(out):
        raise AssertionError("differs")

    with pytest.raises(AssertionError, match="differs"):
        CudaTimer(api).ready(double, copies(), check=refuse)


def test_outputs_that_are_inputs_are_not_spoilt(api):
    inputs = copies()
    assert CudaTimer(api).ready(lambda x, idx: x.view(2, 2), inputs).how == "graph"
    assert inputs[0][0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_events_see_the_second_of_two_replays(api):
    timer = CudaTimer(api)
    done = timer.ready(double, copies(4))
    api.log.clear()
    assert timer.seconds(done) == pytest.approx(8e-3 / 4)  # 8 ms between the events, four calls
    assert api.log == ["replay", "record", "replay", "record", "wait for event"]


def test_cuda_memory_is_the_peak_above_what_was_there(api):
    x = torch.zeros(1000)

    def run(x):
        (x + 1).sum()
        return x * 2

    assert CudaTimer(api).peak_memory(run, (x,)) == 4000 + 4 + 4000


def test_host_time_leaves_out_the_wait(api):
    timer = CudaTimer(api)
    api.log.clear()
    assert timer.queueing(double, copies(1)[0], 5) > 0
    assert api.log == ["synchronize", "synchronize"]
    done = timer.eager(double, copies(2))
    assert timing.wall(done) > 0 and api.log[-1] == "synchronize" and done.calls == 2


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_timers_time(device):
    timer = CpuTimer() if device == "cpu" else CudaTimer()
    inputs = [(torch.randn(64, 64, device=device),) for _ in range(3)]
    done = timer.ready(torch.relu, inputs)
    assert done.calls == 3 and done.how == ("loop" if device == "cpu" else "graph")
    assert timer.seconds(done) > 0 and timer.queueing(torch.relu, inputs[0], 3) > 0
    memory = timer.peak_memory(torch.relu, (torch.randn(4 << 20, device=device),))
    assert memory is None or abs(memory - (16 << 20)) < (2 << 20)


def test_candidates_take_turns():
    order = []
    turns = {name: (lambda name=name: order.append(name) or 1e-3) for name in "ab"}
    times = interleave(turns, seconds=1e-9, least=3)
    assert "".join(order) == "ab" + "abbaab"  # a warm-up, then A B, B A, A B
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    order.clear()
    assert interleave(turns, 0.0) == {"a": [1e-3], "b": [1e-3]}


def test_copies_exceed_the_cache(monkeypatch):
    timer = CpuTimer()
    monkeypatch.setattr(timer, "rotated_bytes", lambda: 10_000)

    def make(i):
        return (torch.full((250,), float(i)),)

    made = rotate(make, 1000, timer, least=1, most=256)
    assert [c[0][0].item() for c in made] == list(range(11)), "11 kB touched is the first above 10 kB"
    assert len(rotate(make, 100_000, timer, least=1, most=256)) == 2
    assert len(rotate(make, 100_000, timer, least=64, most=256)) == 64
    assert len(rotate(make, 10, timer, least=1, most=5)) == 5


def test_copies_stop_at_the_memory_but_shared_storage_is_free(monkeypatch):
    timer = CpuTimer()
    monkeypatch.setattr(timer, "rotated_bytes", lambda: 10**9)
    monkeypatch.setattr(timer, "most_copied", 4000)
    assert len(rotate(lambda i: (torch.zeros(250),), 10, timer, least=1, most=50)) == 4
    shared = torch.zeros(250)
    assert len(rotate(lambda i: (shared,), 10, timer, least=1, most=50)) == 50


def test_spread_is_the_width_of_the_middle_half():
    assert spread([1.0] * 9) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx((52 - 1.5) / 3)
    assert spread([1.0, 2.0]) == pytest.approx(1 / 1.5)
