# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""ToMeSD: merge an image's latent tokens before a diffusion block's attention, and unmerge its output."""

import math

from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="tomesd",
    paper="Token Merging for Fast Stable Diffusion",
    stage="encoder",
    basis="authors' code",
    deviations=(
        "Tokens stay in their original order; the released code puts unmerged sources, by similarity, before destinations.",
        "The token of a cell is drawn by a seed, the same on every device; the released code draws it from torch's generator.",
        "A ratio beyond what cells allow is an error; the released code merges fewer (1 - 1 / (sx sy) at most).",
        "A zero token has similarity 0 (unit vectors are v / max(|v|, 1e-12)); the released code divides by 0.",
        "Similarities are float32 whatever the model's dtype. Ties go to the lowest index.",
    ),
    compat={
        "released": "the released order of tokens, the cap of the ratio, and no draw where the batch size is odd",
    },
)


def grid_of(num_tokens: int, height: int, width: int) -> tuple[int, int, int]:
    """Return rows, columns and the downsampling of a block with ``num_tokens`` in a U-Net whose latent is given."""
    downsample = math.ceil(math.sqrt(height * width // num_tokens))
    return math.ceil(height / downsample), math.ceil(width / downsample), downsample


def tomesd(
    x: Tensor,
    *,
    height: int,
    width: int,
    ratio: float = 0.5,
    cell: tuple[int, int] = (2, 2),
    seed: int | None = None,
    max_downsample: int = 1,
    compat: str | None = None,
) -> Reduced:
    """Merge ``int(num_tokens * ratio)`` tokens of a block's input into one token of each cell.

    Args:
        x: What enters the block, ``[batch_size, num_tokens, dim]``: tokens of a grid, row by row.
        height: Rows of the latent.
        width: Columns of it. A block with fewer tokens sees a smaller grid (``grid_of``).
        ratio: Share of the tokens that merge.
        cell: Rows and columns of a cell (the released ``sy``, ``sx``): one token of it is a destination.
        seed: Which one, drawn anew per seed (the step of the sampler, say) and shared by the batch; None: the first.
        max_downsample: Blocks that see a smaller grid than this merge nothing.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x``, plain means, and ``dst_idx``. The block is ``x + tokred.segment_expand(block(merged),
        dst_idx)``, unmerged before the residual is added.

    Differentiable in ``x``. Source: paper section 3; the authors' code for cells that the grid does not fill.
    """
    if compat not in (None, "released"):
        raise ValueError(f"tomesd: expected compat to be None or 'released', got {compat!r}")
    batch_size, num_tokens, _ = x.shape
    rows, columns, downsample = grid_of(num_tokens, height, width)
    if rows * columns != num_tokens:
        raise ValueError(f"tomesd: expected {rows} x {columns} tokens of a {height} x {width} latent, got {num_tokens}")
    r = int(num_tokens * ratio) if downsample <= max_downsample else 0
    if compat == "released" and batch_size % 2 == 1:
        seed = None
    sources, destinations = tokred.grid_cells(rows, columns, cell, seed=seed, device=x.device)
    most = sources.shape[0] if destinations.shape[0] > 0 else 0
    if compat == "released":
        r = min(r, most)
    elif r > most:
        raise ValueError(f"tomesd: expected a ratio of at most {most / num_tokens} for {cell} cells, got {ratio}")
    order = "index" if compat is None else "score"
    dst_idx: Tensor = tokred.bipartite_match(x, r, sources=sources, destinations=destinations, order=order)
    merged, size = tokred.segment_merge(x, dst_idx, num_tokens - r)
    return Reduced(merged, dst_idx=dst_idx, size=size)
