# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.methods.tokensparse import tokensparse
from tokred.testing import assert_close


def formula(q, k, tau, least, window):
    """One prompt in float64: pooled means over the window, and how many tokens their mean over heads leaves."""
    groups, n = q.shape[0] // k.shape[0], k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)[-window:]
    a = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)[:, : n - window]
    a = F.avg_pool1d(a, 7, 1, 3)
    share = a.mean(0) / a.mean(0).sum()
    dropped = int((share.sort().values.cumsum(0) < tau).sum())
    dropped += dropped > 0
    return a, max(least, n - window - dropped)


@pytest.mark.parametrize(("tau", "least"), [(0.3, 5), (0.9, 20), (0.005, 5), (1e-6, 5)])
def test_equals_the_formula(device, dtype, tau, least):
    window = 8
    q = 3 * torch.randn(3, 4, window, 16).to(device, dtype)
    k = torch.randn(3, 2, 120, 16).to(device, dtype)
    k[1] *= 0.2  # an even attention: more tokens stay
    kept_idx, num_kept = tokensparse(q, k, tau=tau, min_keep=least, window=window)
    counts = set()
    for b in range(3):
        a, count = formula(q[b].cpu(), k[b].cpu(), tau, least, window)
        counts.add(count)
        assert num_kept[b].tolist() == [count + window] * 4
        for h in range(4):
            others = sorted(a[h].topk(count).indices.tolist())
            assert kept_idx[b, h].tolist() == [*others, *range(112, 120)] + [-1] * (112 - count)
    assert len(counts) > 1 or tau in (0.9, 1e-6)
    if tau == 1e-6:
        assert counts == {112}, "none is left out"


def test_lists_are_bounded(device):
    q, k = torch.randn(2, 4, 8, 16, device=device), torch.randn(2, 2, 120, 16, device=device)
    full, _ = tokensparse(q, k, tau=0.2, min_keep=5, window=8)
    kept_idx, num_kept = tokensparse(q, k, tau=0.2, min_keep=5, max_keep=20, window=8)
    assert kept_idx.shape == (2, 4, 28) and (num_kept == 28).all()
    for b in range(2):
        for h in range(4):
            assert set(kept_idx[b, h].tolist()) <= set(full[b, h].tolist())


def test_equal_scores_keep_the_first(device):
    """Equal keys: all queries before the window see the same; the pooled ends of the row weigh less."""
    q, k = torch.randn(1, 2, 4, 16, device=device), torch.ones(1, 1, 60, 16, device=device)
    kept_idx, num_kept = tokensparse(q, k, tau=0.5, min_keep=1, window=4, kernel=1)
    assert num_kept.tolist() == [[32, 32]]  # 27 of 56 hold less than half and the 28th reaches it
    assert kept_idx[0, 0, :32].tolist() == [*range(28), *range(56, 60)]


def test_lists_gather_and_scatter(device):
    q, k = torch.randn(2, 4, 8, 16, device=device), torch.randn(2, 4, 60, 16, device=device)
    kept_idx, num_kept = tokensparse(q, k, tau=0.4, min_keep=5, window=8)
    rows = tokred.gather_tokens([k], kept_idx)[0]
    restored = tokred.scatter_tokens([rows], kept_idx, num_tokens=60)[0]
    marked = tokred.list_to_mask(kept_idx, 60)
    assert_close(restored, torch.where(marked[..., None], k, 0), rtol=0, atol=0)
    assert_close(marked.sum(-1).int(), num_kept)


def test_window_is_checked():
    with pytest.raises(ValueError, match="tokensparse: expected q of the last 8 of 20 tokens, got 5"):
        tokensparse(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 20, 4), window=8)
