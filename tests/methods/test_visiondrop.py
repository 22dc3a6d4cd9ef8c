# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.methods.visiondrop import visiondrop, visual_attention
from tokred.testing import assert_close

FIRST, LAST, LENGTH = 7, 71, 90


def score_formula(q, k):
    """The mean over heads and visual queries of softmax(q K^T / sqrt(d)), causal over the whole prompt, float64."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)[:, FIRST:LAST, FIRST:LAST].mean((0, 1))


def merge_formula(x, score, metric, dominant, contextual, released):
    """One prompt in float64: the rows of the whole sequence, and where each came from."""
    kept = sorted(sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:dominant])
    rest = [i for i in range(len(score)) if i not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    unit, groups = F.normalize(metric.double(), dim=-1), {t: [] for t in targets}
    for i in (i for i in rest if i not in groups):
        groups[max(targets, key=lambda t: (float(unit[i] @ unit[t]), -t))].append(i)
    visual, rows = x[FIRST:LAST].double(), []
    for t, members in groups.items():
        mean = visual[members].mean(0) if members else 0 * visual[t]
        rows.append(visual[t] + mean if released else visual[[t, *members]].mean(0))
    out = torch.cat([x[:FIRST].double(), visual[kept], torch.stack(rows), x[LAST:].double()])
    return out, [*range(FIRST), *(FIRST + i for i in [*kept, *targets]), *range(LAST, len(x))]


def inputs(device, dtype=torch.float32):
    q, k = 2 * torch.randn(3, 4, LENGTH, 16).to(device, dtype), torch.randn(3, 2, LENGTH, 16).to(device, dtype)
    return torch.randn(3, LENGTH, 8).to(device, dtype), k, q


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize(("dominant", "contextual"), [(16, 3), (0, 1), (40, 24)])
def test_equals_the_formula(device, dtype, dominant, contextual, compat):
    x, k, q = inputs(device, dtype)
    k[:, :, 30:40] = k[:, :, 20:30]  # equal metrics
    score, metrics = visual_attention(q, k, first=FIRST, last=LAST), k[:, :, FIRST:LAST].mean(1)
    out = visiondrop(x, score, metrics, dominant=dominant, contextual=contextual, first=FIRST, last=LAST, compat=compat)
    for b in range(3):
        assert_close(out.score[b].cpu(), score_formula(q[b].cpu(), k[b].cpu()), rtol=1e-4, atol=1e-7)
        rows, kept = merge_formula(
            x[b].cpu(), out.score[b].cpu(), metrics[b].cpu(), dominant, contextual, compat == "released"
        )
        assert out.kept_idx[b].tolist() == kept
        rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert_close(out.x[b].double().cpu(), rows, rtol=rtol, atol=rtol / 10)
    sizes = torch.zeros_like(out.size).scatter_add(1, out.dst_idx, torch.ones(3, LENGTH, device=device))
    assert_close(out.size, sizes, rtol=0, atol=0)
    if compat is None:
        restored = tokred.segment_expand(out.x, out.dst_idx)
        assert_close(restored[:, :FIRST], x[:, :FIRST], rtol=0, atol=0)
        assert_close(restored[:, LAST:], x[:, LAST:], rtol=0, atol=0)


def test_ragged_prompts_with_ties(device):
    """What is behind the image, padding included, changes nothing of it; equal scores go to the first."""
    x, k, q = inputs(device)
    score = visual_attention(q, k, first=FIRST, last=LAST).bfloat16().float()
    metric = k[:, :, FIRST:LAST].mean(1)
    out = visiondrop(x, score, metric, dominant=16, contextual=3, first=FIRST, last=LAST)
    for b, n in enumerate([90, 80, 71]):
        part = slice(b, b + 1)
        near = visual_attention(q[part, :, :n], k[part, :, :n], first=FIRST, last=LAST)
        assert_close(near, visual_attention(q[part], k[part], first=FIRST, last=LAST), rtol=1e-5, atol=1e-8)
        alone = visiondrop(x[part, :n], score[part], metric[part], dominant=16, contextual=3, first=FIRST, last=LAST)
        assert_close(out.x[b, : n - 45], alone.x[0], rtol=0, atol=0)
        best = sorted(range(64), key=lambda i: (-float(score[b, i]), i))[:16]
        assert out.kept_idx[b, FIRST : FIRST + 16].tolist() == sorted(FIRST + i for i in best)


def test_errors():
    x, score, metric = torch.zeros(1, 9, 2), torch.zeros(1, 3), torch.zeros(1, 3, 4)
    for contextual in (0, 3):
        with pytest.raises(ValueError, match=rf"visiondrop: expected contextual in \[1, 2\], got {contextual}"):
            visiondrop(x, score, metric, dominant=1, contextual=contextual, first=2, last=5)
    with pytest.raises(ValueError, match="visiondrop: expected compat to be None or 'released', got 'x'"):
        visiondrop(x, score, metric, dominant=1, contextual=1, first=2, last=5, compat="x")
