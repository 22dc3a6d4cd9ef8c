# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""H2O: keep the keys and values that have received the most attention so far, and the recent ones."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced
from tokred.methods.snapkv import parts

METHOD = Method(
    name="h2o",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    stage="prefill, decode, KV",
    basis="authors' code",
    deviations=(
        "One list per kv head, from the mean of its query heads' scores.",
        "Scores are float32 and made without the matrix of all probabilities.",
        "Kept tokens stay in their original order; ties go to the lowest index.",
        "Batches of prompts of different lengths.",
    ),
    compat={
        "kvpress": "scores are divided by how many queries saw a key, as ObservedAttention does, not those of early keys more"
    },
)


def observe(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Return the causal attention that each key received from ``q``, summed, ``[batch_size, num_q_heads, num_tokens]``.

    ``q`` are all queries of a prompt, or those of the newest tokens. When decoding, add this to the scores that were kept,
    ``tokred.gather_tokens([score], kept_idx)[0]`` with a 0 for each new key.
    """
    received: Tensor = tokred.attn_received(q, k, causal=True, scale=scale)[0]
    return received


def h2o(
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
    *,
    heavy: int,
    recent: int,
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    compat: str | None = None,
) -> Reduced:
    """Keep the last ``recent`` tokens of each head, and the ``heavy`` others that have received the most attention.

    Args:
        k: Keys of the prompt or of the cache, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        v: Values, likewise.
        q: All queries of the prompt, rotated, ``[batch_size, num_q_heads, num_tokens, head_dim]``.
        heavy: How many heavy hitters to keep; the released code has a tenth of the prompt.
        recent: How many recent tokens to keep, as many there.
        score: Instead of ``q``: attention received so far, ``[batch_size, num_q_heads, num_tokens]`` (or per kv head), see
            ``observe``. Needed with ``kv_lens``.
        kv_lens: ``[batch_size]``, lengths of sequences that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
        compat: None, or "kvpress" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x`` (keys) and ``v``, ``[batch_size, num_kv_heads, heavy + recent, head_dim]``, rows of zeros past a
        short sequence's end; ``kept_idx``; ``score`` per kv head; ``num_kept`` per head. Positions are the original ones.

    Source: the paper's section on heavy hitters; the authors' code for sums over all queries and the recent part.
    """
    if score is None:
        if q is None or kv_lens is not None:
            raise ValueError("h2o: expected q, or score where sequences have kv_lens")
        score = observe(q, k, scale=scale)
    if compat not in (None, "kvpress"):
        raise ValueError(f"h2o: expected compat to be None or 'kvpress', got {compat!r}")
    num_tokens = k.shape[2]
    score = score.unflatten(1, (k.shape[1], -1)).mean(2)
    if compat == "kvpress":
        lens = num_tokens if kv_lens is None else kv_lens[:, None, None]
        score = score / (lens - torch.arange(num_tokens, device=k.device)).clamp(min=1)
    of_window, outside = parts(score, recent, kv_lens)
    kept_idx, num_kept = tokred.select_topk(
        score, min(heavy + recent, num_tokens), keep_mask=of_window, drop_mask=outside, return_num_kept=True
    )
    keys, values = tokred.gather_tokens([k, v], kept_idx)
    return Reduced(keys, kept_idx=kept_idx, score=score, num_kept=num_kept, v=values)
