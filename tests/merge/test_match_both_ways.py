# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def formula(metric, r, second_r, num_protected, protect, weight):
    """The two passes for one sequence, pair by pair, in float64; ties to the lowest index."""
    value = metric.double()
    num_tokens = len(value)
    similarity = (value @ value.T + 1) * weight.double() * weight.double()[:, None]
    free = [t for t in range(num_tokens) if t >= num_protected and not protect[t]]
    evens, odds = [t for t in free if t % 2 == 0], [t for t in free if t % 2]
    to = {}

    def one_way(sources, destinations, count):
        best = (
            {s: max(destinations, key=lambda d: (similarity[s, d].item(), -d)) for s in sources} if destinations else {}
        )
        for s in sorted(best, key=lambda s: (-similarity[s, best[s]].item(), s))[:count]:
            to[s] = best[s]

    one_way(evens, odds, r)
    one_way(odds, [t for t in evens if t not in to], second_r)
    rows = [t for t in range(num_tokens) if t not in to]

    def last(t):
        return last(to[t]) if t in to else t

    return [rows.index(last(t)) for t in range(num_tokens)]


@pytest.mark.parametrize(
    ("num_tokens", "r", "second_r"), [(4, 1, 1), (9, 2, 2), (50, 8, 8), (131, 20, 33), (64, 0, 9), (33, 5, 0)]
)
@pytest.mark.parametrize("num_protected", [0, 1, 2])
def test_equals_the_formula(device, num_tokens, r, second_r, num_protected):
    r, second_r = (min(n, max((num_tokens - num_protected) // 4, 0)) for n in (r, second_r))
    metric = torch.randint(-2, 3, (3, num_tokens, 5)).float()  # exact products, many ties
    weight = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (3, num_tokens))]
    protect = torch.rand(3, num_tokens) < 0.1
    protect[:, -3:] = False
    options = {"num_protected": num_protected, "weight": weight.to(device), "offset": 1.0, "normalize": False}
    for mask in (None, protect) if num_tokens > 30 else (None,):
        dst_idx, stays, score = tokred.match_both_ways(
            metric.to(device), r, second_r, protect=None if mask is None else mask.to(device), **options
        )
        none = torch.zeros_like(protect) if mask is None else mask
        for b in range(3):
            assert stays[b].sum() == num_tokens - r - second_r
            assert dst_idx[b][stays[b]].tolist() == list(range(num_tokens - r - second_r))
            assert dst_idx[b].tolist() == formula(metric[b], r, second_r, num_protected, none[b], weight[b])
        assert (score[:, :num_protected] == -torch.inf).all() and not score.isnan().any()


def test_chains(device):
    """Token 1 receives token 2 and goes on to token 0."""
    metric = torch.tensor([[[1.0, 0.0], [0.95, 0.31], [0.9, 0.44], [0.0, -1.0], [-1.0, 0.0]]], device=device)
    dst_idx = tokred.match_both_ways(metric, 1, 1)[0]
    assert dst_idx.tolist() == [[0, 0, 0, 1, 2]]


def test_sizes_and_compiled(device):
    metric = torch.randn(2, 61, 8, device=device)
    out = tokred.match_both_ways(metric, 9, 11, num_protected=1)
    assert all(row.unique().numel() == 41 for row in out[0])
    torch._dynamo.reset()
    compiled = torch.compile(tokred.match_both_ways, fullgraph=True, backend="aot_eager")
    assert_close(compiled(metric, 9, 11, num_protected=1), out, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"expected r in \[0, 31\]"):
        tokred.match_both_ways(metric, 32, 0)
