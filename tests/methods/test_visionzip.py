# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.methods.fastervlm import cls_attention
from tokred.methods.visionzip import visionzip
from tokred.testing import assert_close


def formula(x, score, metric, dominant, contextual, released, protected=1):
    """One image in float64, token by token: rows, targets, sizes, and the row of each token."""
    order = sorted(range(protected, len(x)), key=lambda i: (-float(score[i]), i))
    kept = sorted([*range(protected), *order][:dominant])
    rest = [i for i in range(len(x)) if i not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    unit = F.normalize(metric.double(), dim=-1)
    groups = {t: [] for t in targets}
    row = {i: r for r, i in enumerate([*kept, *targets])}
    for i in rest:
        if i not in groups:
            near = max(targets, key=lambda t: (round(float(unit[i] @ unit[t]), 9), -t))
            groups[near].append(i)
            row[i] = row[near]
    rows = [x[i].double() for i in kept]
    for t, members in groups.items():
        if released:
            rows.append(x[t].double() + (x[members].double().mean(0) if members else 0))
        else:
            rows.append(x[[t, *members]].double().mean(0))
    size = [1] * len(kept) + [1 + len(members) for members in groups.values()]
    return torch.stack(rows), [*kept, *targets], size, [row[i] for i in range(len(x))]


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize(("dominant", "contextual"), [(54, 10), (1, 3), (100, 45), (120, 25)])
def test_equals_the_formula(device, dtype, dominant, contextual, compat):
    x = torch.randn(2, 145, 16).to(device, dtype)
    q, k = torch.randn(2, 4, 1, 24).to(device, dtype), torch.randn(2, 4, 145, 24).to(device, dtype)
    score, metric = F.pad(cls_attention(q, k), (1, 0)), k.mean(1)
    attention = (q.double() @ k.double().mT * 24**-0.5).softmax(-1)[:, :, 0].mean(1)
    assert_close(score[:, 1:], attention[:, 1:], rtol=1e-4, atol=1e-6)
    out = visionzip(x, score, metric, dominant=dominant, contextual=contextual, compat=compat)
    for b in range(2):
        rows, kept, size, row = formula(
            x[b].cpu(), out.score[b].cpu(), metric[b].cpu(), dominant, contextual, compat == "released"
        )
        assert out.kept_idx[b].tolist() == kept and out.dst_idx[b].tolist() == row and out.size[b].tolist() == size
        assert_close(out.x[b, :dominant], x[b, kept[:dominant]], rtol=0, atol=0)
        rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert_close(out.x[b].double().cpu(), rows, rtol=rtol, atol=rtol / 10)
    assert out.num_kept is None


@pytest.mark.parametrize("compat", [None, "released"])
def test_ragged_images_with_ties(device, compat):
    """Equal scores, equal keys, and images with too few tokens for all that is asked for."""
    lens = [61, 5, 14, 90, 12]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 8, device=device), torch.rand(sum(lens), device=device).round(decimals=1)
    metric = torch.randint(-1, 2, (sum(lens), 3), device=device).float()
    out = visionzip(x, score, metric, dominant=12, contextual=6, compat=compat, cu_seqlens=cu_seqlens, max_seqlen=90)
    assert out.num_kept.tolist() == [18, 5, 14, 18, 12]
    restored = tokred.segment_expand(out.x.flatten(0, 1)[None], out.dst_idx[None])[0]
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        rows, kept, size, row = formula(x[part], score[part], metric[part], 12, 6, compat == "released")
        assert out.kept_idx[b].tolist() == kept + [-1] * (18 - len(kept))
        assert out.size[b].tolist() == size + [0] * (18 - len(size))
        assert_close(out.x[b, : len(kept)].double(), rows, rtol=1e-5, atol=1e-6)
        assert not out.x[b, len(kept) :].any()
        assert_close(restored[part], out.x[b, torch.tensor(row, device=device)], rtol=0, atol=0)


def test_an_encoder_without_cls(device):
    x, score = torch.randn(1, 40, 8, device=device), torch.rand(1, 40, device=device)
    out = visionzip(x, score, x, dominant=7, contextual=4, num_protected=0)
    expected = formula(x[0].cpu(), score[0].cpu(), x[0].cpu(), 7, 4, False, protected=0)
    assert out.kept_idx[0].tolist() == expected[1]
    assert_close(out.x[0].double().cpu(), expected[0], rtol=1e-5, atol=1e-6)


def test_gradient_reaches_all_tokens(device):
    x = torch.randn(1, 30, 4, device=device, requires_grad=True)
    out = visionzip(x, torch.rand(1, 30, device=device), x.detach(), dominant=5, contextual=3)
    out.x.sum().backward()
    assert_close(x.grad[0, :, 0], 1 / out.size[0, out.dst_idx[0]])


def test_errors():
    x, score = torch.zeros(1, 9, 2), torch.zeros(1, 9)
    for contextual in (0, 6):
        with pytest.raises(ValueError, match=rf"contextual in \[1, num_tokens - dominant\], got {contextual}"):
            visionzip(x, score, x, dominant=4, contextual=contextual)
    with pytest.raises(ValueError, match="expected compat to be None or 'released', got 'x'"):
        visionzip(x, score, x, compat="x")
