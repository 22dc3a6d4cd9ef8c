# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.flashvlm import flashvlm
from tokred.testing import assert_close


def min_max(s):
    return (s - s.min()) / (s.max() - s.min() + 1e-6)


def formula(attention, visual, text, eta, released):
    """One image in float64: the intrinsic and the extrinsic score, their geometric mean, all made comparable."""
    unit = [t.double() / t.double().norm(dim=-1, keepdim=True) for t in (visual, text)]
    gate = 1.0 if released else text.double().norm(dim=-1) / text.double().norm(dim=-1).max()
    s = (unit[0] @ unit[1].T) * gate
    x = (s * (s / 0.05).softmax(1)).sum(1)
    y = min_max((x / 0.01).softmax(0) ** 2.5)
    y = min_max(torch.where(y < y.quantile(0.995), 0.1 * y, y))
    a = min_max(attention.double())
    return min_max(a.clamp(min=1e-6) ** (1 - eta) * y.clamp(min=1e-6) ** eta)


def best(score, count):
    """Lowest index first among equal scores, ascending."""
    return sorted(sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:count])


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("eta", [0.5, 0.0, 1.0])
def test_equals_the_formula(device, dtype, eta, compat):
    x, attention = torch.randn(2, 400, 8).to(device, dtype), torch.rand(2, 400, device=device)
    visual = torch.randn(2, 400, 32).to(device, dtype)
    text = (torch.randn(2, 9, 32) * torch.arange(1, 10)[:, None]).to(device, dtype)
    out = flashvlm(x, attention, visual, text, keep=50, eta=eta, compat=compat)
    for b in range(2):
        parts = (t[b].cpu() for t in (attention, visual, text))
        expected = formula(*parts, eta, compat == "released")
        assert_close(out.score[b].cpu(), expected, rtol=2e-3, atol=1e-5)  # logits of up to 100 in float32, then ^2.5
        kept = best(out.score[b], 50)
        assert out.kept_idx[b].tolist() == kept
        assert_close(out.x[b], x[b, kept], rtol=0, atol=0)
        if eta == 0.0:
            assert kept == best(attention[b], 50)


@pytest.mark.parametrize("compat", [None, "released"])
def test_ragged_images_and_texts_with_ties(device, compat):
    lens, words = [60, 1, 7, 130], [4, 9, 1, 6]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, visual = torch.randn(sum(lens), 8, device=device), torch.randn(sum(lens), 16, device=device)
    visual = visual.repeat_interleave(2, 0)[: sum(lens)]  # neighbours are alike
    attention = torch.rand(sum(lens), device=device).round(decimals=1)
    text = 3 * torch.randn(4, 9, 16, device=device)
    text_mask = (torch.arange(9) < torch.tensor(words)[:, None]).to(device)
    text[~text_mask] = 50.0
    options = {"keep": 10, "text_mask": text_mask, "compat": compat, "cu_seqlens": cu_seqlens}
    out = flashvlm(x, attention, visual, text, max_seqlen=130, **options)
    assert out.num_kept.tolist() == [10, 1, 7, 10] and out.score.shape == (4, 130)
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        expected = formula(
            attention[part].cpu(), visual[part].cpu(), text[b, : words[b]].cpu(), 0.5, compat == "released"
        )
        assert_close(out.score[b, :length].cpu(), expected, rtol=2e-3, atol=1e-5)
        kept = best(out.score[b, :length], 10)
        assert out.kept_idx[b].tolist() == kept + [-1] * (10 - len(kept))
        assert_close(out.x[b, : len(kept)], x[part][kept], rtol=0, atol=0)
    longest = flashvlm(x, attention, visual, text, **options)
    assert_close(longest.kept_idx, out.kept_idx)


def test_words_with_small_norms_count_less(device):
    """One word is like token 3, a hundredth as long as the one that is like token 8."""
    visual, attention = torch.eye(20, device=device)[None], torch.ones(1, 20, device=device)
    text = torch.zeros(1, 2, 20, device=device)
    text[0, 0, 3], text[0, 1, 8] = 0.01, 1.0
    gated = flashvlm(visual, attention, visual, text, keep=2, eta=1.0)
    released = flashvlm(visual, attention, visual, text, keep=2, eta=1.0, compat="released")
    assert gated.score[0].argmax() == 8 and gated.score[0, 3] < 0.1
    assert released.kept_idx.tolist() == [[3, 8]] and released.score[0, 3] > 0.9


def test_compat_is_checked():
    with pytest.raises(ValueError, match="flashvlm: expected compat to be None or 'released', got 'x'"):
        flashvlm(
            torch.zeros(1, 4, 2), torch.zeros(1, 4), torch.zeros(1, 4, 2), torch.zeros(1, 1, 2), keep=2, compat="x"
        )
