# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pool_grid: grids of any size pooled to one size, with their positions."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tokred import _ragged
from tokred.merge.segment_merge import segment_merge


def pool_grid(
    x: Tensor,
    grids: Tensor,
    out_grid: Sequence[int],
    *,
    mode: Literal["mean", "max", "sum"] = "mean",
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Pool images and videos, each with a grid of its own, by adaptive windows to a grid that all share.

    Cell ``i`` of ``n`` on an axis of ``length`` covers ``floor(i * length / n)`` up to ``ceil((i + 1) * length / n)``, as in
    ``torch.nn.functional.adaptive_avg_pool2d``: neighbours share a row where the length is no multiple.

    Args:
        x: Tokens, row-major by grid: ``[batch_size, num_tokens, dim]`` with padding behind each grid, or packed
            ``[total_tokens, dim]``; float32, float16 or bfloat16.
        grids: ``[batch_size, num_axes]`` int64 or int32, on the device of ``x``: each item's rows and columns, or frames, rows
            and columns. A grid with more cells than its item has tokens loses those.
        out_grid: The shared grid, an integer per axis (1 to 3 axes). An axis should not be longer than any item's: cells
            that no token falls into are 0.
        mode: ``"mean"``, ``"max"`` or ``"sum"`` of a cell's tokens.
        positions: The shape of ``x`` with any number of axes instead of ``dim``: position ids, pooled by the same windows in
            float32.
        cu_seqlens: ``[batch_size + 1]`` int32, for packed tokens.

    Returns:
        ``[batch_size, cells, dim]``, row-major, the dtype of ``x``; with positions ``(pooled, positions)``, these float32. Cast
        them to integers for positions that count (LLaVolta and M-RoPE round down).

    A composite: integer arithmetic on tokens, and one ``segment_merge`` with two entries per token and axis, without a loop
    over items and without a sync. Deterministic, and an item's result does not depend on the others; shapes depend on
    shapes and ``out_grid`` alone. Differentiable in ``x``.

    Source: adaptive pooling of TokenFLEX, LangDC and TDC, of any-resolution images and videos in one batch.

    Example:
        >>> x = torch.arange(10.0)[:, None]  # a grid of 2 x 3 and one of 1 x 4
        >>> grids, cu_seqlens = torch.tensor([[2, 3], [1, 4]]), torch.tensor([0, 6, 10], dtype=torch.int32)
        >>> tokred.pool_grid(x, grids, (1, 2), cu_seqlens=cu_seqlens).squeeze(2).tolist()
        [[2.0, 3.0], [6.5, 8.5]]
    """
    packed = cu_seqlens is not None
    if x.dim() != (2 if packed else 3):
        shape = "[total_tokens, dim]" if packed else "[batch_size, num_tokens, dim]"
        raise RuntimeError(f"pool_grid: expected x of shape {shape}, got {list(x.shape)}")
    num_axes, batch_size = len(out_grid), x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not 1 <= num_axes <= 3 or any(n < 1 for n in out_grid):
        raise RuntimeError(f"pool_grid: expected out_grid of 1 to 3 axes of at least 1, got {tuple(out_grid)}")
    if grids.shape != (batch_size, num_axes) or grids.is_floating_point():
        raise RuntimeError(
            f"pool_grid: expected integer grids of shape [batch_size, num_axes] = {[batch_size, num_axes]}, "
            f"got {str(grids.dtype).removeprefix('torch.')} {list(grids.shape)}"
        )
    if positions is not None and positions.shape[:-1] != x.shape[:-1]:
        raise RuntimeError(
            f"pool_grid: expected positions of shape {[*x.shape[:-1], 'num_axes']}, got {list(positions.shape)}"
        )
    num_cells = math.prod(out_grid)
    if cu_seqlens is None:
        num_tokens = x.shape[1]
        index = torch.arange(num_tokens, device=x.device).repeat(batch_size)
        item = torch.arange(batch_size, device=x.device).repeat_interleave(num_tokens)
        inside = index >= 0
    else:
        item, inside = _ragged.sequence_of("pool_grid", cu_seqlens, x.shape[0])
        index = torch.arange(x.shape[0], device=x.device) - cu_seqlens[item]
    # Two cells per axis: the first one that holds the token's row, and the next if it does, too.
    cells = torch.where(inside, item, -1)[:, None]
    length = grids.long().clamp(min=1)[item]
    used = (grids > 0).all(1)[item] & (index < length.prod(1))
    strides = [length[:, axis + 1 :].prod(1) for axis in range(num_axes)]
    for axis, n in enumerate(out_grid):
        along = length[:, axis]
        at = index // strides[axis] % along
        first, last = at * n // along, ((at + 1) * n + along - 1) // along - 1
        pair = torch.stack([first, torch.where(last > first, first + 1, -1)], 1)[:, None]
        both = (cells[..., None] >= 0) & (pair >= 0)
        cells = torch.where(both, cells[..., None] * n + pair, -1).flatten(1)
    cells = torch.where(used[:, None], cells, -1)
    token = torch.arange(cells.shape[0], device=x.device)[:, None].expand_as(cells)

    def long(t: Tensor) -> Tensor:
        return (t if packed else t.flatten(0, 1))[None]

    pooled, _, others = segment_merge(
        long(x),
        cells.reshape(1, -1),
        batch_size * num_cells,
        src_idx=token.reshape(1, -1),
        others=[] if positions is None else [long(positions.float())],
        mode=mode,
    )
    out = [t[0].unflatten(0, (batch_size, num_cells)) for t in (pooled, *others)]
    return out[0] if positions is None else (out[0], out[1])
