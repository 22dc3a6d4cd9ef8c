# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""match_both_ways: bipartite matching from even to odd tokens, and then from odd ones to the even ones that are left."""

from typing import Any

import torch
from torch import Tensor

from tokred.merge.bipartite_match import bipartite_match


def _merged(dst_idx: Tensor, match_idx: Tensor) -> Tensor:
    """Return which tokens went to the row of their match."""
    return (match_idx >= 0) & (dst_idx.gather(1, match_idx.clamp(min=0)) == dst_idx)


def match_both_ways(
    metric: Tensor, r: int, second_r: int, *, num_protected: int = 0, protect: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``r`` even tokens into odd ones, then ``second_r`` odd tokens into even ones that have not merged.

    Both matchings are made from the same similarities, of the tokens as they came. An odd token that has received others
    may go on to an even one and takes them along.

    Args:
        metric: As for ``bipartite_match``, ``[batch_size, num_tokens, dim]``.
        r: How many even tokens merge; fewer than there are unprotected ones, or ``second_r`` must be 0.
        second_r: How many odd tokens merge.
        num_protected: The first tokens, which neither merge nor receive.
        protect: Bool ``[batch_size, num_tokens]``, more of them.
        options: ``weight``, ``offset``, ``group``, ``normalize`` and ``eps`` of ``bipartite_match``.

    Returns:
        ``(dst_idx, stays, score)``, each ``[batch_size, num_tokens]``: int64, the output row of each token, ``num_tokens - r -
        second_r`` rows in their original order; bool, which tokens did not merge into another; and float32, the score of
        each token in the direction in which it may merge, -inf where it may not.

    A composite of two calls of ``bipartite_match``, without a sync; the second one computes the similarities again, since
    nothing of them is stored and its destinations depend on the first one's choice. Deterministic; shapes depend on shapes
    and counts alone. A map has no gradient.

    Source: "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", section 3.2.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.8, 0.3]]])
        >>> tokred.match_both_ways(metric, 1, 1)[0].tolist()
        [[0, 0, 1, 1, 2]]
    """
    first, match_idx, score = bipartite_match(
        metric, r, num_protected=num_protected, protect=protect, return_score=True, **options
    )
    merged = _merged(first, match_idx)
    place = torch.arange(metric.shape[1], device=metric.device)
    even, odd = (place[i::2][(num_protected + 1 - i) // 2 :] for i in (0, 1))
    second, second_match, second_score = bipartite_match(
        metric,
        second_r,
        sources=odd,
        destinations=even,
        protect=merged if protect is None else merged | protect,
        return_score=True,
        **options,
    )
    second_merged = _merged(second, second_match)
    onward = torch.where(second_merged, second_match, place)
    last = torch.where(merged, onward.gather(1, match_idx.clamp(min=0)), onward)
    stays = ~(merged | second_merged)
    return (stays.cumsum(1) - 1).gather(1, last), stays, torch.where(place % 2 == 0, score, second_score)
