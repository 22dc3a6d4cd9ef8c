# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""grid_dilate: marked tokens and their neighbours on a grid."""

import torch
from torch import Tensor


def grid_dilate(
    mask: Tensor, height: int, width: int, *, reach: int = 1, shape: str = "cross", flat: bool = False
) -> Tensor:
    """Mark the neighbours of marked tokens, too: on an image's grid, or as HiPrune's code does on the flat index.

    Args:
        mask: Bool, ``[..., num_tokens]``, row by row; ``num_tokens`` is a multiple of ``height * width`` (several frames).
        height: Rows of a grid.
        width: Columns of a grid.
        reach: How far neighbours are; 0 marks none.
        shape: ``"cross"``, along rows and columns; or ``"square"``, diagonals and what is between them, too.
        flat: Neighbours are the tokens ``i - j``, ``i + j``, ``i - j * width`` and ``i + j * width``, clamped into a frame, as
            released for HiPrune: ends of rows adjoin, and a token of the first row marks token 0. Crosses only.

    Returns:
        Bool, of the shape of ``mask``.

    A composite of torch ops, without a sync. Deterministic; shapes depend on shapes alone. Masks have no gradient.

    Source: HiPrune's buffer tokens.

    Example:
        >>> mask = torch.tensor([0, 0, 1, 0, 0, 0]).bool()
        >>> tokred.grid_dilate(mask, 2, 3).int().tolist(), tokred.grid_dilate(mask, 2, 3, flat=True).int().tolist()
        ([0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1])
    """
    size = height * width
    if size <= 0 or mask.shape[-1] % size:
        raise RuntimeError(
            f"grid_dilate: expected a multiple of {height} x {width} tokens in the last dimension of mask, got "
            f"{list(mask.shape)}"
        )
    if shape not in ("cross", "square") or (flat and shape == "square"):
        raise RuntimeError(f"grid_dilate: expected shape 'cross' or, unless flat, 'square', got {shape!r}")
    if reach < 0:
        raise RuntimeError(f"grid_dilate: expected reach >= 0, got {reach}")
    if mask.numel() == 0:
        return mask.clone()
    if not flat:
        grid = mask.reshape(-1, 1, height, width).float()
        side = 2 * reach + 1
        windows = [(side, side)] if shape == "square" else [(1, side), (side, 1)]
        pooled = [torch.nn.functional.max_pool2d(grid, w, 1, (w[0] // 2, w[1] // 2)) for w in windows]
        return torch.stack(pooled).amax(0).bool().reshape(mask.shape)
    frames = mask.reshape(-1, size)
    at = torch.arange(size, device=mask.device)
    out = frames.int()
    for step in [s * unit for unit in (1, width) for s in range(-reach, reach + 1)]:
        out = out.index_add(1, (at + step).clamp(0, size - 1), frames.int())
    return out.bool().reshape(mask.shape)
