# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Ada-KV: the heads of a layer share one budget of keys and values, so that each keeps what its attention needs."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced
from tokred.methods.snapkv import observe, parts, pool

METHOD = Method(
    name="adakv",
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    stage="prefill, KV",
    basis="authors' code",
    deviations=(
        "One list per kv head, as with the released GQA switch on (its default is off, which repeats K and V).",
        "Lists are padded to one length instead of being stored one after the other.",
        "The released option that scales a head's scores by its concentration is left out; its helper has it off.",
        "Kept tokens stay in their original order, and ties go to the lower head, then to the lower index.",
        "A budget is shared by the heads of each sequence; the released code takes one sequence.",
    ),
    compat={"kvpress": "AdaKVPress's rule: safe tokens first, then an exact total, the window part of the budget"},
)


def adakv(
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
    *,
    keep: int,
    alpha: float = 0.2,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    compat: str | None = None,
) -> Reduced:
    """Keep ``keep`` tokens per head on average: the window, and what the heads win of a common budget.

    Args:
        k: Keys of the prompt, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        v: Values, likewise.
        q: Queries of the last ``window`` tokens, rotated, ``[batch_size, num_q_heads, window, head_dim]``.
        keep: Tokens per head on average, the window's among them.
        alpha: The share of its budget that a head cannot lose.
        window: The observation window, always kept.
        kernel: Of the pooling along tokens, odd.
        pooling: "max" or "avg".
        score: Instead of ``q``: attention received per query head, ``[batch_size, num_q_heads, num_tokens]``. Needed with
            ``kv_lens``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
        compat: None, or "kvpress" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x`` (keys) and ``v``, ``[batch_size, num_kv_heads, longest, head_dim]``, rows of zeros past a
        head's count; ``kept_idx``, positions that the keys were rotated with; ``score``, the pooled ones; ``num_kept`` per
        head. ``longest`` is what one head could win at most: slice to ``num_kept.max()`` where a wait does not matter.

    Source: the paper's algorithm 1; the authors' code for the mean over a group before pooling and for the rounding.
    """
    if score is None:
        if q is None or kv_lens is not None:
            raise ValueError("adakv: expected q, or score where prompts have kv_lens")
        score = observe(q, k, scale=scale)
    if compat not in (None, "kvpress"):
        raise ValueError(f"adakv: expected compat to be None or 'kvpress', got {compat!r}")
    if not 0 < window <= keep:
        raise ValueError(f"adakv: expected window in [1, keep = {keep}], got {window}")
    num_heads, num_tokens = k.shape[1], score.shape[-1]
    score = score.unflatten(1, (num_heads, -1)).mean(2)
    of_window, outside = parts(score, window, kv_lens)
    score = pool(score.masked_fill(of_window | outside, 0), kernel, pooling)
    if compat == "kvpress":
        kept_idx, num_kept = tokred.select_budget(
            score, min(keep, num_tokens), alpha=alpha, keep_mask=of_window, drop_mask=outside
        )
    else:
        budget = min(keep, num_tokens) - min(window, num_tokens)
        _, won = tokred.select_budget(score, budget, alpha=alpha, rule="rounded", drop_mask=of_window | outside)
        lens = (~outside).sum(-1)
        num_kept = torch.where(lens <= keep, lens, won + window)  # a short prompt is kept whole
        longest = min(num_tokens, num_heads * budget + window)
        kept_idx, num_kept = tokred.select_topk(score, num_kept, max_k=longest, keep_mask=of_window, drop_mask=outside)
    keys, values = tokred.gather_tokens([k, v], kept_idx)
    return Reduced(keys, kept_idx=kept_idx, score=score, num_kept=num_kept, v=values)
