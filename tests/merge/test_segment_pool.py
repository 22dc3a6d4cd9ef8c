# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close

MODES = ["first", "last", "mean", "max", "sum", "softmax"]


def formula(x, members, mode, weight):
    """One segment in float64."""
    if len(members) == 0:
        return torch.zeros_like(x[0])
    rows, w = x[members], torch.ones(len(members), dtype=x.dtype) if weight is None else weight[members]
    if mode in ("first", "last"):
        return rows[0 if mode == "first" else -1]
    if mode == "max":
        return rows.amax(0)
    if mode == "softmax":
        return w.softmax(0) @ rows
    return w @ rows / (w.sum() if mode == "mean" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_formula(device, dtype, mode):
    x, dst_idx = torch.randn(2, 30, 12).to(dtype), torch.randint(-1, 8, (2, 30))
    weights = {
        "softmax": [200 * torch.randn(2, 30)],
        "mean": [None, torch.rand(2, 30) + 0.1],
        "sum": [torch.randn(2, 30)],
    }
    for weight in weights.get(mode, [None]):
        given = None if weight is None else weight.to(device)
        pooled = tokred.segment_pool(x.to(device), dst_idx.to(device), 7, mode=mode, weight=given)
        expected = torch.stack(
            [
                torch.stack(
                    [
                        formula(
                            x[b].double(),
                            (dst_idx[b] == j).nonzero().flatten(),
                            mode,
                            None if weight is None else weight[b].double(),
                        )
                        for j in range(7)
                    ]
                )
                for b in range(2)
            ]
        )
        assert_close(pooled.cpu(), expected, atol=2e-3 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_alone(device, mode):
    x, dst_idx = torch.randn(40, 8, device=device), torch.randint(-1, 6, (40,), device=device)
    weight = torch.randn(40, device=device) if mode in ("softmax", "sum") else None
    cu_seqlens = torch.tensor([0, 11, 11, 36], dtype=torch.int32, device=device)
    pooled = tokred.segment_pool(x, dst_idx, 5, mode=mode, weight=weight, cu_seqlens=cu_seqlens)
    for b, (start, end) in enumerate(((0, 11), (11, 11), (11, 36))):
        own = None if weight is None else weight[None, start:end]
        alone = tokred.segment_pool(x[None, start:end], dst_idx[None, start:end], 5, mode=mode, weight=own)
        assert torch.equal(pooled[b], alone[0])


def test_words_of_bytes_and_back(device):
    """HAT: bytes to words, words to the bytes of the next word; nothing of a byte's own word or a later one."""
    text = torch.tensor([list(b"a fast kernel ")], device=device)
    dst_idx, num_words = tokred.boundary_map(text == ord(" "), at="end")
    assert num_words.tolist() == [3]
    x = torch.randn(1, 14, 4, device=device, requires_grad=True)
    words = tokred.segment_pool(x, dst_idx, 5, mode="softmax", weight=torch.randn(1, 14, device=device))
    assert words[:, 3:].abs().sum() == 0
    back = tokred.segment_expand(words, dst_idx - 1)
    for i in range(14):
        (grad,) = torch.autograd.grad(back[0, i].sum(), x, retain_graph=True)
        seen = grad[0].abs().sum(1) > 0
        assert torch.equal(seen, dst_idx[0] == dst_idx[0, i] - 1)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(device, mode):
    dst_idx = torch.randint(-1, 5, (2, 20), device=device)
    x, weight = torch.randn(2, 20, 6, device=device), torch.randn(2, 20, device=device)
    weight = weight if mode in ("softmax", "sum") else None
    grads = []
    for double in (False, True):
        a = (x.double() if double else x).clone().requires_grad_()
        w = None if weight is None else (weight.double() if double else weight).clone().requires_grad_()
        if double:
            out = torch.stack(
                [
                    torch.stack(
                        [
                            formula(
                                a[b].cpu(),
                                (dst_idx[b] == j).nonzero().flatten().cpu(),
                                mode,
                                None if w is None else w[b].cpu(),
                            )
                            for j in range(4)
                        ]
                    )
                    for b in range(2)
                ]
            )
        else:
            out = tokred.segment_pool(a, dst_idx, 4, mode=mode, weight=w).cpu()
        (out * torch.arange(48.0).sin().reshape(2, 4, 6)).sum().backward()
        grads.append([a.grad] if w is None else [a.grad, w.grad])
    for actual, expected in zip(*grads):
        assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_compiled(device):
    x, dst_idx = torch.randn(2, 9, 4, device=device), torch.randint(-1, 4, (2, 9), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.segment_pool, fullgraph=True, backend="aot_eager")
    for mode in ("first", "mean"):
        assert_close(compiled(x, dst_idx, 4, mode=mode), tokred.segment_pool(x, dst_idx, 4, mode=mode))


def test_errors():
    x, ids, weight = torch.zeros(1, 3, 2), torch.zeros(1, 3).long(), torch.ones(1, 3)
    with pytest.raises(RuntimeError, match=r"segment_pool: expected mode 'first', .* or 'softmax', got 'min'"):
        tokred.segment_pool(x, ids, 2, mode="min")
    with pytest.raises(RuntimeError, match="segment_pool: expected weight a tensor in mode 'softmax'"):
        tokred.segment_pool(x, ids, 2, mode="softmax")
    for mode in ("first", "last", "max"):
        with pytest.raises(RuntimeError, match=f"segment_pool: expected weight None in mode '{mode}'"):
            tokred.segment_pool(x, ids, 2, mode=mode, weight=weight)
