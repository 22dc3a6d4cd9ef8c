# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import math

import pytest
import torch

import tokred
from tokred.testing import assert_close


def formula(score, a, sharpness, normalize):
    """One row in float64: the normalised importance, its sigmoid and the hard choice."""
    n = len(score)
    if normalize == "rank":
        order = sorted(range(n), key=lambda i: (math.isnan(float(score[i])), -float(score[i].nan_to_num()), i))
        c = torch.empty(n, dtype=torch.float64)
        for place, i in enumerate(order):
            c[i] = (n - place) / n
    elif normalize == "min_max":
        s = score.double()
        c = (s - s.min()) / (s.max() - s.min()) if s.max() > s.min() else torch.zeros_like(s)
    else:
        c = score.double()
    return c > a, torch.sigmoid(sharpness * (c - a))


@pytest.mark.parametrize("normalize", ["rank", "min_max", "none"])
def test_equals_the_formula(device, dtype, normalize):
    score = torch.randn(3, 40).to(dtype)
    score[1] = 0.25  # all tie
    if normalize == "rank":
        score[2, ::3] = float("nan")
    a = torch.tensor([0.3, 0.71, 0.55])
    for threshold in (a, a[:, None]):
        mask, soft = tokred.soft_topk(score.to(device), threshold.to(device), normalize=normalize)
        for b in range(3):
            hard, expected = formula(score[b], float(a[b]), 40, normalize)
            assert_close(soft[b].cpu(), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(mask[b].cpu(), hard.float())
    soft = tokred.soft_topk(score.to(device), a[0].to(device), normalize=normalize, sharpness=3.0)[1]
    assert_close(soft[0].cpu(), formula(score[0], float(a[0]), 3.0, normalize)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("a", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_ranks_keep_the_best_share(device, a):
    score = torch.randn(2, 64).round(decimals=1).to(device)
    mask, _ = tokred.soft_topk(score, torch.tensor(a, device=device))
    k = math.ceil(64 * (1 - a))
    assert_close(mask.bool(), tokred.list_to_mask(tokred.select_topk(score, k), 64))


def test_gradients(device):
    """Those of the sigmoid, in float64; by rank the threshold alone has one."""
    score = torch.randn(2, 20, device=device, requires_grad=True)
    a = torch.tensor(0.4, device=device, requires_grad=True)
    weight = torch.randn(2, 20, device=device)
    for normalize in ("rank", "min_max"):
        (tokred.soft_topk(score, a, normalize=normalize)[0] * weight).sum().backward()
        s, t = score.detach().double().requires_grad_(), a.detach().double().requires_grad_()
        if normalize == "rank":
            assert score.grad is None
            c = torch.stack([(row[:, None] >= row).double().mean(1) for row in s.detach()])
        else:
            c = (s - s.amin(1, keepdim=True)) / (s.amax(1, keepdim=True) - s.amin(1, keepdim=True))
        (torch.sigmoid(20 * (c - t)) * weight.double()).sum().backward()
        assert_close(a.grad, t.grad, rtol=1e-4, atol=1e-4)
        if normalize == "min_max":
            assert_close(score.grad, s.grad, rtol=1e-3, atol=1e-4)
        a.grad = None


def test_empty_and_compiled(device):
    a = torch.tensor(0.5, device=device)
    assert tokred.soft_topk(torch.zeros(2, 0, device=device), a)[0].shape == (2, 0)
    assert tokred.soft_topk(torch.zeros(2, 0, device=device), a, normalize="min_max")[0].shape == (2, 0)
    score = torch.randn(2, 9, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.soft_topk, fullgraph=True, backend="aot_eager")
    assert_close(compiled(score, a), tokred.soft_topk(score, a))


def test_errors():
    with pytest.raises(RuntimeError, match=r"soft_topk: expected score of shape \[batch_size, num_tokens\], got \[4\]"):
        tokred.soft_topk(torch.zeros(4), torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="soft_topk: expected normalize 'rank', 'min_max' or 'none', got 'softmax'"):
        tokred.soft_topk(torch.zeros(1, 4), torch.tensor(0.5), normalize="softmax")
