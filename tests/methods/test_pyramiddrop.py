# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.pyramiddrop import pyramiddrop, schedule
from tokred.testing import assert_close


def formula(x, q, k, keep, first, last):
    """The released ranking of one prompt, in float64: the full softmax row of the last token, mean over heads, top-k."""
    k = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    row = (q.double() @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)
    order = sorted(range(first, last), key=lambda j: (-float(row[j]), j))
    return x[[*range(first), *sorted(order[:keep]), *range(last, len(x))]]


def test_schedule():
    assert schedule(576) == [288, 144, 72]
    assert schedule(577, (0.5, 0.0)) == [288, 0]


def test_three_drops_equal_the_formula(device):
    """The states themselves stand for queries and keys, padding included, so that all follows from the first one."""
    lens, stages = [90, 81, 77], [(75, 32), (75, 16), (75, 8)]
    x = torch.randn(3, 90, 64, device=device)
    x[:, 30:40] = x[:, 20:30]  # tokens that tie
    alone = [x[b, :n].cpu() for b, n in enumerate(lens)]
    kv_lens, first, last = torch.tensor(lens, device=device), 11, 75
    for _, keep in stages:
        heads = x.unflatten(-1, (4, 16)).transpose(1, 2)
        end = (kv_lens - 1)[:, None, None, None].expand(-1, 4, 1, 16)
        out = pyramiddrop(
            x, heads.gather(2, end.long()), heads[:, ::2], keep=keep, first=first, last=last, kv_lens=kv_lens
        )
        for b in range(3):
            by_head = alone[b].unflatten(-1, (4, 16)).transpose(0, 1)
            alone[b] = formula(alone[b], by_head[:, -1:], by_head[::2], keep, first, last)
            assert int(out.num_kept[b]) == len(alone[b])
            assert_close(out.x[b, : len(alone[b])].cpu(), alone[b], rtol=0, atol=0)
        x, kv_lens, last = out.x, out.num_kept, first + keep


def test_needs_scores():
    with pytest.raises(ValueError, match="pyramiddrop: expected q and k of the scoring layer, or score"):
        pyramiddrop(torch.zeros(1, 9, 2), keep=1, first=2, last=5)
