# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.hiprune import column_attention, hiprune
from tokred.testing import assert_close


def best(score, count):
    """Lowest index first among equal scores."""
    return sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:count]


def near(anchor, height, width, flat):
    if flat:
        shifted = (anchor - 1, anchor + 1, anchor - width, anchor + width)
        return {min(max(i, 0), height * width - 1) for i in shifted}
    row, column = divmod(anchor, width)
    places = ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column))
    return {i * width + j for i, j in places if 0 <= i < height and 0 <= j < width}


def formula(object_score, deep_score, keep, grid, alpha, compat):
    """One image: anchors, their neighbours, the best others."""
    anchors = best(object_score, round(keep * alpha / 5))
    chosen = set(anchors).union(*(near(a, *grid, compat is not None) for a in anchors))
    deep = deep_score.double().tolist()
    for i in chosen:
        deep[i] -= 1.0 if compat == "qwen" else float("inf")
    return sorted(chosen | set(best(deep, max(keep - len(chosen), 0))))


@pytest.mark.parametrize("compat", [None, "released", "qwen"])
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_equals_the_formula(device, dtype, alpha, compat):
    x = torch.randn(3, 144, 8).to(device, dtype)
    scores = torch.randn(2, 3, 144).exp() / 100
    scores[:, 1] = scores[:, 1].bfloat16().float()  # ties
    scores[0, 2, :14] = 5.0  # anchors at the ends of rows
    object_score, deep_score = scores.to(device)
    if compat == "qwen":
        deep_score = deep_score * 144  # sums: taking 1 away leaves the greatest in front
    out = hiprune(x, object_score, deep_score, keep=40, grid=[(12, 12)], alpha=alpha, compat=compat)
    counts = []
    for b in range(3):
        kept = formula(object_score[b].cpu(), deep_score[b].cpu(), 40, (12, 12), alpha, compat)
        counts.append(len(kept))
        assert out.kept_idx[b].tolist() == kept + [-1] * (40 - len(kept))
        assert_close(out.x[b, : len(kept)], x[b, kept], rtol=0, atol=0)
    if compat == "qwen":
        assert out.num_kept.tolist() == counts and min(counts) < 40
    else:
        assert out.num_kept is None and counts == [40] * 3


@pytest.mark.parametrize("compat", [None, "released", "qwen"])
def test_ragged_images(device, compat):
    grids = [(4, 9), (7, 5), (3, 3), (10, 12)]
    lens = [h * w for h, w in grids]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, (object_score, deep_score) = torch.randn(sum(lens), 8, device=device), torch.rand(2, sum(lens), device=device)
    deep_score = (3 * deep_score).bfloat16()
    out = hiprune(
        x,
        object_score,
        deep_score,
        keep=20,
        grid=grids,
        alpha=0.3,
        compat=compat,
        cu_seqlens=cu_seqlens,
        max_seqlen=120,
    )
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        kept = formula(object_score[part].cpu(), deep_score[part].cpu(), 20, grids[b], 0.3, compat)[:20]
        assert out.num_kept[b] == len(kept)
        assert out.kept_idx[b].tolist() == kept + [-1] * (20 - len(kept))
        assert_close(out.x[b, : len(kept)], x[part][kept], rtol=0, atol=0)


@pytest.mark.parametrize("num_protected", [0, 1])
def test_score_equals_the_formula(device, dtype, num_protected):
    q, k = torch.randn(2, 2, 4, 50, 16).to(device, dtype)
    probability = (q.double() @ k.double().mT / 4).softmax(-1)
    expected = probability.mean((1, 2))[:, num_protected:]
    assert_close(column_attention(q, k, num_protected=num_protected), expected, rtol=1e-4, atol=1e-7)


def test_compat_is_checked():
    with pytest.raises(ValueError, match="expected compat to be None, 'released' or 'qwen', got 'old'"):
        hiprune(torch.zeros(1, 4, 2), torch.zeros(1, 4), torch.zeros(1, 4), keep=2, grid=[(2, 2)], compat="old")
