# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.mctf import count_of, mctf, merge_attention
from tokred.testing import assert_close


def formula(x, received, r, size, protected, temperatures, both_ways):
    """The steps of section 3 for one image, token by token, in float64: the map in original order, the released order."""
    value = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    t_sim, t_info, t_size = temperatures
    info, small = 1 / received.double(), 1 / size.double()
    info, small = info / info.max(), small / small.max()
    score = ((value @ value.T + 1) / 2) ** (1 / t_sim)
    score = score * (info[:, None] * info) ** (1 / t_info) * (small[:, None] * small) ** (1 / t_size)
    evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    to = {}

    def one_way(sources, destinations, count):
        free = [d for d in destinations if d not in protected]
        best = {s: max(free, key=lambda d: (score[s, d].item(), -d)) for s in sources if s not in protected}
        ranked = sorted(best, key=lambda s: (-score[s, best[s]].item(), s))
        to.update({s: best[s] for s in ranked[:count]})
        return ranked[count:]

    first = r // 2 if both_ways else r
    left = one_way(evens, odds, first)
    unmerged = sorted(left + [t for t in evens if t in protected]) if protected else left
    behind = one_way(odds, [t for t in evens if t not in to], r - first) + [t for t in odds if t in protected]
    rows = [t for t in range(len(x)) if t not in to]

    def last(t):
        return last(to[t]) if t in to else t

    return torch.tensor([rows.index(last(t)) for t in range(len(x))]), unmerged + behind


@pytest.mark.parametrize(("num_tokens", "r", "num_protected"), [(197, 16, 1), (50, 0.35, 1), (64, 9, 0), (33, 10, 2)])
@pytest.mark.parametrize("temperatures", [(1.0, 20.0, 40.0), (0.5, 2.0, 4.0)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_equals_the_formula(device, num_tokens, r, num_protected, temperatures, both_ways):
    x, attn = torch.randn(2, num_tokens, 12), torch.randn(2, 3, num_tokens, num_tokens).mul(2).softmax(-1)
    size = torch.randint(1, 5, (2, num_tokens)).float()
    received = attn.mean((1, 2))
    options = dict(
        zip(("t_sim", "t_info", "t_size"), temperatures), r=r, num_protected=num_protected, both_ways=both_ways
    )
    given = (x.to(device), received.to(device))
    out = mctf(*given, size=size.to(device), **options)
    released = mctf(*given, size=size.to(device), **options, compat="released")
    count = count_of(r, num_tokens, num_protected)
    merged_attn = merge_attention(attn.to(device), out.dst_idx, num_tokens - count, out.score)
    for b in range(2):
        arguments = (x[b], received[b], count, size[b])
        dst_idx, _ = formula(*arguments, set(range(num_protected)), temperatures, both_ways)
        assert_close(out.dst_idx[b].cpu(), dst_idx)
        onto = torch.nn.functional.one_hot(dst_idx).double()  # [tokens, rows]
        weight = received[b].double() * size[b].double() / size[b].max()
        mean = (onto * weight[:, None]) / (onto * weight[:, None]).sum(0)
        assert_close(out.x[b].cpu(), mean.T @ x[b].double())
        assert_close(out.size[b].cpu(), onto.T @ size[b].double())
        assert_close(merged_attn[b].cpu(), mean.T @ attn[b].double() @ onto)
        # T3: the released code protects even tokens alone; its layout is even tokens, then odd ones by score.
        even = {2 * i for i in range(num_protected)}
        dst_idx, order = formula(*arguments, even, temperatures, both_ways)
        rows = released.dst_idx[b].cpu()
        if both_ways:
            assert rows[order].tolist() == list(range(num_tokens - count))
        assert torch.equal(rows[:, None] == rows, dst_idx[:, None] == dst_idx)


def test_poolings(device):
    x, received = torch.randn(2, 40, 6, device=device), torch.rand(2, 40, device=device) + 0.1
    size = torch.randint(1, 5, (2, 40), device=device).float()
    out = {p: mctf(x, received, r=8, size=size, pooling=p) for p in ("attention", "size", "mean", "max")}
    dst_idx = out["mean"].dst_idx
    for b in range(2):
        for row in range(32):
            members = x[b][dst_idx[b] == row]
            of = size[b][dst_idx[b] == row]
            assert_close(out["mean"].x[b, row], members.mean(0))
            assert_close(out["max"].x[b, row], members.amax(0))
            assert_close(out["size"].x[b, row], (of[:, None] * members).sum(0) / of.sum())
            assert all(o.size[b, row] == of.sum() for o in out.values())


def test_counts():
    assert [count_of(r, 197, 1) for r in (16, 0.35, 0, 1000)] == [16, 68, 0, 98]
    assert count_of(16, 20, 1) == 9 and count_of(16, 8, 1) == 0
    assert count_of(0.35, 11, 1) == 3


def test_ties_and_errors(device):
    x, received = torch.ones(1, 24, 3, device=device), torch.ones(1, 24, device=device)
    # Tokens 2 and 4 go to token 1; then 1, with them, and 3 go to the first even token that is left.
    out = mctf(x, received, r=4)
    assert out.dst_idx[0, :8].tolist() == [0, 2, 2, 2, 2, 1, 2, 3] and out.size[0, 2] == 5
    with pytest.raises(ValueError, match="expected pooling 'attention', 'size', 'mean' or 'max', got 'min'"):
        mctf(x, received, pooling="min")
    with pytest.raises(ValueError, match="expected compat to be None or 'released', got 'old'"):
        mctf(x, received, compat="old")
