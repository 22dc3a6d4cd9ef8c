# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
from torch.nn import functional

from tokred.methods.snapkv import observe, snapkv
from tokred.testing import assert_close


def received(q, k, window):
    """The sum over the window of softmax(q K^T / sqrt(d)), causal inside the window, keys before it; one sequence, float64."""
    groups = q.shape[0] // k.shape[0]
    logits = q.double() @ k.double().repeat_interleave(groups, 0).transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:] = logits[..., -window:].masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).sum(-2)[..., :-window]


def pooled(a, kernel, mode):
    pooling = functional.avg_pool1d if mode == "avg" else functional.max_pool1d
    return pooling(a, kernel, stride=1, padding=kernel // 2)


def best(score, count):
    """Lowest index first among equal scores, ascending."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def inputs(device, batch_size=2, q_heads=4, kv_heads=2, num_tokens=90, window=8, dim=16):
    q = torch.randn(batch_size, q_heads, window, dim, device=device)
    k, v = torch.randn(2, batch_size, kv_heads, num_tokens, dim, device=device)
    return q * 3, k, v


@pytest.mark.parametrize(("mode", "kernel"), [("avg", 5), ("max", 7), ("avg", 1)])
def test_equals_the_formula(device, mode, kernel):
    q, k, v = inputs(device)
    out = snapkv(k, v, q, keep=30, window=8, kernel=kernel, pooling=mode)
    assert out.kept_idx.shape == (2, 2, 30) and out.num_kept.tolist() == [[30, 30]] * 2
    for b in range(2):
        a = pooled(received(q[b].cpu(), k[b].cpu(), 8), kernel, mode).unflatten(0, (2, 2)).mean(1)
        assert_close(out.score[b, :, :82].cpu(), a, rtol=1e-4, atol=1e-6)
        for h in range(2):
            chosen = best(out.score[b, h, :82].cpu(), 22)  # from scores that agree with the formula; ties decided
            assert out.kept_idx[b, h].tolist() == [*chosen.tolist(), *range(82, 90)]
            if mode == "avg" and kernel > 1:  # no scores are near each other
                assert chosen.tolist() == best(a[h], 22).tolist()
            assert_close(out.x[b, h], k[b, h, out.kept_idx[b, h]], rtol=0, atol=0)
            assert_close(out.v[b, h], v[b, h, out.kept_idx[b, h]], rtol=0, atol=0)


def test_max_pooling_ties_go_to_the_lowest_index(device):
    """A peak becomes a plateau of seven equal scores; the cut goes through it."""
    score = torch.zeros(1, 1, 40, device=device)
    score[0, 0, [10, 30]] = torch.tensor([2.0, 1.0], device=device)
    k = v = torch.randn(1, 1, 40, 4, device=device)
    out = snapkv(k, v, score=score, keep=14, window=4, kernel=7, pooling="max")
    assert out.kept_idx[0, 0].tolist() == [*range(7, 14), 27, 28, 29, *range(36, 40)]


def test_released_granularity(device):
    q, k, v = inputs(device)
    out = snapkv(k, v, q, keep=30, window=8, compat="released")
    assert out.x.shape == (2, 4, 30, 16)
    for h in range(4):
        a = pooled(received(q[1].cpu(), k[1].cpu(), 8), 5, "avg")[h]
        assert out.kept_idx[1, h, :22].tolist() == best(a, 22).tolist()
        assert_close(out.x[1, h], k[1, h // 2, out.kept_idx[1, h]], rtol=0, atol=0)


def test_ragged_prompts(device):
    """Padded at their end: each prompt alone gives the same, whatever the padding holds."""
    lens = [90, 41, 12, 5]
    q, k, v = inputs(device, batch_size=4)
    score = torch.full((4, 4, 90), float("nan"), device=device)
    for b, n in enumerate(lens):
        score[b, :, :n] = observe(q[b : b + 1, :, : min(8, n)], k[b : b + 1, :, :n])[0].bfloat16().float()  # ties
    out = snapkv(k, v, score=score, keep=20, window=8, kv_lens=torch.tensor(lens, device=device))
    assert out.num_kept.tolist() == [[20, 20], [20, 20], [12, 12], [5, 5]]
    for b, n in enumerate(lens):
        part = slice(b, b + 1), slice(None), slice(0, n)
        alone = snapkv(k[part], v[part], score=score[part], keep=20, window=8)
        width = alone.kept_idx.shape[-1]
        assert_close(out.kept_idx[b, :, :width], alone.kept_idx[0])
        assert_close(out.x[b, :, :width], alone.x[0], rtol=0, atol=0)
        assert (out.v[b, :, width:] == 0).all()


def test_errors():
    k = torch.zeros(1, 1, 9, 4)
    with pytest.raises(ValueError, match="snapkv: expected q, or score where prompts have kv_lens"):
        snapkv(k, k, keep=5, window=2)
    score = torch.zeros(1, 1, 9)
    with pytest.raises(ValueError, match=r"snapkv: expected window in \[1, keep = 5\], got 6"):
        snapkv(k, k, score=score, keep=5, window=6)
    with pytest.raises(ValueError, match="snapkv: expected pooling 'avg' or 'max', got 'sum'"):
        snapkv(k, k, score=score, keep=5, window=2, pooling="sum")
    with pytest.raises(ValueError, match="snapkv: expected compat to be None or 'released', got 'x'"):
        snapkv(k, k, score=score, keep=5, window=2, compat="x")
