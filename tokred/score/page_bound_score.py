# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""page_bound_score: upper bounds of the logits within a block of keys, from their minimum and maximum."""

import torch
from torch import Tensor

from tokred.score.qk_score import qk_score


def page_bound_score(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    num_blocks: Tensor | None = None,
    sum_heads: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Bound ``scale * q . k`` over the keys of each block: ``scale * sum_c max(q_c * low_c, q_c * high_c)``.

    A composite of two ``qk_score``s, which read both summaries once: positive channels of ``q`` meet ``high``, negative
    ones ``low``.

    Args:
        q: Queries, ``[batch_size, num_q_heads, q_len, head_dim]`` with up to 16 queries, as ``tokred.qk_score`` takes them.
        low: ``[batch_size, num_kv_heads, max_blocks, head_dim]`` in the dtype of ``q``: each block's least value per
            channel, from ``tokred.block_summary``.
        high: Likewise the greatest.
        num_blocks: ``[batch_size]`` int32, contiguous: the score of blocks from there on is -inf.
        sum_heads: Sum over the query heads.
        scale: Factor, at least 0: with a negative one there is no upper bound.

    Returns:
        float32, ``[batch_size, num_q_heads, q_len, max_blocks]``, or ``[batch_size, q_len, max_blocks]`` with ``sum_heads``.
        Up to rounding no less than any logit in the block; rank by it, do not prove by it.

    Deterministic. No gradient. An infinite summary makes NaN (0 times inf). Quest (Tang et al. 2024), section 3.3.

    Example:
        >>> k = torch.randn(1, 2, 64, 32)
        >>> low, high = tokred.block_summary(k, 16, reduce="minmax")
        >>> tokred.page_bound_score(torch.randn(1, 4, 1, 32), low, high).shape
        torch.Size([1, 4, 1, 4])
    """
    if scale < 0:
        raise ValueError(f"page_bound_score: expected scale of at least 0, got {scale}")
    if low.shape != high.shape:
        raise ValueError(
            f"page_bound_score: expected low and high of one shape, got {list(low.shape)}, {list(high.shape)}"
        )
    above = qk_score(q.clamp(min=0), high, kv_lens=num_blocks, sum_heads=sum_heads, scale=scale)
    below = qk_score(q.clamp(max=0), low, kv_lens=num_blocks, sum_heads=sum_heads, scale=scale)
    return torch.add(above, below)
