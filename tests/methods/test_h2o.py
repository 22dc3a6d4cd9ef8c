# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.methods.h2o import h2o, observe
from tokred.testing import assert_close


def formula(q, k, averaged):
    """Column sums of softmax(q K^T / sqrt(d)), causal, mean over groups; averaged: by the queries at or behind a key."""
    groups, n = q.shape[0] // k.shape[0], k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    s = logits.masked_fill(hidden, -torch.inf).softmax(-1).sum(1).unflatten(0, (-1, groups)).mean(1)
    return s / torch.arange(n, 0, -1) if averaged else s


def best(score, count):
    """Lowest index first among equal scores."""
    return sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:count]


def inputs(device, dtype=torch.float32, batch_size=2, num_tokens=90):
    q = 3 * torch.randn(batch_size, 4, num_tokens, 16).to(device, dtype)
    k, v = torch.randn(2, batch_size, 2, num_tokens, 16).to(device, dtype)
    return q, k, v


@pytest.mark.parametrize("compat", [None, "kvpress"])
@pytest.mark.parametrize(("heavy", "recent"), [(12, 9), (10, 0), (0, 10), (90, 9)])
def test_equals_the_formula(device, dtype, heavy, recent, compat):
    q, k, v = inputs(device, dtype)
    out = h2o(k, v, q, heavy=heavy, recent=recent, compat=compat)
    for b in range(2):
        expected = formula(q[b].cpu(), k[b].cpu(), compat == "kvpress")
        assert_close(out.score[b].cpu(), expected, rtol=1e-4, atol=1e-6)
        for h in range(2):
            kept = sorted([*best(out.score[b, h, : 90 - recent], heavy), *range(90 - recent, 90)])
            if dtype == torch.float32:  # no scores are near each other
                assert kept == sorted([*best(expected[h, : 90 - recent], heavy), *range(90 - recent, 90)])
            assert out.kept_idx[b, h].tolist() == kept and out.num_kept[b, h] == len(kept)
            assert_close(out.x[b, h], k[b, h, kept], rtol=0, atol=0)
            assert_close(out.v[b, h], v[b, h, kept], rtol=0, atol=0)


@pytest.mark.parametrize("compat", [None, "kvpress"])
def test_ragged_prompts_with_ties(device, compat):
    """Padded at their end: each prompt alone gives the same, whatever the padding holds."""
    lens = [90, 41, 12, 5]
    q, k, v = inputs(device, batch_size=4)
    score = torch.full((4, 4, 90), float("nan"), device=device)
    for b, n in enumerate(lens):
        score[b, :, :n] = observe(q[b : b + 1, :, :n], k[b : b + 1, :, :n])[0].bfloat16().float()
    out = h2o(k, v, score=score, heavy=10, recent=6, kv_lens=torch.tensor(lens, device=device), compat=compat)
    assert out.num_kept.tolist() == [[16, 16], [16, 16], [12, 12], [5, 5]]
    for b, n in enumerate(lens):
        part = slice(b, b + 1), slice(None), slice(0, n)
        alone = h2o(k[part], v[part], score=score[part], heavy=10, recent=6, compat=compat)
        width = alone.kept_idx.shape[-1]
        assert_close(out.kept_idx[b, :, :width], alone.kept_idx[0])
        assert_close(out.x[b, :, :width], alone.x[0], rtol=0, atol=0)
        assert (out.v[b, :, width:] == 0).all() and (out.kept_idx[b, :, width:] == -1).all()


def test_decoding_goes_on_from_the_kept_scores(device):
    """A new token asks what is left, itself included; its scores add to those of the prompt."""
    q, k, v = inputs(device, num_tokens=91)
    first = h2o(k[:, :, :90], v[:, :, :90], q[:, :, :90], heavy=10, recent=6)
    keys, values = (torch.cat([old, new[:, :, 90:]], 2) for old, new in ((first.x, k), (first.v, v)))
    state = torch.nn.functional.pad(tokred.gather_tokens([first.score], first.kept_idx, dims=2)[0], (0, 1))
    new = observe(q[:, :, 90:], keys)
    out = h2o(keys, values, score=state + new.unflatten(1, (2, 2)).mean(2), heavy=10, recent=6)
    row = (q[:, :, 90:].double() @ keys.double().repeat_interleave(2, 1).mT / 4).softmax(-1)[:, :, 0]
    for b in range(2):
        for h in range(2):
            total = state[b, h].double() + row[b, 2 * h : 2 * h + 2].mean(0)
            assert_close(out.score[b, h], total, rtol=1e-4, atol=1e-6)
            assert out.kept_idx[b, h].tolist() == sorted([*best(total[:11], 10), *range(11, 17)])


def test_errors():
    k = torch.zeros(1, 1, 9, 4)
    with pytest.raises(ValueError, match="h2o: expected q, or score where sequences have kv_lens"):
        h2o(k, k, heavy=2, recent=2)
    with pytest.raises(ValueError, match="h2o: expected compat to be None or 'kvpress', got 'x'"):
        h2o(k, k, score=torch.zeros(1, 1, 9), heavy=2, recent=2, compat="x")
