# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.methods.dymu import calibrate, dymu
from tokred.testing import assert_close


def formula(x, metric, threshold, cap, size, num_protected):
    """DToMe of one image without padding, token by token, in float64: rows in original order, sizes, the map."""
    value = metric.double() / metric.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    sources = [i for i in range(0, len(x), 2) if i >= num_protected]
    destinations = [j for j in range(1, len(x), 2) if j >= num_protected]
    to = {}
    if sources and destinations:
        best, place = (value[sources] @ value[destinations].T).max(1)
        ranked = sorted(range(len(sources)), key=lambda a: (-best[a].item(), a))
        above = [a for a in ranked if best[a] > threshold]
        to = {sources[a]: destinations[int(place[a])] for a in above[:cap]}
    rows = [i for i in range(len(x)) if i not in to]
    dst_idx = torch.tensor([rows.index(to.get(i, i)) for i in range(len(x))])
    weight, members = size.double(), [dst_idx == row for row in range(len(rows))]
    merged = torch.stack([(weight[m, None] * x[m].double()).sum(0) / weight[m].sum() for m in members])
    order = [i for i in range(0, len(x), 2) if i not in to] + list(range(1, len(x), 2))
    return merged, torch.stack([weight[m].sum() for m in members]), dst_idx, order


@pytest.mark.parametrize(
    ("num_tokens", "num_protected", "max_r"), [(197, 1, None), (50, 1, 4), (64, 0, None), (33, 2, 6)]
)
def test_equals_the_formula_on_a_ragged_batch(device, num_tokens, num_protected, max_r):
    lens = [num_tokens, num_tokens - 7, num_tokens // 2]
    x, k = torch.randn(3, num_tokens, 12), torch.randn(3, 2, num_tokens, 16)
    size = torch.randint(1, 5, (3, num_tokens)).float()
    threshold = 0.3
    for b, count in enumerate(lens):  # padding: garbage that is not looked at, of no size
        x[b, count:], k[b, :, count:], size[b, count:] = float("nan"), float("nan"), 0
    given = {"max_r": max_r, "num_protected": num_protected, "size": size.to(device)}
    given["seq_lens"] = torch.tensor(lens, dtype=torch.int32, device=device)
    for tau in (threshold, torch.tensor(threshold, device=device)):
        out = dymu(x.to(device), k.to(device), threshold=tau, **given)
        released = dymu(x.to(device), k.to(device), threshold=tau, compat="released", **given)
        for b, count in enumerate(lens):
            cap = num_tokens if max_r is None else max_r
            rows, sizes, dst_idx, order = formula(
                x[b, :count], k[b, :, :count].double().mean(0), threshold, cap, size[b, :count], num_protected
            )
            kept = len(rows)
            assert out.num_kept[b] == kept < count
            assert_close(out.dst_idx[b, :count].cpu(), dst_idx)
            assert (out.dst_idx[b, count:] == -1).all()
            assert_close(out.x[b, :kept].cpu(), rows)
            assert_close(out.size[b, :kept].cpu(), sizes)
            assert (out.x[b, kept:] == 0).all() and (out.size[b, kept:] == 0).all()
            # One image's order, and the means of several: x / (size + 1e-4).
            if num_protected:
                assert released.dst_idx[b].cpu()[order].tolist() == list(range(kept))
                expected = (rows * (sizes / (sizes + 1e-4))[:, None])[dst_idx[order]]
                assert_close(released.x[b, :kept].cpu(), expected)
            assert sorted(released.dst_idx[b, :count].unique().tolist()) == list(range(kept))


def test_calibrated_thresholds_merge_r_on_average(device):
    k = torch.randn(8, 2, 99, 16, device=device)
    threshold = calibrate(k, 11)
    best = tokred.bipartite_match(k.mean(1), 0, num_protected=1, return_score=True)[2][:, ::2].flatten()
    assert threshold == best.sort(descending=True).values[8 * 11]
    out = dymu(torch.randn(8, 99, 4, device=device), k, threshold=threshold)
    assert (99 - out.num_kept).sum() == 8 * 11 and out.num_kept.unique().numel() > 1
    assert calibrate(-k.abs().sum(1) * torch.tensor([1.0, -1.0] * 49 + [1.0], device=device)[:, None], 3) >= 0
    assert (dymu(torch.randn(8, 99, 4, device=device), k).num_kept == 99).all()  # the threshold 1


def test_layers_compose(device):
    """Two layers' maps, sizes and counts: padding of the first is padding of the second."""
    x, k = torch.randn(2, 60, 8, device=device), torch.randn(2, 2, 60, 8, device=device)
    first = dymu(x, k, threshold=0.4)
    second = dymu(
        first.x, torch.randn(2, 2, 60, 8, device=device), threshold=0.5, size=first.size, seq_lens=first.num_kept
    )
    total = second.dst_idx.gather(1, first.dst_idx)
    assert (total >= 0).all() and (second.num_kept < first.num_kept).all()
    merged, size = tokred.segment_merge(x, total, 60)  # I4: weights are sizes
    assert_close(merged, second.x)
    assert_close(size, second.size)
    assert (size.sum(1) == 60).all()


def test_ties_and_errors(device):
    x = torch.ones(1, 9, 3, device=device)
    assert dymu(x, x, threshold=0.5, max_r=2).dst_idx.tolist() == [[0, 1, 1, 2, 1, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="expected compat to be None or 'released', got 'old'"):
        dymu(x, x, compat="old")
