# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.methods.tome import schedule, tome
from tokred.testing import assert_close


def formula(x, k, r, size, num_protected):
    """The paper's steps for one image, token by token, in float64: rows in original order, their sizes, the map."""
    num_tokens = x.shape[0]
    metric = k.double().mean(0)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    sources = [i for i in range(0, num_tokens, 2) if i >= num_protected]
    destinations = [j for j in range(1, num_tokens, 2) if j >= num_protected]
    similarity = metric[sources] @ metric[destinations].T
    best, place = similarity.max(1)
    merged = best.argsort(descending=True)[:r].tolist()
    goes_to = {sources[a]: destinations[int(place[a])] for a in merged}
    rows = [i for i in range(num_tokens) if i not in goes_to]
    dst_idx = torch.tensor([rows.index(goes_to.get(i, i)) for i in range(num_tokens)])
    weight = size.double()
    out = torch.zeros(len(rows), x.shape[1], dtype=torch.float64)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for i in range(num_tokens):
        out[dst_idx[i]] += weight[i] * x[i].double()
        total[dst_idx[i]] += weight[i]
    return out / total[:, None], total, dst_idx


@pytest.mark.parametrize(("num_tokens", "r", "num_protected"), [(197, 16, 1), (50, 40, 1), (64, 10, 0), (33, 5, 2)])
def test_equals_the_formula(device, num_tokens, r, num_protected):
    x, k = torch.randn(3, num_tokens, 24, device=device), torch.randn(3, 4, num_tokens, 16, device=device)
    size = torch.randint(1, 5, (3, num_tokens)).float().to(device)
    out = tome(x, k, r=r, size=size, num_protected=num_protected)
    r = min(r, (num_tokens - num_protected) // 2)
    for b in range(3):
        rows, sizes, dst_idx = formula(x[b].cpu(), k[b].cpu(), r, size[b].cpu(), num_protected)
        assert_close(out.dst_idx[b].cpu(), dst_idx)
        assert_close(out.x[b].cpu(), rows)
        assert_close(out.size[b].cpu(), sizes)


@pytest.mark.parametrize("num_protected", [0, 1, 2])
def test_released_order_is_a_permutation(device, num_protected):
    x, k = torch.randn(2, 41, 8, device=device), torch.randn(2, 2, 41, 16, device=device)
    ours = tome(x, k, r=7, num_protected=num_protected)
    released = tome(x, k, r=7, num_protected=num_protected, compat="released")
    # The same groups: each token's row holds the same merged token.
    for out in (ours, released):
        assert sorted(out.dst_idx[0].unique().tolist()) == list(range(34))
    assert_close(tokred.segment_expand(released.x, released.dst_idx), tokred.segment_expand(ours.x, ours.dst_idx))
    for token in range(num_protected):
        assert (released.dst_idx[:, token] == token).all() and (ours.dst_idx[:, token] == token).all()
    unmerged = 21 - 7
    if num_protected == 1:  # unmerged even tokens in order, then the odd ones
        assert (released.dst_idx[:, 1::2] == torch.arange(unmerged, 34, device=device)).all()


def test_sizes_add_up_over_layers(device):
    x, size = torch.randn(1, 197, 16, device=device), None
    for r in schedule(16, 12, inflect=-0.5):
        out = tome(x, torch.randn(1, 2, x.shape[1], 8, device=device), r=r, size=size)
        x, size = out.x, out.size
    assert size.sum() == 197 and size[0, 0] == 1


def test_schedule():
    assert schedule(8, 4) == [8, 8, 8, 8]
    assert schedule(8, 5, inflect=1.0) == [0, 4, 8, 12, 16]
    assert sum(schedule(10, 12, inflect=-1.0)) <= 120
    assert schedule(3, 1) == [3]


def test_compat_is_checked():
    with pytest.raises(ValueError, match="expected compat to be None or 'released', got 'old'"):
        tome(torch.zeros(1, 4, 2), torch.zeros(1, 1, 4, 2), r=1, compat="old")
