# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods import prune_span
from tokred.methods.fastv import fastv, prompt_attention
from tokred.testing import assert_close


def formula(q, k):
    """The mean over heads and queries of softmax(q K^T / sqrt(d)), causal; one prompt, float64."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool).triu(1)[-q.shape[1] :]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1))


def best(score, count):
    """Lowest index first among equal scores, ascending."""
    return sorted(sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:count])


def inputs(device, dtype=torch.float32, num_q=1, batch_size=3):
    x = torch.randn(batch_size, 120, 8).to(device, dtype)
    q, k = 2 * torch.randn(batch_size, 4, num_q, 16).to(device, dtype), torch.randn(batch_size, 2, 120, 16)
    return x, q, k.to(device, dtype)


@pytest.mark.parametrize("num_q", [1, 120])
def test_equals_the_formula(device, dtype, num_q):
    x, q, k = inputs(device, dtype, num_q)
    out = fastv(x, q, k, keep=30, first=10, last=100)
    assert out.num_kept is None and out.x.shape == (3, 60, 8)
    for b in range(3):
        expected = formula(q[b].cpu(), k[b].cpu())
        assert_close(out.score[b].cpu(), expected, rtol=1e-4, atol=1e-6)
        visual = [10 + i for i in best(out.score[b, 10:100], 30)]
        if dtype == torch.float32:  # no scores are near each other
            assert visual == [10 + i for i in best(expected[10:100], 30)]
        kept = [*range(10), *visual, *range(100, 120)]
        assert out.kept_idx[b].tolist() == kept
        assert_close(out.x[b], x[b, kept], rtol=0, atol=0)


@pytest.mark.parametrize("num_q", [1, 120])
def test_ragged_prompts(device, num_q):
    """Padded at their end: each prompt alone gives the same."""
    lens = [120, 107, 100]
    x, q, k = inputs(device, num_q=num_q)
    out = fastv(x, q, k, keep=30, first=10, last=100, kv_lens=torch.tensor(lens, device=device))
    assert out.num_kept.tolist() == [60, 47, 40]
    for b, n in enumerate(lens):
        part = slice(b, b + 1), slice(0, n)
        queries = q[b : b + 1] if num_q == 1 else q[b : b + 1, :, :n]
        alone = fastv(x[part], queries, k[b : b + 1, :, :n], keep=30, first=10, last=100)
        assert_close(out.score[b, :n], alone.score[0], rtol=1e-5, atol=1e-7)
        assert out.kept_idx[b].tolist() == alone.kept_idx[0].tolist() + [-1] * (120 - n)
        assert_close(out.x[b, : n - 60], alone.x[0], rtol=0, atol=0)
        assert (out.x[b, n - 60 :] == 0).all()


def test_ties_go_to_the_lowest_index(device):
    x, _, _ = inputs(device)
    score = torch.ones(3, 120, device=device)
    score[1, 50] = 2.0
    score[2] = torch.nan
    out = fastv(x, score=score, keep=3, first=10, last=100)
    for b, visual in enumerate(([10, 11, 12], [10, 11, 50], [10, 11, 12])):
        assert out.kept_idx[b].tolist() == [*range(10), *visual, *range(100, 120)]


@pytest.mark.parametrize("keep", [0, 90])
def test_none_and_all(device, keep):
    x, q, k = inputs(device)
    out = fastv(x, q, k, keep=keep, first=10, last=100)
    assert out.kept_idx[0].tolist() == [*range(10 + keep), *range(100, 120)]


def test_errors():
    x, score = torch.zeros(1, 9, 2), torch.zeros(1, 9)
    with pytest.raises(ValueError, match="fastv: expected q and k of the scoring layer, or score"):
        fastv(x, keep=1, first=2, last=5)
    with pytest.raises(ValueError, match="fastv: expected q of one token or of all 9, got 3"):
        prompt_attention(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 9, 4))
    with pytest.raises(ValueError, match=r"expected keep in \[0, last - first = 3\], got 4"):
        prune_span(x, score, 4, 2, 5)
    with pytest.raises(ValueError, match="expected 0 <= first <= last <= 9, got 5 and 10"):
        prune_span(x, score, 1, 5, 10)
