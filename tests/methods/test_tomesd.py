# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.methods.tomesd import grid_of, tomesd
from tokred.testing import assert_close


def formula(x, destinations, r):
    """The paper's steps for one image, token by token, in float64: rows in original order, the map, sources by score."""
    value = x.double()
    value = value / value.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    sources = [i for i in range(len(x)) if i not in set(destinations)]
    similarity = value[sources] @ value[destinations].T
    best, place = similarity.max(1)
    ranked = sorted(range(len(sources)), key=lambda a: (-best[a].item(), a))
    to = {sources[a]: destinations[int(place[a])] for a in ranked[:r]}
    rows = [i for i in range(len(x)) if i not in to]
    dst_idx = torch.tensor([rows.index(to.get(i, i)) for i in range(len(x))])
    merged = torch.stack([x[dst_idx == row].double().mean(0) for row in range(len(rows))])
    return merged, dst_idx, [sources[a] for a in ranked[r:]] + list(destinations)


@pytest.mark.parametrize(
    ("height", "width", "ratio", "seed", "cell"),
    [(8, 8, 0.5, 3, (2, 2)), (9, 7, 0.6, 1, (2, 2)), (6, 6, 0.3, None, (2, 3)), (16, 16, 0.75, 5, (2, 2))],
)
def test_equals_the_formula(device, height, width, ratio, seed, cell):
    num_tokens = height * width
    x = torch.randn(2, num_tokens, 12, device=device)
    destinations = tokred.grid_cells(height, width, cell, seed=seed)[1].tolist()
    out = tomesd(x, height=height, width=width, ratio=ratio, seed=seed, cell=cell)
    released = tomesd(x, height=height, width=width, ratio=ratio, seed=seed, cell=cell, compat="released")
    for b in range(2):
        rows, dst_idx, order = formula(x[b].cpu(), destinations, int(num_tokens * ratio))
        assert_close(out.dst_idx[b].cpu(), dst_idx)
        assert_close(out.x[b].cpu(), rows)
        # The released layout: unmerged sources by falling similarity, then destinations; T2.
        own = released.dst_idx[b].cpu()
        assert own[order].tolist() == list(range(num_tokens - int(num_tokens * ratio)))
        assert_close(released.x[b].cpu(), rows[dst_idx[order]])
    # I2: what is unmerged is constant on each row's members.
    restored = tokred.segment_expand(out.x, out.dst_idx)
    assert_close(restored, out.x.gather(1, out.dst_idx[..., None].expand_as(restored)), rtol=0, atol=0)


def test_ties_go_to_the_lowest_index(device):
    x = torch.ones(1, 16, 3, device=device)
    out = tomesd(x, height=4, width=4, ratio=0.25)  # destinations 0, 2, 8, 10
    assert out.dst_idx.tolist() == [[0, 0, 1, 0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert_close(out.x, x[:, :12])


def test_blocks_of_the_u_net(device):
    assert [grid_of(n, 64, 64) for n in (4096, 1024, 256, 64)] == [(64, 64, 1), (32, 32, 2), (16, 16, 4), (8, 8, 8)]
    assert grid_of(35 * 48, 69, 96) == (35, 48, 2)
    x = torch.randn(2, 64, 4, device=device)
    kept = tomesd(x, height=16, width=16)  # a lower block, which is left alone
    assert torch.equal(kept.x, x) and kept.dst_idx[0].tolist() == list(range(64))
    assert tomesd(x, height=16, width=16, max_downsample=2).x.shape == (2, 32, 4)


def test_released_caps_and_odd_batches(device):
    x = torch.randn(3, 64, 4, device=device)
    with pytest.raises(ValueError, match=r"expected a ratio of at most 0.75 for \(2, 2\) cells, got 0.9"):
        tomesd(x, height=8, width=8, ratio=0.9)
    capped = tomesd(x, height=8, width=8, ratio=0.9, seed=1, compat="released")
    assert capped.x.shape == (3, 16, 4)
    first = tomesd(x, height=8, width=8, ratio=0.5, compat="released")
    assert torch.equal(tomesd(x, height=8, width=8, ratio=0.5, seed=1, compat="released").dst_idx, first.dst_idx)  # T17
    with pytest.raises(ValueError, match="expected 8 x 8 tokens of a 8 x 8 latent, got 63"):
        tomesd(x[:, :63], height=8, width=8)
    with pytest.raises(ValueError, match="expected compat to be None or 'released', got 'old'"):
        tomesd(x, height=8, width=8, compat="old")
