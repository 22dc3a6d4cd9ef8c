# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""DapQ: keep the keys and values that queries at the positions to be decoded next attend to, whatever their content."""

from torch import Tensor

import tokred
from tokred.methods import Method, Reduced
from tokred.methods.snapkv import pool

METHOD = Method(
    name="dapq",
    paper="Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries",
    stage="prefill, KV",
    basis="paper",
    deviations=(
        "Pooling, and one list per kv head from the mean of its query heads, are those of SnapKV: a summary of the paper "
        "does not say, and no code was found.",
        "Batches of prompts of equal length; ties go to the lowest index.",
    ),
)


def dapq(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    *,
    keep: int,
    kernel: int = 5,
    pooling: str = "avg",
    scale: float | None = None,
) -> Reduced:
    """Keep ``keep`` tokens per head: the best by pooled attention from pseudo queries behind the prompt, which are dropped.

    Args:
        k: Keys of the prompt and the pseudo tokens behind it, rotated, ``[batch_size, num_kv_heads, num_tokens + num_pseudo,
            head_dim]``.
        v: Values, likewise.
        q: Queries of the pseudo tokens, rotated, ``[batch_size, num_q_heads, num_pseudo, head_dim]``: any tokens, 32 of them,
            that went through prefill at the positions behind the prompt.
        keep: How many tokens of the prompt to keep per head.
        kernel: Of the pooling along tokens, odd; 1 for none.
        pooling: "avg" or "max".
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``Reduced`` with ``x`` (keys) and ``v``, ``[batch_size, num_kv_heads, keep, head_dim]``, ``kept_idx`` and ``score``, the
        pooled ones of the prompt. Decoding starts at position ``num_tokens``.

    Source: the paper's pseudo queries.
    """
    num_tokens = k.shape[2] - q.shape[2]
    received = tokred.attn_received(q, k, causal=True, scale=scale)[0][:, :, :num_tokens]
    score = pool(received, kernel, pooling).unflatten(1, (k.shape[1], -1)).mean(2)
    kept_idx, _ = tokred.select_topk(score, keep, return_num_kept=True)
    keys, values = tokred.gather_tokens([k, v], kept_idx)
    return Reduced(keys, kept_idx=kept_idx, score=score, v=values)
