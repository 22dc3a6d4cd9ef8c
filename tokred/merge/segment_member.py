# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_member: the first or the last member of each output row, as a list."""

from typing import Literal

import torch
from torch import Tensor


def segment_member(dst_idx: Tensor, num_out: int, which: Literal["first", "last"] = "first") -> Tensor:
    """List one member of each output row of a map, for what is taken from a token and not averaged, as positions are.

    Args:
        dst_idx: ``[batch_size, num_tokens]`` int64 or int32: the output row of each token, as ``segment_merge`` takes it.
        num_out: How many output rows each sequence has.
        which: ``"first"`` or ``"last"`` in token order.

    Returns:
        ``[batch_size, num_out]`` int64, -1 for a row without members: a list for ``gather_tokens``, which then gathers
        position ids, masks and caches in one launch.

    A composite of two torch ops, without a sync. Deterministic; shapes depend on shapes and ``num_out`` alone. No gradient:
    a list of integers.

    Source: a run keeps the position of its first token in FrameFusion; words take their first or last byte in hierarchical
    byte models.

    Example:
        >>> dst_idx = torch.tensor([[1, 0, 1, -1, 0]])
        >>> tokred.segment_member(dst_idx, 3).tolist(), tokred.segment_member(dst_idx, 3, "last").tolist()
        ([[1, 0, -1]], [[4, 2, -1]])
    """
    if dst_idx.dim() != 2:
        raise RuntimeError(
            f"segment_member: expected dst_idx of shape [batch_size, num_tokens], got {list(dst_idx.shape)}"
        )
    if which not in ("first", "last"):
        raise RuntimeError(f"segment_member: expected which 'first' or 'last', got {which!r}")
    batch_size, num_tokens = dst_idx.shape
    row = torch.where((dst_idx >= 0) & (dst_idx < num_out), dst_idx, num_out).long()
    token = torch.arange(num_tokens, device=dst_idx.device).expand(batch_size, -1)
    out = torch.full((batch_size, num_out + 1), num_tokens if which == "first" else -1, device=dst_idx.device)
    out = out.scatter_reduce(1, row, token, "amin" if which == "first" else "amax")[:, :num_out]
    return torch.where(out == num_tokens, -1, out)
