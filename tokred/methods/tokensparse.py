# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Token Sparse Attention: a layer of prefill attends among the tokens that carry most of the recent queries' attention."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method
from tokred.methods.snapkv import pool

METHOD = Method(
    name="tokensparse",
    paper="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "The lists alone: q, k and v are gathered by them, attend causally, and the output goes back onto zeros, by "
        "`tokred.gather_tokens`, the caller's attention and `tokred.scatter_tokens`.",
        "Cumulative shares are exact sums of weights in fixed point; the released cumulative sum is rounded at each step.",
        "Lists have a fixed length and counts stay on the device; the released code reads the count of its one prompt.",
        "Ties go to the lowest index.",
    ),
)


def tokensparse(
    q: Tensor,
    k: Tensor,
    *,
    tau: float = 0.005,
    min_keep: int = 1024,
    max_keep: int | None = None,
    window: int = 128,
    kernel: int = 7,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """List the last ``window`` tokens and, per head, the best others: as many as leave out a share ``tau`` of the attention.

    Args:
        q: Queries of the last ``window`` tokens, rotated, ``[batch_size, num_q_heads, window, head_dim]``.
        k: Keys of all tokens, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        tau: Tokens that together receive less, averaged over heads, are left out, and the next one.
        min_keep: At least so many others are kept.
        max_keep: At most so many, which bounds the lists; all by default.
        window: How many last tokens are always listed.
        kernel: Of the average over neighbours, odd.
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``(kept_idx, num_kept)``: ``[batch_size, num_q_heads, max_keep + window]`` int64, ascending, -1 past the end, and
        ``[batch_size, num_q_heads]`` int32, the same for all heads.

    Source: the authors' scores of the recent window, their cut by coverage and their lists per head.
    """
    num_others = k.shape[2] - window
    if q.shape[2] != window or num_others < 0:
        raise ValueError(f"tokensparse: expected q of the last {window} of {k.shape[2]} tokens, got {q.shape[2]}")
    max_keep = num_others if max_keep is None else min(max_keep, num_others)
    received = tokred.attn_received(q, k, causal=True, scale=scale)[0][:, :, :num_others] / window
    score = pool(received, kernel, "avg")
    # The fewest tokens that hold more than the share 1 - tau: one more than stay, unless all are needed.
    _, covering = tokred.select_rule(score.mean(1), "top_p", 1 - tau)
    count = torch.where(covering < num_others, covering - 1, covering).clamp(min(min_keep, max_keep), max_keep)
    others, _ = tokred.select_topk(score, count[:, None].expand(-1, q.shape[1]).contiguous(), max_k=max_keep)
    recent = torch.arange(num_others, k.shape[2], device=k.device).expand(*others.shape[:2], -1)
    # Behind a shorter list, so that it ascends and its empty slots are last.
    slot = torch.arange(max_keep + window, device=k.device).expand(*others.shape[:2], -1) - count[:, None, None]
    listed = torch.nn.functional.pad(others, (0, window), value=-1)
    kept_idx = torch.where(slot < 0, listed, torch.where(slot < window, recent[..., :1] + slot, -1))
    return kept_idx, (count[:, None] + window).expand(-1, q.shape[1]).int()
