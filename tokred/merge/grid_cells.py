# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""grid_cells: one destination in each cell of a grid, all other tokens sources."""

import torch
from torch import Tensor


def grid_cells(
    height: int,
    width: int,
    cell: tuple[int, int] = (2, 2),
    *,
    seed: int | None = None,
    num_lists: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """List sources and destinations for ``bipartite_match``: one token of each cell of a grid is a destination.

    Args:
        height: Rows of the grid whose tokens stand row by row.
        width: Columns of it.
        cell: Rows and columns of a cell. What fills no cell at the lower and right ends is all sources.
        seed: None: the first token of each cell is its destination. Else one is drawn, evenly, by the seed, the number of
            the list and that of the cell.
        num_lists: None: one list. Else so many, each with a draw of its own (video frames, images that should not share
            one).
        device: Where the lists shall be.

    Returns:
        ``(sources, destinations)``, int64, ``[num_sources]`` and ``[num_cells]``, or ``[num_lists, ...]``, ascending.

    A composite of torch ops on whole numbers, without a sync; the same lists on every device. Deterministic; shapes depend
    on the arguments alone. Lists have no gradient.

    Source: "Token Merging for Fast Stable Diffusion", section 3, where the draw is torch's.

    Example:
        >>> sources, destinations = tokred.grid_cells(3, 4)
        >>> destinations.tolist(), sources.tolist()
        ([0, 2], [1, 3, 4, 5, 6, 7, 8, 9, 10, 11])
        >>> tokred.grid_cells(4, 4, seed=7, num_lists=2)[1].shape
        torch.Size([2, 4])
    """
    if min(height, width) < 0 or min(cell) < 1:
        raise RuntimeError(
            f"grid_cells: expected height and width of at least 0 and a cell of at least 1 x 1, got {height}, {width}, {cell}"
        )
    rows, columns = height // cell[0], width // cell[1]
    lists = 1 if num_lists is None else num_lists
    number = torch.arange(lists * rows * columns, device=device).reshape(lists, rows * columns)
    place = torch.zeros_like(number) if seed is None else _draw(number, seed, cell[0] * cell[1])
    cell_of = number[:1] if lists else number
    row = cell_of // max(columns, 1) * cell[0] + place // cell[1]
    destinations = (row * width + cell_of % max(columns, 1) * cell[1] + place % cell[1]).sort(1).values
    is_destination = torch.zeros((lists, height * width), dtype=torch.uint8, device=device)
    is_destination.scatter_(1, destinations, 1)
    sources = is_destination.argsort(dim=1, stable=True)[:, : height * width - rows * columns]
    return (sources[0], destinations[0]) if num_lists is None else (sources, destinations)


def _draw(number: Tensor, seed: int, count: int) -> Tensor:
    """Return a whole number below count for each number: 32 bits mixed in int64, where no product overflows."""
    mask = 2**32 - 1
    z = ((number + 1) * 0x9E3779B & mask) ^ (seed & mask) ^ ((seed >> 32 & mask) * 0x85EBCA7 & mask)
    for factor in (0x45D9F3B, 0x45D9F3B, 0x27D4EB3):
        z = ((z ^ (z >> 16)) * factor) & mask
    return (z ^ (z >> 16)) * count >> 32
