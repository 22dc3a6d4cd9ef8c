# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.transprune import transition, transprune
from tokred.testing import assert_close

FIRST, LAST, LENGTH = 7, 71, 95


def transition_formula(before, after, released):
    """m exp(u) / sum exp(u) with m = |out| / |in|, u = 1 - |cos| (released: 1 - cos); one prompt, float64."""
    before, after = before.double(), after.double()
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    turn = (1 - (cosine if released else cosine.abs())).exp()
    return after.norm(dim=-1) / before.norm(dim=-1) * turn / turn.sum()


def attention_formula(q, k):
    """The mean over heads and text queries of softmax(q K^T / sqrt(d)), causal; one prompt, float64."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool).triu(1)[-q.shape[1] :]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1))


def score_formula(changes, attention, alpha):
    parts = (t.double() / (t[FIRST:LAST].double().sum() + 1e-8) for t in (changes, attention))
    return sum(w * t for w, t in zip((alpha, 1 - alpha), parts))


@pytest.mark.parametrize("compat", [None, "released"])
def test_transition_equals_the_formula(device, dtype, compat):
    before = torch.randn(3, LENGTH, 48).to(device, dtype)
    after = (torch.randn(3, LENGTH, 48) - 0.8 * before.cpu().float()).to(device, dtype)  # many cosines are negative
    lens = [95, 80, 72]
    ragged = transition(before, after, kv_lens=torch.tensor(lens, device=device), compat=compat)
    whole = transition(before, after, compat=compat)
    for b, n in enumerate(lens):
        expected = transition_formula(before[b, :n].cpu(), after[b, :n].cpu(), compat == "released")
        assert_close(ragged[b, :n].cpu(), expected, rtol=1e-5, atol=1e-8)
        assert not ragged[b, n:].any()
        expected = transition_formula(before[b].cpu(), after[b].cpu(), compat == "released")
        assert_close(whole[b].cpu(), expected, rtol=1e-5, atol=1e-8)


def inputs(device, dtype=torch.float32):
    x, changes = torch.randn(3, LENGTH, 8).to(device, dtype), torch.rand(3, LENGTH, device=device)
    q, k = 2 * torch.randn(3, 4, LENGTH - LAST, 16).to(device, dtype), torch.randn(3, 2, LENGTH, 16).to(device, dtype)
    return x, changes, q, k


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.8])
def test_equals_the_formula(device, dtype, alpha):
    x, changes, q, k = inputs(device, dtype)
    out = transprune(x, changes, q, k, keep=20, first=FIRST, last=LAST, alpha=alpha)
    for b in range(3):
        expected = score_formula(changes[b].cpu(), attention_formula(q[b].cpu(), k[b].cpu()), alpha)
        assert_close(out.score[b].cpu(), expected, rtol=1e-4, atol=1e-6)
        chosen = sorted(range(FIRST, LAST), key=lambda j: (-float(out.score[b, j]), j))[:20]
        if dtype == torch.float32:  # no scores are near each other
            assert sorted(chosen) == sorted((FIRST + expected[FIRST:LAST].topk(20).indices).tolist())
        kept = [*range(FIRST), *sorted(chosen), *range(LAST, LENGTH)]
        assert out.kept_idx[b].tolist() == kept
        assert_close(out.x[b], x[b, kept], rtol=0, atol=0)


def test_ragged_prompts(device):
    lens = [95, 80, 72]
    x, changes, q, k = inputs(device)
    out = transprune(x, changes, q, k, keep=20, first=FIRST, last=LAST, kv_lens=torch.tensor(lens, device=device))
    assert out.num_kept.tolist() == [51, 36, 28]
    for b, n in enumerate(lens):
        part = slice(b, b + 1)
        alone = transprune(
            x[part, :n], changes[part, :n], q[part, :, : n - LAST], k[part, :, :n], keep=20, first=FIRST, last=LAST
        )
        assert_close(out.score[b, :n], alone.score[0], rtol=1e-5, atol=1e-7)
        assert out.kept_idx[b].tolist() == alone.kept_idx[0].tolist() + [-1] * (LENGTH - n)


def test_ties_go_to_the_lowest_index(device):
    x, changes, _, _ = inputs(device)
    out = transprune(x, 0 * changes, keep=3, first=FIRST, last=LAST, attention=torch.ones_like(changes))
    assert out.kept_idx[0].tolist() == [*range(FIRST + 3), *range(LAST, LENGTH)]


def test_errors():
    x = torch.zeros(1, 9, 2)
    with pytest.raises(ValueError, match="transprune: expected q and k of the scoring layer, or attention"):
        transprune(x, torch.zeros(1, 9), keep=1, first=2, last=5)
    with pytest.raises(ValueError, match="transprune: expected compat to be None or 'released', got 'x'"):
        transition(x, x, compat="x")
