# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""HiPrune: keep what a middle layer of the encoder looks at with its neighbours, and the rest by a deep layer's attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import tokred
from tokred.methods import Method, Reduced, kept_mask

METHOD = Method(
    name="hiprune",
    paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    stage="encoder, projector",
    basis="authors' code",
    deviations=(
        "Neighbours are those on the grid, without those across the ends of its rows.",
        "Exactly `keep` tokens are kept.",
        "Scores are float32; on Qwen2.5-VL the released code takes the softmax in bfloat16.",
        "Ties go to the lowest index.",
    ),
    compat={
        "released": "neighbours on the flat index, clamped: ends of rows adjoin, as in the LLaVA code",
        "qwen": "the same, and 1 is taken from the deep score of anchors and neighbours instead of leaving them out: with "
        "scores that are sums over queries some are picked twice, and fewer than `keep` tokens are kept",
    },
)


def column_attention(q: Tensor, k: Tensor, *, num_protected: int = 1, scale: float | None = None) -> Tensor:
    """Return the attention that each patch receives, averaged over heads and queries, ``[batch_size, num_tokens]``.

    ``q`` and ``k`` are ``[batch_size, num_heads, num_protected + num_tokens, head_dim]``; [CLS], the first of them, asks, too.
    """
    received = tokred.attn_received(q, k, scale=scale)[0].mean(1) / q.shape[2]
    return received[:, num_protected:]


def hiprune(
    x: Tensor,
    object_score: Tensor,
    deep_score: Tensor,
    *,
    keep: int,
    grid: Sequence[tuple[int, int]],
    alpha: float = 0.1,
    compat: str | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep anchors (the best of a middle layer), their neighbours, and the best others of a deep layer.

    Args:
        x: Visual tokens without [CLS], ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        object_score: Attention received in the middle layer (the 9th of CLIP-L, the 16th of Qwen2.5-VL), ``[batch_size,
            num_tokens]`` or ``[total_tokens]``; see ``column_attention``.
        deep_score: Attention received in a deep layer (the last but one of CLIP-L, the last of Qwen2.5-VL).
        keep: How many tokens to keep of each image or crop.
        grid: Height and width in tokens, one pair for all images of a dense batch, packed one per image.
        alpha: The share of the budget for anchors with their four neighbours: ``round(keep * alpha / 5)`` anchors.
        compat: None, "released" or "qwen" (see ``METHOD``).
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` and ``kept_idx`` in original order, ``score`` (the deep one) and, for packed input and with
        compat="qwen", ``num_kept``.

    Source: the authors' anchor, buffer and register tokens.
    """
    if compat not in (None, "released", "qwen"):
        raise ValueError(f"hiprune: expected compat to be None, 'released' or 'qwen', got {compat!r}")
    packed: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}

    num_tokens = x.shape[-2]
    anchors, _ = tokred.select_topk(object_score, round(keep * alpha / 5), return_num_kept=True, **packed)
    anchors = kept_mask(anchors, num_tokens, cu_seqlens)
    if cu_seqlens is None:
        near = tokred.grid_dilate(anchors, *grid[0], flat=compat is not None)
    else:
        parts = anchors.split([height * width for height, width in grid])
        near = torch.cat([tokred.grid_dilate(part, *size, flat=compat is not None) for part, size in zip(parts, grid)])
    if compat == "qwen":
        count = near.sum(-1) if cu_seqlens is None else pad(near.cumsum(0), (1, 0))[cu_seqlens.long()].diff()
        again = tokred.select_topk(deep_score.float() - near.float(), keep - count, max_k=keep, **packed)[0]
        near = near | kept_mask(again, num_tokens, cu_seqlens)
        x_kept, kept_idx, num_kept = tokred.prune_topk(
            x, deep_score, keep, drop_mask=~near, return_num_kept=True, **packed
        )
        return Reduced(x_kept, kept_idx=kept_idx, score=deep_score, num_kept=num_kept)
    x_kept, kept_idx, num_kept = tokred.prune_topk(x, deep_score, keep, keep_mask=near, return_num_kept=True, **packed)
    counts = None if cu_seqlens is None else num_kept
    return Reduced(x_kept, kept_idx=kept_idx, score=deep_score, num_kept=counts)
