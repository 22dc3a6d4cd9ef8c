# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
from torch.nn import functional

from tokred.methods.adakv import adakv
from tokred.methods.snapkv import observe
from tokred.testing import assert_close


def received(q, k, window):
    """The mean over the window of softmax(q K^T / sqrt(d)), then over a group; one sequence, float64."""
    groups = q.shape[0] // k.shape[0]
    logits = q.double() @ k.double().repeat_interleave(groups, 0).transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:] = logits[..., -window:].masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).mean(-2)[..., :-window].unflatten(0, (-1, groups)).mean(1)


def counts(score, budget, alpha):
    """The released steps: a flat top-k over heads, a histogram, the blend with the floor."""
    heads, num_tokens = score.shape
    won = score.flatten().sort(descending=True, stable=True).indices[: heads * budget] // num_tokens
    return [round(int((won == h).sum()) * (1 - alpha) + int(budget * alpha)) for h in range(heads)]


def best(score, count):
    """Lowest index first among equal scores, ascending."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def inputs(device, batch_size=2, num_tokens=120):
    q = (
        torch.randn(batch_size, 6, 8, 16, device=device)
        * torch.tensor([1.0, 1, 4, 4, 2, 2], device=device)[:, None, None]
    )
    k, v = torch.randn(2, batch_size, 3, num_tokens, 16, device=device)
    return q, k, v


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("kernel", [1, 7])
def test_equals_the_formula(device, alpha, kernel):
    q, k, v = inputs(device)
    out = adakv(k, v, q, keep=30, alpha=alpha, window=8, kernel=kernel)
    for b in range(2):
        a = functional.max_pool1d(received(q[b].cpu(), k[b].cpu(), 8), kernel, stride=1, padding=kernel // 2)
        assert_close(out.score[b, :, :112].cpu() / 8, a, rtol=1e-4, atol=1e-7)  # sums, not means, over the window
        own = out.score[b, :, :112].cpu()
        if kernel == 1:  # no scores are near each other
            assert counts(own, 22, alpha) == counts(a, 22, alpha)
        for h, count in enumerate(counts(own, 22, alpha)):
            assert out.num_kept[b, h] == count + 8
            expected = [*best(own[h], count).tolist(), *range(112, 120)]
            assert out.kept_idx[b, h, : count + 8].tolist() == expected
            assert (out.kept_idx[b, h, count + 8 :] == -1).all()
            assert_close(out.x[b, h, : count + 8], k[b, h, expected], rtol=0, atol=0)
            assert_close(out.v[b, h, : count + 8], v[b, h, expected], rtol=0, atol=0)
    assert (out.num_kept[0].diff() != 0).any() or alpha == 1.0  # heads differ


def test_kvpress_rule(device):
    """The total is exact, each head keeps its safe share and the window."""
    q, k, v = inputs(device)
    out = adakv(k, v, q, keep=30, alpha=0.5, window=8, compat="kvpress")
    assert out.num_kept.sum(-1).tolist() == [90, 90] and out.num_kept.min() >= 15
    score = out.score.cpu().double()
    score[..., 112:] = score.amax() + 1
    safe = torch.stack([torch.stack([row.sort(descending=True, stable=True).indices[:15] for row in s]) for s in score])
    flat = score.scatter(-1, safe, 1e9).flatten(1).sort(dim=-1, descending=True, stable=True).indices[:, :90]
    for b in range(2):
        keep = torch.zeros(360, dtype=torch.bool).index_fill(0, flat[b], True).reshape(3, 120)
        for h in range(3):
            assert out.kept_idx[b, h, : out.num_kept[b, h]].tolist() == keep[h].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("compat", [None, "kvpress"])
def test_ragged_prompts(device, compat):
    """Padded at their end, with ties: each prompt alone gives the same, whatever the padding holds."""
    lens = [120, 61, 20, 5]
    q, k, v = inputs(device, batch_size=4)
    score = torch.full((4, 6, 120), float("nan"), device=device)
    for b, n in enumerate(lens):
        score[b, :, :n] = observe(q[b : b + 1, :, : min(8, n)], k[b : b + 1, :, :n])[0].bfloat16().float()
    out = adakv(k, v, score=score, keep=20, window=8, kv_lens=torch.tensor(lens, device=device), compat=compat)
    for b, n in enumerate(lens):
        part = slice(b, b + 1), slice(None), slice(0, n)
        alone = adakv(k[part], v[part], score=score[part], keep=20, window=8, compat=compat)
        width = alone.kept_idx.shape[-1]
        assert_close(out.num_kept[b], alone.num_kept[0])
        assert_close(out.kept_idx[b, :, :width], alone.kept_idx[0])
        assert (out.kept_idx[b, :, width:] == -1).all()
    assert out.num_kept[2:].tolist() == [[20] * 3, [5] * 3]


def test_errors():
    k, score = torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9)
    with pytest.raises(ValueError, match="adakv: expected q, or score where prompts have kv_lens"):
        adakv(k, k, keep=5, window=2)
    with pytest.raises(ValueError, match=r"adakv: expected window in \[1, keep = 5\], got 6"):
        adakv(k, k, score=score, keep=5, window=6)
    with pytest.raises(ValueError, match="adakv: expected compat to be None or 'kvpress', got 'x'"):
        adakv(k, k, score=score, keep=5, window=2, compat="x")
