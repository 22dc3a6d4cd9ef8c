# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""SnapKV: keep the keys and values of a prompt that its last queries attend to, and those queries' own."""

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="snapkv",
    paper="SnapKV: LLM Knows What You are Looking for Before Generation",
    stage="prefill, KV",
    basis="authors' code",
    deviations=(
        "One list per kv head, from the mean of its query heads' pooled scores, as kvpress does.",
        "Kept tokens stay in their original order; the released code leaves them in that of torch.topk.",
        "Scores are float32; the released code rounds the probabilities to the model's dtype before it adds them.",
        "Ties, which max pooling makes at nearly every cut, go to the lowest index.",
    ),
    compat={"released": "a list per query head; keys and values are repeated for it"},
)


def observe(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Return the attention of the window's queries to each key, summed, ``[batch_size, num_q_heads, num_tokens]``.

    ``q`` are the queries of the last tokens, ``[batch_size, num_q_heads, window, head_dim]``, ``k`` all keys.
    """
    received: Tensor = tokred.attn_received(q, k, causal=True, scale=scale)[0]
    return received


def parts(score: Tensor, window: int, kv_lens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where ``score`` has the window's tokens and where it has none of the sequence, bool of its shape."""
    place = torch.arange(score.shape[-1], device=score.device)
    end = score.shape[-1] if kv_lens is None else kv_lens[:, None, None]
    outside = (place >= end).expand_as(score)
    return ((place >= end - window) & ~outside).expand_as(score), outside


def pool(score: Tensor, kernel: int, mode: str) -> Tensor:
    """Return ``score``, no less than 0, pooled along tokens; zeros beyond the ends count in the mean."""
    if mode not in ("avg", "max"):
        raise ValueError(f"snapkv: expected pooling 'avg' or 'max', got {mode!r}")
    pooling = functional.avg_pool1d if mode == "avg" else functional.max_pool1d
    return pooling(score, kernel, stride=1, padding=kernel // 2)


def snapkv(
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
    *,
    keep: int,
    window: int = 64,
    kernel: int = 5,
    pooling: str = "avg",
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    compat: str | None = None,
) -> Reduced:
    """Keep ``keep`` tokens per head: the window, and the best by pooled attention from it.

    Args:
        k: Keys of the prompt, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        v: Values, likewise.
        q: Queries of the last ``window`` tokens, rotated, ``[batch_size, num_q_heads, window, head_dim]``.
        keep: Tokens per head, the window's among them (the released ``max_capacity_prompt``).
        window: The observation window, always kept.
        kernel: Of the pooling along tokens, odd.
        pooling: "avg" or "max".
        score: Instead of ``q``: attention received per query head, ``[batch_size, num_q_heads, num_tokens]``, see
            ``observe``. Needed with ``kv_lens``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x`` (keys) and ``v``, ``[batch_size, heads, keep, head_dim]``, rows of zeros past a short prompt's
        end; ``kept_idx``, positions that the keys were rotated with; ``score``, the pooled ones; ``num_kept`` per head. The
        next token's position is the length of the prompt, not of the cache.

    Source: the paper's section 4; the authors' code for sums before pooling and for the window outside of it.
    """
    if score is None:
        if q is None or kv_lens is not None:
            raise ValueError("snapkv: expected q, or score where prompts have kv_lens")
        score = observe(q, k, scale=scale)
    if compat not in (None, "released"):
        raise ValueError(f"snapkv: expected compat to be None or 'released', got {compat!r}")
    if not 0 < window <= keep:
        raise ValueError(f"snapkv: expected window in [1, keep = {keep}], got {window}")
    of_window, outside = parts(score, window, kv_lens)
    score = pool(score.masked_fill(of_window | outside, 0), kernel, pooling)
    groups = score.shape[1] // k.shape[1]
    if compat == "released":
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    else:
        score = score.unflatten(1, (-1, groups)).mean(2)
        of_window, outside = of_window[:, ::groups], outside[:, ::groups]
    kept_idx, num_kept = tokred.select_topk(
        score, min(keep, score.shape[-1]), keep_mask=of_window, drop_mask=outside, return_num_kept=True
    )
    keys, values = tokred.gather_tokens([k, v], kept_idx)
    return Reduced(keys, kept_idx=kept_idx, score=score, num_kept=num_kept, v=values)
