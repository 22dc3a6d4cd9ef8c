# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.idpruner import idpruner, normalized
from tokred.testing import assert_close


def formula(x, score, k, lam, parallel):
    """The released steps for one image, in float64: m starts at -2, parallel tokens of one ranking at a time."""
    s = score.double()
    importance = (s - s.min()) / (s.max() - s.min() + 1e-6)
    unit = x.double() / (x.double().norm(dim=-1, keepdim=True) + 1e-8)
    g, m = unit @ unit.T, torch.full_like(s, -2.0)
    picks = []
    while len(picks) < k:
        value = lam * importance - (1 - lam) * m
        value[picks] = -torch.inf
        new = value.topk(min(parallel, k - len(picks))).indices.tolist()
        picks += new
        m = torch.maximum(m, g[new].amax(0))
    return torch.tensor(sorted(picks))


@pytest.mark.parametrize(("lam", "parallel"), [(0.5, 1), (0.2, 4), (1.0, 1)])
def test_equals_the_formula(device, lam, parallel):
    x, score = torch.randn(2, 200, 32, device=device), torch.randn(2, 200, device=device)
    out = idpruner(x, score, keep=31, lam=lam, parallel=parallel)
    for b in range(2):
        assert_close(out.kept_idx[b].cpu(), formula(x[b].cpu(), score[b].cpu(), 31, lam, parallel))
        assert_close(out.x[b], x[b, out.kept_idx[b]], rtol=0, atol=0)
    if lam == 1.0:
        assert_close(out.kept_idx, score.topk(31).indices.sort().values)


def test_ragged_images(device):
    """Each image's importance is normalised on its own."""
    lens = [30, 0, 7, 64]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 8, device=device), torch.randn(sum(lens), device=device)
    out = idpruner(x, score, keep=10, cu_seqlens=cu_seqlens, max_seqlen=64)
    assert out.num_kept.tolist() == [10, 0, 7, 10]
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        if length:
            part = slice(start, start + length)
            alone = idpruner(x[None, part], score[None, part], keep=min(10, length))
            assert_close(out.x[b, : min(10, length)], alone.x[0], rtol=0, atol=0)
            assert_close(out.score[part], alone.score[0], rtol=0, atol=0)


def test_normalized(device):
    score = torch.tensor([[2.0, 4.0, 3.0]], device=device)
    assert_close(normalized(score), torch.tensor([[0.0, 1.0, 0.5]], device=device))
    assert normalized(torch.ones(1, 3, dtype=torch.bfloat16, device=device)).tolist() == [[0.0, 0.0, 0.0]]
