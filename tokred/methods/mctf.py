# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""MCTF: merge tokens that are alike, little attended to and small, in both directions, before attention is applied."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="mctf",
    paper="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    stage="encoder",
    basis="authors' code",
    deviations=(
        "Tokens stay in their original order; the released code puts even tokens first, then odd ones by their score.",
        "num_protected protects the first tokens; the released code protects the first even ones (tokens 0 and 2 of two).",
        "The product of criteria is taken to the power t_sim, which changes no maximum and no order.",
        "A zero token has similarity 0 (unit vectors are v / max(|v|, 1e-12)); the released code divides by 0.",
        "Scores, weights and sizes are float32 whatever the model's dtype. Ties go to the lowest index.",
    ),
    compat={"released": "the released order of tokens, and the first even tokens protected"},
)


def count_of(r: float, num_tokens: int, num_protected: int) -> int:
    """Return how many tokens merge: at least 10 stay, below 1 it is a share of the unprotected ones, at most half of them."""
    if num_tokens - r < 10:
        r = num_tokens - 10
    if r < 1:
        r = int((num_tokens - num_protected) * max(r, 0))
    return max(0, min(int(r), (num_tokens - num_protected) // 2))


def merge_attention(attn: Tensor, dst_idx: Tensor, num_out: int, weight: Tensor) -> Tensor:
    """Return the attention of merged tokens: columns of members added, their rows averaged by ``weight``.

    ``attn`` is ``[batch_size, num_heads, num_tokens, num_tokens]``, the result ``[..., num_out, num_out]`` and applies to the
    merged values ("one-step-ahead attention").
    """
    batch_size, num_heads = attn.shape[:2]
    each = dst_idx.repeat_interleave(num_heads, 0)
    of_keys = attn.flatten(0, 1).transpose(1, 2).contiguous()
    columns = tokred.segment_merge(of_keys, each, num_out, mode="sum")[0].transpose(1, 2).contiguous()
    rows = tokred.segment_merge(columns, each, num_out, weight=weight.repeat_interleave(num_heads, 0))[0]
    return rows.unflatten(0, (batch_size, num_heads))


def released_order(dst_idx: Tensor, stays: Tensor, score: Tensor, num_out: int, by_score: bool) -> Tensor:
    """Return the map with even tokens first (by score without protected tokens), then odd ones by score."""
    odd = torch.arange(dst_idx.shape[1], device=dst_idx.device) % 2
    key = score if by_score else torch.where(odd > 0, score, 0.0)
    by_key = key.argsort(dim=1, descending=True, stable=True)
    part = torch.where(stays, odd, 2).gather(1, by_key).argsort(dim=1, stable=True)
    tokens = by_key.gather(1, part)[:, :num_out]
    place = torch.arange(num_out, device=dst_idx.device).expand_as(tokens)
    return torch.zeros_like(tokens).scatter_(1, dst_idx.gather(1, tokens), place).gather(1, dst_idx)


def mctf(
    x: Tensor,
    received: Tensor,
    *,
    r: float = 16,
    size: Tensor | None = None,
    num_protected: int = 1,
    t_sim: float = 1.0,
    t_info: float = 20.0,
    t_size: float = 40.0,
    both_ways: bool = True,
    pooling: str = "attention",
    compat: str | None = None,
) -> Reduced:
    """Merge up to ``r`` tokens by similarity times inverse attention times inverse size, inside a block.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``.
        received: The attention that each token receives in this block, the mean over heads and queries, ``[batch_size,
            num_tokens]`` (``tokred.attn_received`` gives it without the matrix).
        r: How many tokens to merge, or a share below 1 (``count_of``).
        size: How many originals each token stands for, ``[batch_size, num_tokens]`` float32; None: one each.
        num_protected: The first tokens, which never merge.
        t_sim: Temperature of ``(cos + 1) / 2``; each criterion is taken to the power 1 / temperature.
        t_info: Of the inverse attention, relative to the largest.
        t_size: Of the inverse size, likewise.
        both_ways: Half merges from even to odd tokens, the rest from odd tokens to even ones that are left.
        pooling: "attention": the mean weighted by attention times size; "size": by size; "mean"; or "max".
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x``, ``dst_idx``, ``size``, and as ``score`` the weights of the mean (ones but for "attention" and
        "size"), with which ``merge_attention`` merges the block's attention. The next attention adds ``size.log()``.

    Differentiable in ``x``. Source: paper sections 3.1 to 3.3; the authors' code for normalisation and counts.
    """
    if compat not in (None, "released"):
        raise ValueError(f"mctf: expected compat to be None or 'released', got {compat!r}")
    if pooling not in ("attention", "size", "mean", "max"):
        raise ValueError(f"mctf: expected pooling 'attention', 'size', 'mean' or 'max', got {pooling!r}")
    num_tokens = x.shape[1]
    received = received.float()
    sizes = torch.ones_like(received) if size is None else size
    inverse, small = received.reciprocal(), sizes.reciprocal()
    info = (inverse / inverse.amax(1, keepdim=True)) ** (t_sim / t_info)
    criteria = (info * (small / small.amax(1, keepdim=True)) ** (t_sim / t_size)).contiguous()
    count = count_of(r, num_tokens, num_protected)
    first = count // 2 if both_ways else count
    protect = None
    if compat == "released" and num_protected > 1:
        place = torch.arange(num_tokens, device=x.device)
        protect = ((place % 2 == 0) & (place < 2 * num_protected)).expand(x.shape[0], -1).contiguous()
    dst_idx, stays, score = tokred.match_both_ways(
        x,
        first,
        count - first,
        num_protected=num_protected if protect is None else 0,
        protect=protect,
        weight=criteria,
        offset=1.0,
    )
    num_out = num_tokens - count
    if compat == "released":
        dst_idx = released_order(dst_idx, stays, score, num_out, by_score=num_protected == 0)
    weight = torch.ones_like(sizes)
    if pooling in ("attention", "size"):
        weight = sizes if pooling == "size" else received * sizes / sizes.amax(1, keepdim=True)
    if pooling == "max":
        merged, merged_size = tokred.segment_merge(x, dst_idx, num_out, size=sizes, mode="max")
    else:
        merged, merged_size = tokred.segment_merge(x, dst_idx, num_out, weight=weight.contiguous(), size=sizes)
    return Reduced(merged, dst_idx=dst_idx, size=merged_size, score=weight)
