# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""SparseVLM: inside the language model, keep the visual tokens that the words about the image attend to."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, prune_span

METHOD = Method(
    name="sparsevlm",
    paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "The ranking alone: tokens that are dropped are not clustered and recycled (versions 1.x), and the count is given "
        "(1.0 takes it from the rank of a matrix).",
        "SparseVLM+ without its gravity correction, which divides probabilities by those of the rotation alone.",
        "Similarities and scores are float32; the released code computes both in the model's dtype.",
        "Without any rater all scores are 0; the released mean over none is NaN.",
        "Batches of prompts of different lengths; ties go to the lowest index.",
    ),
)


def raters(visual: Tensor, text: Tensor, *, text_mask: Tensor | None = None) -> Tensor:
    """Return which words the image is about, float32 ``[batch_size, num_text]`` of 0 and 1: more similar to it than the mean.

    Args:
        visual: Embeddings of the visual tokens that enter the model, ``[batch_size, num_visual, dim]``.
        text: Embeddings behind the image, ``[batch_size, num_text, dim]``.
        text_mask: Bool ``[batch_size, num_text]``: the tokens that are no padding.
    """
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    logits = (visual.float() @ text.float().mT).masked_fill(~text_mask[:, None], -torch.inf)
    share = logits.softmax(-1).mean(1).masked_fill(~text_mask, 0)
    return ((share > share.sum(1, keepdim=True) / text_mask.sum(1, keepdim=True)) & text_mask).float()


def text_attention(q: Tensor, k: Tensor, weight: Tensor, *, scale: float | None = None) -> Tensor:
    """Return the weighted mean of the causal attention from the last tokens, ``[batch_size, num_q_heads, num_tokens]``.

    ``q`` are their queries, ``[batch_size, num_q_heads, num_text, head_dim]``, ``weight`` is ``[batch_size, num_text]``, 0 for
    padding, and ``k`` are the keys of all tokens.
    """
    shares = (weight / weight.sum(1, keepdim=True).clamp(min=1e-12)).float()
    received: Tensor = tokred.attn_received(
        q, k, causal=True, q_weight=shares[:, None].expand(-1, q.shape[1], -1), scale=scale
    )[0]
    return received


def sparsevlm(
    x: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    keep: int,
    first: int,
    last: int,
    heads: int | None = None,
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> Reduced:
    """Keep the ``keep`` visual tokens with the highest attention from the raters, and all tokens around them.

    Args:
        x: Output of the scoring layer, ``[batch_size, num_tokens, dim]``.
        q: Queries of the tokens behind the image, rotated, ``[batch_size, num_q_heads, num_tokens - last, head_dim]``.
        k: Keys of that layer, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        weight: ``[batch_size, num_tokens - last]``: which of them count, see ``raters``.
        keep: How many visual tokens to keep; for 192 on average 300, 200 and 110 behind layers 2, 6 and 15.
        first: Where the visual tokens start.
        last: Where they end.
        heads: Average over so many heads alone, those with the most attention to the image (SparseVLM+: 14).
        score: Instead of ``q``, ``k`` and ``weight``, ``[batch_size, num_tokens]``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``Reduced`` with ``x``, ``kept_idx``, ``score`` and, with ``kv_lens``, ``num_kept``. Versions 1.x renumber positions,
        SparseVLM+ keeps them.

    Source: the authors' raters and their attention; version 2's choice of heads.
    """
    if score is None:
        if q is None or k is None or weight is None:
            raise ValueError("sparsevlm: expected q, k and weight, or score")
        received = text_attention(q, k, weight, scale=scale)
        if heads is not None:
            mass = received[:, :, first:last].sum(-1)
            best, _ = tokred.select_topk(mass, heads, return_num_kept=True)
            received = tokred.gather_tokens([received], best)[0]
        score = received.mean(1)
    return prune_span(x, score, keep, first, last, kv_lens)
