# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


@pytest.mark.parametrize(("height", "width"), [(2, 2), (1, 5), (4, 6), (7, 9), (64, 64)])
@pytest.mark.parametrize("cell", [(1, 1), (2, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("seed", [None, 0, 5, 2**40 + 1, -1])
def test_one_destination_per_cell(device, height, width, cell, seed):
    num_cells = (height // cell[0]) * (width // cell[1])
    for num_lists in (None, 3):
        sources, destinations = tokred.grid_cells(height, width, cell, seed=seed, num_lists=num_lists, device=device)
        if num_lists is None:
            sources, destinations = sources[None], destinations[None]
        for source, destination in zip(sources.tolist(), destinations.tolist()):
            assert sorted(source + destination) == list(range(height * width))
            assert source == sorted(source) and destination == sorted(destination) and len(destination) == num_cells
            cells = [(t // width // cell[0], t % width // cell[1]) for t in destination]
            assert len(set(cells)) == num_cells
            assert all(y < height // cell[0] and x < width // cell[1] for y, x in cells)
            if seed is None:
                assert all(t // width % cell[0] == t % width % cell[1] == 0 for t in destination)


def places(seed, device, **options):
    """Which token of its cell each destination is, [lists, cells] with cells in order."""
    destinations = tokred.grid_cells(128, 128, (2, 2), seed=seed, device=device, **options)[1]
    y, x = destinations // 128, destinations % 128
    return (y % 2 * 2 + x % 2).gather(-1, (y // 2 * 64 + x // 2).argsort(-1))


def test_draws_are_even_and_their_own(device):
    inside = places(3, device, num_lists=8)
    # 32,768 draws of four: a share's standard deviation is 0.0024; these are fixed numbers, five of it are generous.
    share = torch.bincount(inside.flatten().cpu(), minlength=4) / inside.numel()
    assert (share - 0.25).abs().max() < 0.012
    # Neither lists, nor neighbours along a row and a column, nor seeds repeat each other more than a quarter of the time.
    others = [inside.roll(1, 0), inside.roll(1, 1), inside.roll(64, 1)]
    for other in others + [places(seed, device, num_lists=8) for seed in (4, 2**32 + 3, -3)]:
        assert abs((other == inside).float().mean() - 0.25) < 0.012
    assert torch.equal(places(3, device), inside[0])


def test_same_lists_on_every_machine():
    """The draw is part of the contract: written down once."""
    assert tokred.grid_cells(4, 8, seed=1)[1].tolist() == DRAWN


DRAWN = [8, 11, 13, 14, 19, 23, 25, 29]


def test_empty_and_compiled(device):
    assert [t.tolist() for t in tokred.grid_cells(1, 3, device=device)] == [[0, 1, 2], []]
    assert [list(t.shape) for t in tokred.grid_cells(0, 3, num_lists=2, device=device)] == [[2, 0], [2, 0]]
    assert [list(t.shape) for t in tokred.grid_cells(2, 2, num_lists=0, device=device)] == [[0, 3], [0, 1]]
    torch._dynamo.reset()
    compiled = torch.compile(tokred.grid_cells, fullgraph=True, backend="aot_eager")
    assert_close(compiled(6, 4, seed=9, device=device), tokred.grid_cells(6, 4, seed=9, device=device))


def test_errors():
    with pytest.raises(RuntimeError, match=r"grid_cells: expected .* got 2, 2, \(0, 2\)"):
        tokred.grid_cells(2, 2, (0, 2))
    with pytest.raises(RuntimeError, match="got -1, 2"):
        tokred.grid_cells(-1, 2)
