# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""FastV: behind an early layer of the language model, keep the visual tokens that the prompt's last token attends to."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, prune_span

METHOD = Method(
    name="fastv",
    paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "The queries are those that are given: the last token's, as in the released code, or all, as the paper's text says.",
        "Batches of prompts of different lengths; the released code takes one prompt.",
        "Scores are float32; the released code averages probabilities in the model's dtype.",
        "Ties go to the lowest index.",
    ),
)


def prompt_attention(q: Tensor, k: Tensor, *, kv_lens: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return the causal attention that tokens receive, ``[batch_size, num_tokens]``, averaged over heads and queries.

    Args:
        q: Of each prompt's last token, ``[batch_size, num_q_heads, 1, head_dim]``, or of all, ``num_tokens`` for 1.
        k: Keys of that layer, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end, with finite values.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
    """
    num_q, num_tokens = q.shape[2], k.shape[2]
    if num_q not in (1, num_tokens):
        raise ValueError(f"fastv: expected q of one token or of all {num_tokens}, got {num_q}")
    if kv_lens is None:
        return tokred.attn_received(q, k, causal=True, scale=scale)[0].mean(1) / num_q
    exists = torch.arange(num_tokens, device=k.device) < kv_lens[:, None]
    if num_q == 1:
        padding = torch.zeros(exists.shape, device=k.device).masked_fill(~exists, -torch.inf)
        return tokred.attn_received(q, k, key_bias=padding[:, None], scale=scale)[0].mean(1)
    weight = (exists / kv_lens[:, None].clamp(min=1)).float()[:, None].expand(-1, q.shape[1], -1)
    return tokred.attn_received(q, k, causal=True, q_weight=weight, scale=scale)[0].mean(1)


def fastv(
    x: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    keep: int,
    first: int,
    last: int,
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> Reduced:
    """Keep the ``keep`` visual tokens with the highest attention, and all tokens before and behind them.

    Args:
        x: Hidden states on entry to the layer from which on tokens are left out (layer 2 in the paper, 3 in the demo),
            ``[batch_size, num_tokens, dim]``.
        q: Queries of the layer before, rotated: those of each prompt's last token, ``[batch_size, num_q_heads, 1,
            head_dim]``, or of all tokens.
        k: Keys of that layer, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        keep: How many visual tokens to keep; the released code has ``round(num_visual * (1 - ratio))``, ratio 0.5 or 0.75.
        first: Where the visual tokens start, 35 in LLaVA-1.5.
        last: Where they end, 611 there.
        score: Instead of ``q`` and ``k``, ``[batch_size, num_tokens]``, see ``prompt_attention``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``Reduced`` with ``x``, ``kept_idx``, which are the position ids of what is kept, too (FastV does not renumber),
        ``score`` and, with ``kv_lens``, ``num_kept``.

    Source: the authors' re-ranking of visual tokens by the mean over heads of the last token's attention.
    """
    if score is None:
        if q is None or k is None:
            raise ValueError("fastv: expected q and k of the scoring layer, or score")
        score = prompt_attention(q, k, kv_lens=kv_lens, scale=scale)
    return prune_span(x, score, keep, first, last, kv_lens)
