# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.tempme import join_clips, tempme
from tokred.testing import assert_close


def formula(x, metric, r, size, num_cls):
    """One matching of one clip, token by token, in float64: rows in original order, sizes, the map, the released order."""
    value = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    # Class tokens are taken out first; sources are the even patches of what is left, or the odd ones where their number is
    # odd.
    patches = list(range(num_cls, len(x)))
    sources, destinations = patches[num_cls % 2 :: 2], patches[1 - num_cls % 2 :: 2]
    best, place = (value[sources] @ value[destinations].T).max(1)
    ranked = sorted(range(len(sources)), key=lambda a: (-best[a].item(), a))
    to = {sources[a]: destinations[int(place[a])] for a in ranked[:r]}
    rows = [i for i in range(len(x)) if i not in to]
    dst_idx = torch.tensor([rows.index(to.get(i, i)) for i in range(len(x))])
    weight = size.double()
    members = [dst_idx == row for row in range(len(rows))]
    merged = torch.stack([(weight[m, None] * x[m].double()).sum(0) / weight[m].sum() for m in members])
    sizes = torch.stack([weight[m].sum() for m in members])
    order = list(range(num_cls)) + [i for i in sources if i not in to] + destinations
    return merged, sizes, dst_idx, order


@pytest.mark.parametrize(
    ("num_tokens", "num_cls", "r"), [(50, 1, 2), (98, 2, 29), (147, 3, 44), (33, 1, 40), (64, 4, 9)]
)
@pytest.mark.parametrize("keys", [True, False])
def test_equals_the_formula(device, num_tokens, num_cls, r, keys):
    x = torch.randn(3, num_tokens, 12)
    metric = torch.randn(3, 2, num_tokens, 8) if keys else torch.randn(3, num_tokens, 8)
    size = torch.randint(1, 5, (3, num_tokens)).float()
    given = {"size": size.to(device), "num_cls": num_cls}
    out = tempme(x.to(device), metric.to(device), r=r, **given)
    released = tempme(x.to(device), metric.to(device), r=r, compat="released", **given)
    for b in range(3):
        mean = metric[b].double().mean(0) if keys else metric[b]
        count = min(r, (num_tokens - num_cls) // 2)
        rows, sizes, dst_idx, order = formula(x[b], mean, count, size[b], num_cls)
        assert_close(out.dst_idx[b].cpu(), dst_idx)
        assert_close(out.x[b].cpu(), rows)
        assert_close(out.size[b].cpu(), sizes)
        assert released.dst_idx[b].cpu()[order].tolist() == list(range(num_tokens - count))
        assert_close(released.x[b].cpu(), rows[dst_idx[order]])


def test_clips_merge_twice_in_a_block(device):
    """Twelve frames of 50 tokens joined by two: 30 percent before attention, 10 percent after it."""
    x, size = torch.randn(12, 50, 8, device=device), torch.ones(12, 50, device=device)
    joined, sizes = join_clips(x, 2), join_clips(size, 2)
    assert joined.shape == (6, 100, 8) and sizes.shape == (6, 100)
    assert (
        torch.equal(joined[0, :2], x[:2, 0])
        and torch.equal(joined[0, 2:51], x[0, 1:])
        and torch.equal(joined[5, 51:], x[11, 1:])
    )
    first = tempme(joined, joined, ratio=0.3, size=sizes, num_cls=2)
    assert first.x.shape == (6, 70, 8)
    second = tempme(first.x, torch.randn(6, 4, 70, 2, device=device), ratio=0.1, size=first.size, num_cls=2)
    assert second.x.shape == (6, 63, 8) and (second.size.sum(1) == 100).all() and (second.size[:, :2] == 1).all()
    third = join_clips(second.x, 2, num_cls=2)
    assert third.shape == (3, 126, 8) and torch.equal(third[0, 2:4], second.x[1, :2])


def test_ties_and_errors(device):
    x = torch.ones(1, 9, 3, device=device)
    assert tempme(x, x, r=2).dst_idx.tolist() == [[0, 1, 1, 2, 1, 3, 4, 5, 6]]
    for wrong in ({}, {"r": 1, "ratio": 0.1}):
        with pytest.raises(ValueError, match="expected either r or ratio"):
            tempme(x, x, **wrong)
    with pytest.raises(ValueError, match="expected compat to be None or 'released', got 'old'"):
        tempme(x, x, r=1, compat="old")
