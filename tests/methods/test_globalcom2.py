# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

from tokred.methods.globalcom2 import globalcom2, unlike_mean, view_score
from tokred.testing import assert_close


def best(score, count, among):
    """Lowest index first among equal scores."""
    return sorted(among, key=lambda i: (-float(score[i]), i))[:count]


def formula(score, grid, size, ratio, tau=10.0):
    """One image in float64, crop by crop and cell by cell: fused scores, and the kept positions of all views."""
    (rows, cols), side = grid, round(score.shape[1] ** 0.5)
    thumbnail = score[0].double().view(side, side)
    height, width = rows * side, cols * side
    if size is None:
        size = (height, width)
    up = F.interpolate(thumbnail[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    above, left = (height - size[0]) // 2, (width - size[1]) // 2
    mass = torch.stack(
        [
            thumbnail[
                r * (side // rows) : (r + 1) * (side // rows), c * (side // cols) : (c + 1) * (side // cols)
            ].sum()
            for r in range(rows)
            for c in range(cols)
        ]
    )
    sigma = (mass / tau).softmax(0)
    kept, fused = best(score[0], int(score.shape[1] * ratio), range(side * side)), [score[0].double()]
    for crop in range(rows * cols):
        share = min(1.0, float(ratio * (1 + sigma[crop] - sigma.mean())))
        row, col = crop // cols * side, crop % cols * side
        cells = [(row + i // side - above, col + i % side - left) for i in range(side * side)]
        valid = [i for i, (y, x) in enumerate(cells) if 0 <= y < size[0] and 0 <= x < size[1]]
        local, guide = (torch.zeros(side * side, dtype=torch.float64) for _ in range(2))
        local[valid] = score[1 + crop].double()[valid]
        guide[valid] = torch.stack([up[cells[i]] for i in valid]) if valid else guide[valid]
        mixed = local / local.norm().clamp(min=1e-12) + guide / guide.norm().clamp(min=1e-12)
        kept += [(1 + crop) * side * side + i for i in best(mixed.float(), int(len(valid) * share), valid)]
        fused.append(mixed)
    return torch.stack(fused), sorted(kept)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_images_of_different_grids_equal_the_formula(device, ratio, padded):
    grids = [(2, 2), (1, 3), (3, 1), (2, 1)]
    sizes = [(24, 17), (7, 36), (36, 12), (10, 12)] if padded else None
    views = [1 + r * c for r, c in grids]
    x, score = torch.randn(sum(views), 144, 8, device=device), torch.rand(sum(views), 144, device=device)
    score[3] = score[3].round(decimals=1)  # ties in a crop's part; nothing else is equal
    out = globalcom2(x, score, ratio=ratio, grids=grids, sizes=sizes)
    for i, (part, tokens, own) in enumerate(zip(score.split(views), x.split(views), out.score.split(views))):
        expected, kept = formula(part.cpu(), grids[i], sizes[i] if padded else None, ratio)
        inside = (expected != 0).to(device)
        assert_close(own[inside].cpu(), expected[inside.cpu()], rtol=1e-5, atol=1e-6)
        assert int(out.num_kept[i]) == len(kept)
        assert out.kept_idx[i, : len(kept)].tolist() == kept and (out.kept_idx[i, len(kept) :] == -1).all()
        assert_close(out.x[i, : len(kept)], tokens.flatten(0, 1)[kept], rtol=0, atol=0)
        assert not out.x[i, len(kept) :].any()


def test_equal_scores_share_the_budget_evenly(device):
    out = globalcom2(
        torch.randn(5, 144, 4, device=device), torch.ones(5, 144, device=device), ratio=0.25, grids=[(2, 2)]
    )
    assert out.num_kept.tolist() == [5 * 36]
    assert out.kept_idx[0, :36].tolist() == list(range(36))  # of equal scores the first
    assert (out.kept_idx[0, :180] // 144).bincount().tolist() == [36] * 5


def test_important_crops_keep_more(device):
    score = torch.ones(5, 144, device=device)
    score[0].view(12, 12)[6:, 6:] = 2.0
    out = globalcom2(torch.randn(5, 144, 4, device=device), score, ratio=0.25, grids=[(2, 2)])
    kept = (out.kept_idx[0, : int(out.num_kept[0])] // 144).bincount().tolist()
    assert kept[0] == 36 and kept[1] == kept[2] == kept[3] < 36 < kept[4]


@pytest.mark.parametrize("compat", [None, "released"])
def test_view_score_equals_the_formula(device, dtype, compat):
    q, k = torch.randn(5, 4, 1, 16).to(device, dtype), torch.randn(5, 4, 145, 16).to(device, dtype)
    logits = q.double() @ k.double().mT / 4
    expected = (logits if compat else logits.softmax(-1)).mean(1)[:, 0, 1:]
    assert_close(view_score(q, k, compat=compat), expected, rtol=1e-4, atol=1e-5)


def test_without_cls_equals_the_formula(device, dtype):
    x = (torch.randn(3, 100, 24) + 0.3).to(device, dtype)
    mean = x.mean(1, keepdim=True).double()  # in the model's dtype
    expected = -(x.double() * mean).sum(-1) / (x.double().norm(dim=-1) * mean.norm(dim=-1))
    assert_close(unlike_mean(x), expected, rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"globalcom2: expected x of shape \[5, side \* side, dim\], got \[4, 9, 2\]"):
        globalcom2(torch.zeros(4, 9, 2), torch.zeros(4, 9), ratio=0.5, grids=[(2, 2)])
    with pytest.raises(ValueError, match=r"expected x of shape \[3, side \* side, dim\], got \[3, 8, 2\]"):
        globalcom2(torch.zeros(3, 8, 2), torch.zeros(3, 8), ratio=0.5, grids=[(1, 2)])
    with pytest.raises(ValueError, match="globalcom2: expected compat to be None or 'released', got 'x'"):
        view_score(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5, 4), compat="x")
