# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def case(device, num_tokens=40, num_out=6):
    """Rows of one to many members; a row that is an anchor alone, an empty one, and one whose anchor is elsewhere."""
    dst_idx = torch.randint(-1, num_out - 2, (3, num_tokens))
    dst_idx[torch.rand(3, num_tokens) < 0.1] = num_out + 3
    anchor_idx = torch.stack([torch.randperm(num_tokens)[:num_out] for _ in range(3)])
    dst_idx.scatter_(1, anchor_idx[:, : num_out - 1], torch.arange(num_out - 1).expand(3, -1))
    dst_idx[dst_idx == num_out - 1] = -1
    dst_idx[:, 0] = torch.where((anchor_idx == 0).any(1), dst_idx[:, 0], 1)
    anchor_idx[1, 1] = -1
    return dst_idx.to(device), anchor_idx.to(device)


def formula(x, members, anchor, rule, beta):
    """One row in float64, as its source computes it."""
    if not members:
        return torch.zeros_like(x[0])
    others = [i for i in members if i != anchor]
    if anchor not in members:
        return x[members].mean(0)
    if not others:
        return x[anchor]
    if rule == "target_plus_mean":
        return x[anchor] + x[others].mean(0)
    if rule == "blend":
        return beta * x[anchor] + (1 - beta) * x[others].mean(0)
    if rule == "blend_mean":
        w = max(1 / (len(members) + 1), beta)
        return w * x[anchor] + (1 - w) * x[members].mean(0)
    out = x[anchor]
    for i in sorted(others):
        out = (out + x[i]) / 2
    return out


@pytest.mark.parametrize("rule", ["target_plus_mean", "blend", "blend_mean", "halving"])
@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_equals_the_formula(device, rule, beta):
    dst_idx, anchor_idx = case(device)
    x = torch.randn(3, 40, 8)
    for ids in (dst_idx, dst_idx.int()):
        weight = tokred.merge_weight(ids, 6, anchor_idx, rule, beta=beta)
        merged, _ = tokred.segment_merge(x.to(device), ids, 6, weight=weight, mode="sum")
        for b in range(3):
            for j in range(6):
                members = (dst_idx[b] == j).nonzero().flatten().tolist()
                expected = formula(x[b].double(), members, int(anchor_idx[b, j]), rule, beta)
                assert_close(merged[b, j].cpu(), expected, rtol=1e-5, atol=1e-6)
    assert (weight[(dst_idx < 0) | (dst_idx >= 6)] == 0).all()


def test_sums_to_one(device):
    dst_idx, anchor_idx = case(device, num_tokens=300, num_out=9)
    for rule in ("blend", "blend_mean", "halving"):
        weight = tokred.merge_weight(dst_idx, 9, anchor_idx, rule)
        total, count = tokred.segment_merge(weight[..., None], dst_idx, 9, mode="sum")
        assert_close(total[..., 0], (count > 0).float(), rtol=1e-5, atol=0)


def test_many_halvings_vanish(device):
    """Far beyond what float32 holds: the first ones weigh nothing, the last one a half."""
    dst_idx = torch.zeros(1, 400, dtype=torch.int64, device=device)
    weight = tokred.merge_weight(dst_idx, 1, torch.tensor([[7]], device=device), "halving")
    assert weight[0, -3:].tolist() == [0.125, 0.25, 0.5]
    assert weight[0, 7] == 0 and weight.isfinite().all()


def test_gradients_reach_the_tokens(device):
    dst_idx, anchor_idx = case(device)
    x = torch.randn(3, 40, 4, device=device, requires_grad=True)
    weight = tokred.merge_weight(dst_idx, 6, anchor_idx, "blend")
    tokred.segment_merge(x, dst_idx, 6, weight=weight, mode="sum")[0].sum().backward()
    assert_close(x.grad, weight[..., None].expand_as(x), rtol=1e-6, atol=0)


def test_empty_and_compiled(device):
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert tokred.merge_weight(none, 3, torch.zeros(2, 3, device=device).long(), "halving").shape == (2, 0)
    dst_idx, anchor_idx = case(device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.merge_weight, fullgraph=True, backend="aot_eager")
    for rule in ("blend", "halving"):
        expected = tokred.merge_weight(dst_idx, 6, anchor_idx, rule)
        assert_close(compiled(dst_idx, 6, anchor_idx, rule), expected, rtol=0, atol=0)


def test_errors():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"merge_weight: expected dst_idx .*, 3\], got \[2, 5\] and \[2, 5\]"):
        tokred.merge_weight(ids, 3, ids, "blend")
    with pytest.raises(RuntimeError, match=r"merge_weight: expected rule 'target_plus_mean', .* got 'mean'"):
        tokred.merge_weight(ids, 5, ids, "mean")
