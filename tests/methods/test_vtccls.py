# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.vtccls import vtccls
from tokred.testing import assert_close


def formula(layers):
    """s = sum over layers of the mean over heads of softmax(q_cls K^T / sqrt(d)), without [CLS]; float64."""
    total = 0.0
    for q, k in layers:
        logits = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
        total = total + logits.softmax(-1)[:, :, 0, 1:].mean(1)
    return total


@pytest.mark.parametrize("num_layers", [1, 4])
def test_equals_the_formula(device, dtype, num_layers):
    layers = [
        (2 * torch.randn(2, 4, 1, 32).to(device, dtype), torch.randn(2, 4, 145, 32).to(device, dtype))
        for _ in range(num_layers)
    ]
    x = torch.randn(2, 144, 16).to(device, dtype)
    out = vtccls(x, layers, keep=20)
    assert_close(out.score, formula(layers), rtol=1e-4, atol=1e-6)
    for b in range(2):
        order = sorted(range(144), key=lambda i: (-float(out.score[b, i]), i))[:20]
        assert out.kept_idx[b].tolist() == sorted(order)
        assert_close(out.x[b], x[b, sorted(order)], rtol=0, atol=0)
    if dtype == torch.float32:
        assert_close(out.kept_idx, formula(layers).topk(20).indices.sort().values)


def test_ragged_images_with_ties(device):
    lens = [30, 0, 7, 64]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 8, device=device), torch.rand(sum(lens), device=device).round(decimals=1)
    out = vtccls(x, keep=10, score=score, cu_seqlens=cu_seqlens, max_seqlen=64)
    assert out.num_kept.tolist() == [10, 0, 7, 10]
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = score[start : start + length].tolist()
        kept = sorted(sorted(range(length), key=lambda i: (-part[i], i))[:10])
        assert out.kept_idx[b].tolist() == kept + [-1] * (10 - len(kept))
        assert_close(out.x[b, : len(kept)], x[[start + i for i in kept]], rtol=0, atol=0)


def test_needs_scores():
    with pytest.raises(ValueError, match="vtccls: expected q and k of the scoring layers, or score"):
        vtccls(torch.zeros(1, 4, 2), keep=2)
