# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The CUDA side of every op as far as it shows without a GPU: its kernels are registered, and fake CUDA tensors go through
aot_eager, make_fx and export. A CUDA build of torch is needed, a driver is not.
"""

from collections import Counter

import pytest
import torch
from test_contract import Recorder, grown, leaves, map_tensors
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tokred
from tokred import _op, _registry

if torch.version.cuda is None:
    pytest.skip("this torch has no CUDA: it cannot make fake CUDA tensors", allow_module_level=True)

OPS = [pytest.param(op, id=op.name) for op in _registry.ops()]


def facts(value):
    return [(t.device.type, t.dtype, tuple(t.shape)) for t in leaves(value)]


def on_cuda(value):
    """The facts of a CPU result as they must be for CUDA tensors."""
    return [("cuda", dtype, shape) for _, dtype, shape in facts(value)]


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture
def samples(op):
    """(args, kwargs, real result) of each sample, the tensors of args and kwargs being fake CUDA ones."""
    calls = [(*call, op.function(*call[0], **call[1])) for call in op.module.sample_inputs("cpu", torch.bfloat16)]

    def fake(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with FakeTensorMode(shape_env=ShapeEnv()):  # what an op creates in a test is fake, too
        yield [(*map_tensors(fake, call[:2]), call[2]) for call in calls]


@pytest.mark.skipif(not tokred.build_info().get("cuda"), reason="this library was built without CUDA kernels")
def test_kernels_are_registered(op):
    assert [overload for overload in op.schemas if not op.has_kernel("CUDA", overload)] == []


def test_eager(op, samples):
    for args, kwargs, result in samples:
        assert facts(op.function(*args, **kwargs)) == on_cuda(result)


def test_make_fx(op, samples):
    for args, kwargs, result in samples:
        graph = make_fx(lambda call: op.function(*call[0], **call[1]))((args, kwargs))
        assert any("tokred" in str(node.target) for node in graph.graph.nodes)
        assert facts(graph((args, kwargs))) == on_cuda(result)


def test_aot_eager(op, samples):
    def backend(graph, inputs):  # torch 2.10 replaces the mode of the inputs by a new one, and then refuses the inputs
        torch._guards.TracingContext.get().fake_mode = leaves(inputs)[0].fake_mode
        return aot_eager(graph, inputs)

    for args, kwargs, result in samples:
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True, backend=backend)
        assert facts(compiled(*args, **kwargs)) == on_cuda(result)


def test_export(op, samples):
    class Module(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return op.function(*args, **kwargs)

    for args, kwargs, result in samples:
        program = torch.export.export(Module(), args, kwargs)
        assert facts(program.module()(*args, **kwargs)) == on_cuda(result)


def joint(func):
    """A function of one call of an op that returns gradients of ones. torch's engine wants a device even for fake tensors,
    so the call's node is applied directly.
    """

    def run(call):
        args, kwargs = map_tensors(grown, call)
        outputs = leaves(func(*args, **kwargs))
        node = next(t.grad_fn for t in outputs if t.grad_fn is not None)
        return node.apply(*(torch.ones_like(t) for t in outputs))

    return run


def differentiable(op):
    formulas = [op.has_kernel("Autograd", overload) for overload in op.schemas]  # a refusal is one, too
    return any(formulas) and op.name not in _op.forward_only


@pytest.mark.parametrize("op", [op for op in OPS if differentiable(op.values[0])], indirect=True)
def test_forward_and_backward_in_one_graph(op, samples):
    with Recorder() as recorder:
        for args, kwargs, _ in samples:
            op.function(*args, **kwargs)
    assert recorder.calls
    for func, *call in recorder.calls:
        grads = make_fx(joint(func))(call)(call)
        assert leaves(grads)
        assert not Counter(facts(grads)) - Counter(facts(call)), "a gradient is not like its input"
