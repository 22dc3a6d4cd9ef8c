# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""merge_weight: the weights that make a sum of members an anchor's blend or an ordered halving."""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["target_plus_mean", "blend", "blend_mean", "halving"]


def merge_weight(dst_idx: Tensor, num_out: int, anchor_idx: Tensor, rule: Rule, *, beta: float = 0.6) -> Tensor:
    """Weigh the members of each output row for ``segment_merge(..., mode="sum")`` by a rule that singles out its anchor.

    Args:
        dst_idx: ``[batch_size, num_tokens]`` int64 or int32: the output row of each token, as ``segment_merge`` takes it; an
            anchor goes to its own row.
        num_out: How many output rows each sequence gets.
        anchor_idx: ``[batch_size, num_out]`` int64 or int32: the token that each row is built around, for example
            ``kept_idx``; -1 for none. A row whose anchor is not among its members becomes their plain mean.
        rule: What a row of an anchor ``a`` and others ``x_1 ... x_m``, in token order, becomes.
            ``"target_plus_mean"``: ``a + mean(x)``.
            ``"blend"``: ``beta * a + (1 - beta) * mean(x)``.
            ``"blend_mean"``: ``w * a + (1 - w) * mean(a, x)`` with ``w = max(beta, 1 / (m + 2))``: one over the number of
            members, ``m + 1``, and one more.
            ``"halving"``: ``a = (a + x_i) / 2`` for each ``i`` in turn; in closed form ``a / 2^m + sum(x_i / 2^(m - i + 1))``.
            An anchor alone stays as it is.
        beta: Share of the anchor in a blend.

    Returns:
        ``[batch_size, num_tokens]`` float32, 0 for dropped tokens. Sums to 1 over a row, to 2 by ``"target_plus_mean"``.

    A composite of a few torch ops on ``[batch_size, num_tokens]``, without a sync. Deterministic; shapes depend on shapes
    alone. Not differentiable, as maps are not; the sum is, in the tokens.

    Source: ``"target_plus_mean"``: the released code of VisionZip and VisionDrop. ``"blend"`` (with beta 0.6) and
    ``"halving"``: HoliTom's static merging and its merging inside the LLM. ``"blend_mean"``: FastVID's anchors.

    Example:
        >>> x = torch.tensor([[[8.0], [2.0], [4.0], [6.0]]])
        >>> dst_idx, anchor_idx = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 3]])
        >>> weight = tokred.merge_weight(dst_idx, 2, anchor_idx, "halving")
        >>> tokred.segment_merge(x, dst_idx, 2, weight=weight, mode="sum")[0].flatten().tolist()
        [4.5, 6.0]
    """
    if dst_idx.dim() != 2 or anchor_idx.shape != (dst_idx.shape[0], num_out):
        raise RuntimeError(
            "merge_weight: expected dst_idx of shape [batch_size, num_tokens] and anchor_idx of shape "
            f"[batch_size, {num_out}], got {list(dst_idx.shape)} and {list(anchor_idx.shape)}"
        )
    batch_size, num_tokens = dst_idx.shape
    device = dst_idx.device
    kept = (dst_idx >= 0) & (dst_idx < num_out)
    row = torch.where(kept, dst_idx, num_out).long()  # dropped tokens have a row of their own
    none = anchor_idx.new_full((batch_size, 1), -1)
    token = torch.arange(num_tokens, device=device)
    is_anchor = kept & (torch.cat([anchor_idx, none], 1).gather(1, row) == token)

    def of_row(flag: Tensor) -> Tensor:
        """Count tokens by row: integers, so no order of additions shows."""
        return torch.zeros(batch_size, num_out + 1, dtype=torch.int64, device=device).scatter_add(1, row, flag.long())

    others = of_row(kept & ~is_anchor)
    num_others, has_anchor = others.gather(1, row).float(), of_row(is_anchor).gather(1, row) > 0
    alone = num_others == 0
    mean = 1 / num_others.clamp(min=1)
    if rule == "target_plus_mean":
        weight = torch.where(is_anchor, 1.0, mean)
    elif rule == "blend":
        weight = torch.where(is_anchor, torch.where(alone, 1.0, beta), (1 - beta) * mean)
    elif rule == "blend_mean":
        share = (1 / (num_others + 2)).clamp(min=beta)
        weight = (1 - share) / (num_others + 1) + torch.where(is_anchor, share, 0)
    elif rule == "halving":
        # The place of a token among the others of its row: sorted by row, tokens that are no such others come last.
        key = torch.where(is_anchor, num_out, row)
        order = key.argsort(stable=True, dim=1)
        first = (others.cumsum(1) - others).gather(1, row)
        place = torch.empty_like(order).scatter(1, order, token.expand_as(order)) - first
        weight = torch.exp2(torch.where(is_anchor, -num_others, place - num_others))
    else:
        raise RuntimeError(
            f"merge_weight: expected rule 'target_plus_mean', 'blend', 'blend_mean' or 'halving', got {rule!r}"
        )
    return torch.where(kept, torch.where(has_anchor, weight, mean), 0)
