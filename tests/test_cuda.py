# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What shows on a GPU only: graph replay, streams, outputs beyond 2^31 elements; the first three from each op's
sample_inputs. On CPU and the emulator the same tests run without graph or stream, so that they are known to work."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import tokred
from tokred import _registry
from tokred.testing import assert_close

OPS = [pytest.param(op, id=op.name) for op in _registry.ops()]
SLEEP_CYCLES = 20_000_000  # 10 ms: what is launched meanwhile waits in its stream


def leaves(value):
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


class Call:
    """A sample's call on tensors of its own, whose contents can be replaced in place."""

    def __init__(self, op, sample):
        self.op = op
        self.sample = tree_map_only(torch.Tensor, torch.clone, list(sample))  # keeps strides
        self.inputs = leaves(
            [self.sample[0], {k: v for k, v in self.sample[1].items() if not k.startswith("cu_seqlens")}]
        )
        self.first = [t.clone() for t in self.inputs]

    def load(self, step):
        """Take the sample's values, shifted by ``step`` places: other data, every value still one the op may meet.

        Offsets stay: shifted they would leave tokens to no sequence, and those of the output may hold anything.
        """
        for t, values in zip(self.inputs, self.first):
            t.copy_(values.flatten().roll(step).reshape(values.shape))

    def __call__(self):
        args, kwargs = self.sample
        return leaves(self.op.function(*args, **kwargs))


def calls(op, device, dtype=torch.float32):
    """Return the sample calls whose results depend on the data."""
    found = []
    for sample in op.module.sample_inputs(device, dtype):
        call = Call(op, sample)
        before = call()
        call.load(1)
        if not same(call(), before):
            found.append(call)
        call.load(0)
    assert found, f"{op.name}: every sample gives the same result for other data"
    return found


def same(a, b):
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def on_stream(device):
    """Return a stream's context, in which nothing starts for a while, so that the order of streams matters."""
    if device != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
    return torch.cuda.stream(stream)


def capture(call, device):
    """Return the outputs of a captured call and what replays it."""
    if device != "cuda":
        outputs = call()

        def replay():
            for output, value in zip(outputs, call(), strict=True):
                output.copy_(value)

        return outputs, replay
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # what is loaded on first use
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay


@pytest.mark.parametrize("op", OPS)
def test_graph_replay_with_other_data(op, device, dtype):
    for call in calls(op, device, dtype):
        outputs, replay = capture(call, device)
        for step in (2, 1, 0):
            call.load(step)
            replay()
            replay()  # whatever the first run left behind
            assert_close(outputs, call(), rtol=0, atol=0, name=op.name)


@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_current_stream(op, device):
    """The data come late, on a stream that sleeps first: work on any other stream would see what was there before."""
    for call in calls(op, device):
        expected = call()
        call.load(1)
        synchronize(device)
        with on_stream(device):
            call.load(0)
            outputs = call()
        synchronize(device)
        assert_close(outputs, expected, rtol=0, atol=0, name=op.name)


@pytest.mark.parametrize("op", OPS)
def test_two_streams_at_once(op, device, simt):
    """No state is shared between calls under way: on the CPU two threads make them."""
    for first, second in zip(calls(op, device), calls(op, device)):
        second.load(1)
        pair = (first, second)
        expected = [call() for call in pair]
        synchronize(device)
        if device == "cuda":
            outputs = [[], []]
            streams = [on_stream(device) for _ in pair]
            for i in [0, 1] * 8:
                with streams[i]:
                    outputs[i].append(pair[i]())
            synchronize(device)
        elif simt:  # one launch at a time
            outputs = [[call() for _ in range(2)] for call in pair]
        else:
            with ThreadPoolExecutor(2) as pool:
                outputs = list(pool.map(lambda call: [call() for _ in range(8)], pair))
        for results, wanted in zip(outputs, expected):
            for result in results:
                assert_close(result, wanted, rtol=0, atol=0, name=op.name)


# Outputs of more than 2^31 elements on the GPU, of a few thousand elsewhere. `rows` of 1024 values each.


def gather(rows, device):
    x = torch.randint(256, (1, 300, 1024), dtype=torch.uint8, device=device)
    kept_idx = torch.randint(300, (1, rows), device=device)
    return tokred.gather_tokens([x], kept_idx)[0][0], lambda part: x[0, kept_idx[0, part]]


def prune(rows, device):
    x = torch.randint(256, (1, rows + 9, 1024), dtype=torch.uint8, device=device)
    x_kept, kept_idx = tokred.prune_topk(x, torch.randn(1, rows + 9, device=device), rows)
    assert (kept_idx[0].diff() > 0).all()
    return x_kept[0], lambda part: x[0, kept_idx[0, part]]


def expand(rows, device):
    y = torch.randn(1, 300, 1024, device=device).half()
    dst_idx = torch.randint(300, (1, rows), device=device)
    return tokred.segment_expand(y, dst_idx)[0], lambda part: y[0, dst_idx[0, part]]


def merge(rows, device):
    x = torch.randn(300, 1024, device=device).half().expand(1, rows // 300 + 1, 300, 1024).flatten(1, 2)
    dst_idx = torch.arange(x.shape[1], device=device)[None]  # all sizes are one
    return tokred.segment_merge(x, dst_idx, x.shape[1])[0][0], lambda part: x[0, part]


def receive(rows, device):
    q, k = torch.randn(1, 1024, 1, 16, device=device), torch.randn(1, 1, rows, 16, device=device)
    received, _ = tokred.attn_received(q.half(), k.half())
    last = (q.half()[0, -1].float() @ k.half()[0, 0].float().T / 4).softmax(-1)
    return received[0, -1], lambda part: last[0, part]


def attend(rows, device):
    v = torch.randn(1, 1, 50, 256, device=device).half()
    q = torch.randn(1, 1, 4 * rows, 16, device=device).half()
    kept_idx = torch.tensor([[[7]]], device=device)  # of one key each row takes the value as it is
    out = tokred.attend_selected(q, torch.randn(1, 1, 50, 16, device=device).half(), v, kept_idx)
    return out[0, 0], lambda part: v[0, 0, 7].expand_as(out[0, 0, part])


@pytest.mark.parametrize("case", [gather, prune, expand, merge, receive, attend])
def test_outputs_beyond_2_31(case, device):
    rows = 2**21 + 5 if device == "cuda" else 301
    out, expected = case(rows, device)
    assert device != "cuda" or out.untyped_storage().nbytes() // out.element_size() > 2**31
    step = 2**18  # a part at a time: comparing takes more memory than computing
    tolerance = (2e-5, 1e-9) if case is receive else (0, 0)
    for begin in range(0, len(out), step):
        part = slice(begin, min(begin + step, len(out)))
        assert_close(out[part], expected(part), rtol=tolerance[0], atol=tolerance[1], name=case.__name__)
