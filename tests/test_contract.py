# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What torch asks of every op, generated from each op's sample_inputs: nothing here names an op that is under test."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokred
from tokred import _op, _registry
from tokred.testing import assert_close

OPS = [pytest.param(op, id=op.name) for op in _registry.ops()]


class Recorder(TorchDispatchMode):
    """Notes the calls of tokred ops that a public function makes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tokred":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def samples(op, device, dtype=torch.float32):
    return op.module.sample_inputs(device, dtype)


def grown(x):
    """x as a leaf that requires grad, where it may."""
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


def map_tensors(f, value):
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(f, v) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(f, v) for k, v in value.items()}
    return value


def leaves(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, device, dtype):
    for args, kwargs in samples(op, device, dtype):
        rtol, atol = op.tolerance(dtype)
        expected = op.module.reference(*args, **kwargs)
        assert_close(op.function(*args, **kwargs), expected, rtol=rtol, atol=atol, name=op.name)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    """Schema, fake and autograd registration, and tracing under dynamic shapes, for every overload the samples reach."""
    checked = set()
    for args, kwargs in samples(op, device):
        with Recorder() as recorder:
            op.function(*args, **kwargs)
        for func, call_args, call_kwargs in recorder.calls:
            # Where backward raises, tracing it would, too: such an op is checked without gradients.
            grow = (lambda t: t) if func.name().removeprefix("tokred::") in _op.forward_only else grown
            torch.library.opcheck(func, map_tensors(grow, call_args), map_tensors(grow, call_kwargs))
            checked.add(func)
    assert checked


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_break(op, device):
    for i, (args, kwargs) in enumerate(samples(op, device)):
        torch._dynamo.reset()
        # Inductor once per op; tracing alone for the rest.
        backend = "inductor" if i == 0 else "aot_eager"
        compiled = torch.compile(op.function, fullgraph=True, backend=backend)
        assert_close(compiled(*args, **kwargs), op.function(*args, **kwargs), rtol=0, atol=0, name=op.name)


@pytest.mark.parametrize("op", OPS)
def test_no_output_aliases_an_input(op, device):
    for args, kwargs in samples(op, device):
        inputs = {t.untyped_storage().data_ptr() for t in leaves([list(args), kwargs])}
        outputs = leaves(op.function(*args, **kwargs))
        assert all(t.numel() == 0 or t.untyped_storage().data_ptr() not in inputs for t in outputs)


@pytest.mark.parametrize("op", OPS)
def test_twice_the_same_bits(op, device, dtype, threads):
    for args, kwargs in samples(op, device, dtype):
        first, *rest = threads(lambda args=args, kwargs=kwargs: op.function(*args, **kwargs))
        for other in rest:
            assert_close(other, first, rtol=0, atol=0, name=op.name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two kinds of device are needed")
@pytest.mark.parametrize("op", OPS)
def test_wrong_device_is_an_error(op):
    """A CPU tensor among CUDA tensors must not reach a kernel."""
    args, kwargs = max(samples(op, "cuda"), key=lambda call: len(leaves(call)) > 1)
    *rest, last = leaves((args, kwargs))
    if not rest:
        return  # one tensor may be anywhere
    args, kwargs = map_tensors(lambda t: t.cpu() if t is last else t, (args, kwargs))
    with pytest.raises(RuntimeError, match="device"):
        op.function(*args, **kwargs)


def test_export_and_aotinductor(device, tmp_path):
    class Prune(torch.nn.Module):
        def forward(self, x, score):
            return tokred.prune_topk(x, score, 3)

    args = (torch.randn(2, 9, 8, device=device), torch.randn(2, 9, device=device))
    program = torch.export.export(Prune(), args)
    assert_close(program.module()(*args), tokred.prune_topk(*args, 3), rtol=0, atol=0)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "prune.pt2"))
    assert_close(tuple(torch._inductor.aoti_load_package(path)(*args)), tokred.prune_topk(*args, 3), rtol=0, atol=0)


def test_few_compilations_over_k(device):
    """SymInt counts: a changing k compiles once for itself and once more when it turns dynamic (0 and 1 apart)."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x, score, k):
        return tokred.prune_topk(x, score, k)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    x, score = torch.randn(2, 40, 8, device=device), torch.randn(2, 40, device=device)
    for k in (5, 9, 2, 17, 40, 33):
        assert_close(compiled(x, score, k), tokred.prune_topk(x, score, k), rtol=0, atol=0)
    assert counter.frame_count <= 2
    for k in (0, 1):
        assert_close(compiled(x, score, k), tokred.prune_topk(x, score, k), rtol=0, atol=0)
    assert counter.frame_count <= 4
