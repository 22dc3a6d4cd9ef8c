# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.slime import slime
from tokred.testing import assert_close


def formula(x, text, share, temperature):
    """The released steps for one image, in float64: summed cosines; as many as cumulative masses are <= share, plus one."""
    cosine = torch.nn.functional.cosine_similarity(x.double()[:, None], text.double()[None], dim=-1)
    score = cosine.sum(1)
    mass, order = (score / temperature).softmax(0).sort(descending=True, stable=True)
    count = int((mass.cumsum(0) <= share).sum()) + 1
    return score, order[:count].sort().values


@pytest.mark.parametrize(("share", "temperature"), [(0.95, 1.0), (0.5, 0.3), (1.0, 1.0)])
def test_equals_the_formula(device, share, temperature):
    x, text = torch.randn(2, 300, 24, device=device), torch.randn(2, 12, 24, device=device)
    out = slime(x, text, share=share, temperature=temperature)
    for b in range(2):
        score, expected = formula(x[b].cpu(), text[b].cpu(), share, temperature)
        assert_close(out.score[b].cpu(), score, rtol=1e-4, atol=1e-5)
        assert out.kept_idx[b, : out.num_kept[b]].tolist() == expected.tolist()
        assert_close(out.x[b, : out.num_kept[b]], x[b, expected.to(device)], rtol=0, atol=0)
        assert (out.kept_idx[b, out.num_kept[b] :] == -1).all() and (out.x[b, out.num_kept[b] :] == 0).all()
    if share < 1:
        assert out.num_kept[0] != out.num_kept[1]  # the scores decide how many


def test_padding_of_the_text_counts_nothing(device):
    x, text = torch.randn(1, 50, 8, device=device), torch.randn(1, 6, 8, device=device)
    mask = torch.tensor([[True, True, False, True, False, False]], device=device)
    out = slime(x, text, share=0.7, text_mask=mask, max_keep=40)
    short = slime(x, text[:, [0, 1, 3]], share=0.7, max_keep=40)
    assert_close((out.x, out.kept_idx, out.num_kept), (short.x, short.kept_idx, short.num_kept))
    assert out.kept_idx.shape == (1, 40)


def test_ragged_images_with_ties(device):
    lens = [30, 0, 7, 64]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x = torch.randn(sum(lens), 8, device=device).round().repeat_interleave(2, 0)[: sum(lens)]  # neighbours are alike
    text = torch.randn(4, 5, 8, device=device).round()
    out = slime(x, text, share=0.8, cu_seqlens=cu_seqlens, max_seqlen=64)
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        alone = slime(x[None, part], text[b : b + 1], share=0.8)
        assert_close(out.score[part], alone.score[0], rtol=1e-5, atol=1e-5)
        exact = torch.softmax(out.score[part].double(), 0).sort(descending=True, stable=True)
        count = int((exact.values.cumsum(0) <= 0.8).sum()) + 1 if length else 0
        assert out.num_kept[b] == count
        assert out.kept_idx[b, :count].tolist() == exact.indices[:count].sort().values.tolist()
