# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
from torch.nn import functional

from tokred.methods.dapq import dapq
from tokred.testing import assert_close


def formula(q, k, kernel, mode):
    """Pooled sums over pseudo queries of softmax(q K^T / sqrt(d)) over the prompt and those before; one prompt, float64."""
    groups, pseudo = q.shape[0] // k.shape[0], q.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(pseudo, pseudo, dtype=torch.bool).triu(1)
    logits[..., -pseudo:] = logits[..., -pseudo:].masked_fill(hidden, -torch.inf)
    pooling = functional.avg_pool1d if mode == "avg" else functional.max_pool1d
    received = logits.softmax(-1).sum(1)[:, :-pseudo]
    return pooling(received, kernel, 1, kernel // 2).unflatten(0, (-1, groups)).mean(1)


@pytest.mark.parametrize(("mode", "kernel"), [("avg", 5), ("max", 7), ("avg", 1)])
@pytest.mark.parametrize("keep", [0, 20, 80])
def test_equals_the_formula(device, dtype, mode, kernel, keep):
    q = 3 * torch.randn(2, 4, 10, 16).to(device, dtype)
    k, v = torch.randn(2, 2, 2, 90, 16).to(device, dtype)
    out = dapq(k, v, q, keep=keep, kernel=kernel, pooling=mode)
    for b in range(2):
        expected = formula(q[b].cpu(), k[b].cpu(), kernel, mode)
        assert_close(out.score[b].cpu(), expected, rtol=1e-4, atol=1e-6)
        for h in range(2):
            # From scores that agree with the formula; max pooling makes ties at nearly every cut.
            kept = sorted(sorted(range(80), key=lambda i: (-float(out.score[b, h, i]), i))[:keep])
            assert out.kept_idx[b, h].tolist() == kept
            assert_close(out.x[b, h], k[b, h, kept], rtol=0, atol=0)
            assert_close(out.v[b, h], v[b, h, kept], rtol=0, atol=0)
            if mode == "avg" and kernel > 1 and dtype == torch.float32:  # no scores are near each other
                assert kept == sorted(expected[h].topk(keep).indices.tolist())
