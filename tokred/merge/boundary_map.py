# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""boundary_map: words, chunks and runs as a destination map."""

from typing import Literal

import torch
from torch import Tensor

from tokred import _ragged


def boundary_map(
    boundary: Tensor,
    *,
    at: Literal["start", "end"] = "start",
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Number the segments between boundaries: the map by which tokens of a segment merge into one.

    Args:
        boundary: ``[batch_size, num_tokens]`` bool, or packed ``[total_tokens]``: where segments start, or end.
        at: ``"start"``: a marked token is the first of its segment, and tokens before the first mark belong to none.
            ``"end"``: it is the last, and tokens after the last mark are a segment, too, which has not ended.
        valid: Like ``boundary``: False for padding, which belongs to no segment and whose marks do not count.
        cu_seqlens: ``[batch_size + 1]`` int32, with a packed boundary. No segment reaches into another sequence.

    Returns:
        ``(dst_idx, num_segments)``.

        - ``dst_idx``: int64, the shape of ``boundary``: the segment of each token in its sequence, from 0; -1 for none. For
          ``segment_pool``, ``segment_merge`` and ``segment_expand``. Segments beyond their ``num_out`` are dropped there.
        - ``num_segments``: ``[batch_size]`` int32.

    A composite of a running sum and a few comparisons, without a sync: pooled lengths depend on data, and the caller names
    a bound. Deterministic; shapes depend on shapes alone. No gradient: integers.

    Source: words of bytes or characters in Learn Your Tokens and in hierarchical autoregressive transformers (HAT), code
    tokens of one identifier in "On the Effect of Token Merging on Pre-trained Models for Code".

    Example:
        >>> text = torch.tensor([list(b"to be or")])
        >>> tokred.boundary_map(text == ord(" "), at="end")[0].tolist()
        [[0, 0, 0, 1, 1, 1, 2, 2]]
    """
    if boundary.dtype != torch.bool or boundary.dim() != (2 if cu_seqlens is None else 1):
        shape = "[batch_size, num_tokens]" if cu_seqlens is None else "[total_tokens]"
        raise RuntimeError(
            f"boundary_map: expected boundary bool of shape {shape}, "
            f"got {str(boundary.dtype).removeprefix('torch.')} {list(boundary.shape)}"
        )
    if at not in ("start", "end"):
        raise RuntimeError(f"boundary_map: expected at 'start' or 'end', got {at!r}")
    if valid is not None and (valid.shape != boundary.shape or valid.dtype != torch.bool):
        raise RuntimeError(
            f"boundary_map: expected valid bool of shape {list(boundary.shape)}, "
            f"got {str(valid.dtype).removeprefix('torch.')} {list(valid.shape)}"
        )
    mark = boundary if valid is None else boundary & valid
    count = mark.long().cumsum(-1)
    segment = count - 1 if at == "start" else count - mark.long()
    kept = segment >= 0 if valid is None else valid & (segment >= 0)
    if cu_seqlens is None:
        dst_idx = torch.where(kept, segment, -1)
        if dst_idx.shape[1] == 0:
            return dst_idx, dst_idx.new_zeros(dst_idx.shape[:1], dtype=torch.int32)
        return dst_idx, (dst_idx.amax(1) + 1).int()
    total, batch_size = boundary.shape[0], cu_seqlens.shape[0] - 1
    sequence, inside = _ragged.sequence_of("boundary_map", cu_seqlens, total)
    before = torch.cat([count.new_zeros(1), count])[cu_seqlens.clamp(0, total).long()]  # marks before each sequence
    segment = segment - before[sequence]
    dst_idx = torch.where(kept & inside & (segment >= 0), segment, -1)
    num_segments = dst_idx.new_zeros(batch_size).scatter_reduce(0, sequence, dst_idx + 1, "amax")
    return dst_idx, num_segments.int()
