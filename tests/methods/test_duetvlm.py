# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

from tokred.methods.duetvlm import duetvlm
from tokred.testing import assert_close


def formula(x, score, metric, dominant, contextual, width, released):
    """One image in float64, token by token: rows, what they stand for, and the row of each token."""
    order = sorted(range(1, len(x)), key=lambda i: (-float(score[i]), i))
    kept, pool = sorted([0, *order][:dominant]), [0, *order][dominant:][: width * contextual]
    anchors = pool[:: max(1, len(pool) // contextual)][:contextual]
    unit, groups = F.normalize(metric.double(), dim=-1), {a: [] for a in anchors}
    row = {i: r for r, i in enumerate([*kept, *anchors])}
    for i in (i for i in pool if i not in groups):
        near = max(anchors, key=lambda a: (round(float(unit[i] @ unit[a]), 9), -anchors.index(a)))
        groups[near].append(i)
        row[i] = row[near]
    rows = [x[i].double() for i in kept]
    for a, members in groups.items():
        mean = x[members].double().mean(0) if members else 0 * x[a].double()
        rows.append(x[a].double() + mean if released else x[[a, *members]].double().mean(0))
    return torch.stack(rows), [*kept, *anchors], [row.get(i, -1) for i in range(len(x))]


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize(("dominant", "contextual", "width"), [(30, 8, 4), (1, 10, 3), (100, 20, 4), (5, 3, 1)])
def test_equals_the_formula(device, dtype, dominant, contextual, width, compat):
    x, metric = torch.randn(2, 145, 16).to(device, dtype), torch.randn(2, 145, 24).to(device, dtype)
    score = torch.rand(2, 145).to(device)
    out = duetvlm(x, score, metric, dominant=dominant, contextual=contextual, width=width, compat=compat)
    for b in range(2):
        rows, kept, row = formula(
            x[b].cpu(), score[b].cpu(), metric[b].cpu(), dominant, contextual, width, compat == "released"
        )
        assert out.kept_idx[b].tolist() == kept and out.dst_idx[b].tolist() == row
        rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert_close(out.x[b].double().cpu(), rows, rtol=rtol, atol=rtol / 10)
        assert out.size[b].tolist() == [row.count(i) for i in range(len(kept))]


@pytest.mark.parametrize("compat", [None, "released"])
def test_ragged_images_with_ties(device, compat):
    lens = [61, 5, 14, 90, 12]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 8, device=device), torch.rand(sum(lens), device=device).round(decimals=1)
    metric = torch.randint(-1, 2, (sum(lens), 3), device=device).float()
    for max_seqlen in (90, None):
        out = duetvlm(
            x, score, metric, dominant=12, contextual=6, compat=compat, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        assert out.num_kept.tolist() == [18, 5, 14, 18, 12]
        for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
            part = slice(start, start + length)
            rows, kept, row = formula(x[part], score[part], metric[part], 12, 6, 4, compat == "released")
            assert out.kept_idx[b].tolist() == kept + [-1] * (18 - len(kept))
            assert out.dst_idx[part].tolist() == [-1 if r < 0 else 18 * b + r for r in row]
            assert_close(out.x[b, : len(kept)].double(), rows, rtol=1e-5, atol=1e-6)
            assert not out.x[b, len(kept) :].any()


def test_errors():
    x, score = torch.zeros(1, 9, 2), torch.zeros(1, 9)
    for contextual in (0, 6):
        with pytest.raises(ValueError, match=rf"contextual in \[1, num_tokens - dominant\], got {contextual}"):
            duetvlm(x, score, x, dominant=4, contextual=contextual)
    with pytest.raises(ValueError, match="duetvlm: expected compat to be None or 'released', got 'x'"):
        duetvlm(x, score, x, compat="x")
