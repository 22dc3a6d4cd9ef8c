# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
from torch.nn import functional

from tokred.methods.pyramidkv import layer_budgets, pyramidkv
from tokred.testing import assert_close


def budget_formula(keep, n, layer, num_layers, window, beta):
    """The released arithmetic of one layer: what it keeps beside the window."""
    low = (keep - window) // beta
    high = (keep - window) * 2 - low
    if high >= n - window:
        high = n - window
        low = (keep - window) * 2 - high
    return high - layer * ((high - low) // (num_layers - 1))


def score_formula(q, k, window, kernel):
    """SnapKV's pooled sums over the window of softmax(q K^T / sqrt(d)), mean over groups; one prompt, float64."""
    groups = q.shape[0] // k.shape[0]
    logits = q.double() @ k.double().repeat_interleave(groups, 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:] = logits[..., -window:].masked_fill(hidden, -torch.inf)
    received = logits.softmax(-1).sum(-2)[..., :-window]
    return functional.avg_pool1d(received, kernel, 1, kernel // 2).unflatten(0, (-1, groups)).mean(1)


@pytest.mark.parametrize("n", [90, 200])  # too short for a first layer of twice the average, and not
def test_equals_the_formula(device, n):
    q = 3 * torch.randn(2, 4, 8, 16, device=device)
    k, v = torch.randn(2, 2, 2, n, 16, device=device)
    for layer in (0, 2, 5):
        out = pyramidkv(k, v, q, keep=60, layer=layer, num_layers=6, window=8, beta=10)
        count = budget_formula(60, n, layer, 6, 8, 10)
        assert out.kept_idx.shape == (2, 2, count + 8)
        for b in range(2):
            expected = score_formula(q[b].cpu(), k[b].cpu(), 8, 5)
            for h in range(2):
                kept = [*expected[h].topk(count).indices.sort().values.tolist(), *range(n - 8, n)]
                assert out.kept_idx[b, h].tolist() == kept
                assert_close(out.x[b, h], k[b, h, kept], rtol=0, atol=0)
                assert_close(out.v[b, h], v[b, h, kept], rtol=0, atol=0)


def test_layer_budgets():
    assert layer_budgets(2048, 16384, num_layers=32, window=64) == [
        64 + budget_formula(2048, 16384, layer, 32, 64, 20) for layer in range(32)
    ]
    assert layer_budgets(60, 90, num_layers=6, window=8)[0] == 90, (
        "a first layer of 104 would be longer than the prompt"
    )
    assert sum(layer_budgets(128, 4096, num_layers=4, window=8, beta=20)) / 4 == pytest.approx(128, abs=2)
    assert layer_budgets(60, 50, num_layers=3) == [50, 50, 50]
    assert layer_budgets(60, 500, num_layers=1, window=8) == [60]


def test_ragged_prompts_with_ties(device):
    """Budgets follow from the longest prompt; shorter ones are filled as far as they go."""
    lens = [150, 70, 12]
    k, v = torch.randn(2, 3, 2, 150, 16, device=device)
    score = torch.rand(3, 4, 150, device=device).round(decimals=1)
    out = pyramidkv(
        k, v, score=score, keep=40, layer=0, num_layers=4, window=8, kernel=1, kv_lens=torch.tensor(lens, device=device)
    )
    keep = 8 + budget_formula(40, 150, 0, 4, 8, 20)
    assert out.num_kept.tolist() == [[min(n, keep)] * 2 for n in lens]
    for b, n in enumerate(lens):
        for h in range(2):
            s = score[b, 2 * h : 2 * h + 2].mean(0)[: max(n - 8, 0)].tolist()
            chosen = sorted(range(len(s)), key=lambda i: (-s[i], i))[: keep - 8]
            assert out.kept_idx[b, h].tolist()[: min(n, keep)] == sorted([*chosen, *range(max(n - 8, 0), n)])


def test_released_granularity(device):
    q, (k, v) = torch.randn(1, 4, 8, 16, device=device), torch.randn(2, 1, 2, 90, 16, device=device)
    out = pyramidkv(k, v, q, keep=30, layer=3, num_layers=4, window=8, compat="released")
    assert out.x.shape == (1, 4, 8 + budget_formula(30, 90, 3, 4, 8, 20), 16)


def test_layer_is_checked():
    k = torch.zeros(1, 1, 9, 4)
    with pytest.raises(ValueError, match=r"pyramidkv: expected layer in \[0, 4\), got 4"):
        pyramidkv(k, k, keep=5, layer=4, num_layers=4, window=2)
