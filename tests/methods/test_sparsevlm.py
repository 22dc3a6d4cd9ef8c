# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.sparsevlm import raters, sparsevlm
from tokred.testing import assert_close

FIRST, LAST, LENGTH = 7, 71, 95


def rater_formula(visual, text):
    """m_t = mean over visual tokens of softmax_t(V T^T); raters exceed the mean of m."""
    m = (visual.double() @ text.double().T).softmax(-1).mean(0)
    return (m > m.mean()).float()


def score_formula(q, k, weight, heads):
    """The mean over raters and heads of softmax(q K^T / sqrt(d)), causal; one prompt, float64."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool).triu(1)[-q.shape[1] :]
    a = logits.masked_fill(hidden, -torch.inf).softmax(-1)[:, weight > 0].mean(1)
    if heads:
        a = a[a[:, FIRST:LAST].sum(1).argsort(descending=True)[:heads]]
    return a.mean(0)


def inputs(device, dtype=torch.float32):
    x = torch.randn(3, LENGTH, 8).to(device, dtype)
    q, k = 2 * torch.randn(3, 4, LENGTH - LAST, 16).to(device, dtype), torch.randn(3, 2, LENGTH, 16).to(device, dtype)
    weight = (torch.rand(3, LENGTH - LAST, device=device) > 0.6).float()
    weight[:, 0] = 1
    return x, q, k, weight


@pytest.mark.parametrize("heads", [None, 2])
def test_equals_the_formula(device, dtype, heads):
    x, q, k, weight = inputs(device, dtype)
    out = sparsevlm(x, q, k, weight, keep=20, first=FIRST, last=LAST, heads=heads)
    for b in range(3):
        expected = score_formula(q[b].cpu(), k[b].cpu(), weight[b].cpu(), heads)
        assert_close(out.score[b].cpu(), expected, rtol=1e-4, atol=1e-6)
        chosen = sorted(range(FIRST, LAST), key=lambda j: (-float(out.score[b, j]), j))[:20]
        if dtype == torch.float32:  # no scores are near each other
            assert sorted(chosen) == sorted((FIRST + expected[FIRST:LAST].topk(20).indices).tolist())
        kept = [*range(FIRST), *sorted(chosen), *range(LAST, LENGTH)]
        assert out.kept_idx[b].tolist() == kept
        assert_close(out.x[b], x[b, kept], rtol=0, atol=0)


def test_ragged_prompts(device):
    lens = [95, 80, 72]
    x, q, k, weight = inputs(device)
    weight = weight * (torch.arange(LAST, LENGTH) < torch.tensor(lens)[:, None]).to(device)
    kv_lens = torch.tensor(lens, device=device)
    out = sparsevlm(x, q, k, weight, keep=20, first=FIRST, last=LAST, kv_lens=kv_lens)
    assert out.num_kept.tolist() == [51, 36, 28]
    for b, n in enumerate(lens):
        alone = sparsevlm(
            x[b : b + 1, :n], q[b : b + 1, :, : n - LAST], k[b : b + 1, :, :n], weight[b : b + 1, : n - LAST],
            keep=20, first=FIRST, last=LAST,
        )  # fmt: skip
        assert_close(out.score[b, :n], alone.score[0], rtol=1e-5, atol=1e-7)
        assert out.kept_idx[b].tolist() == alone.kept_idx[0].tolist() + [-1] * (LENGTH - n)


def test_raters_equal_the_formula(device, dtype):
    visual, text = torch.randn(3, 40, 16).to(device, dtype), torch.randn(3, 11, 16).to(device, dtype)
    lens = [11, 6, 1]
    mask = (torch.arange(11) < torch.tensor(lens)[:, None]).to(device)
    text[~mask] = 100.0
    found = raters(visual, text, text_mask=mask)
    for b, n in enumerate(lens):
        assert found[b].tolist() == rater_formula(visual[b], text[b, :n]).tolist() + [0.0] * (11 - n)
    assert_close(raters(visual, visual[:, :5])[1], rater_formula(visual[1], visual[1, :5]))


def test_without_raters_the_first_stay(device):
    x, q, k, weight = inputs(device)
    out = sparsevlm(x, q, k, 0 * weight, keep=5, first=FIRST, last=LAST)
    assert out.kept_idx[0].tolist() == [*range(FIRST + 5), *range(LAST, LENGTH)]


def test_needs_scores():
    with pytest.raises(ValueError, match="sparsevlm: expected q, k and weight, or score"):
        sparsevlm(torch.zeros(1, 9, 2), keep=1, first=2, last=5)
