# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""FasterVLM: keep the visual tokens that the [CLS] token of the encoder attends to."""

from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="fastervlm",
    paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
    stage="encoder, projector",
    basis="authors' code",
    deviations=(
        "Scores are float32; the released code takes softmax and head mean in the model's dtype, where scores tie more often.",
        "Ties go to the lowest index; the released code leaves them to torch.topk.",
    ),
)


def cls_attention(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Return the attention of the [CLS] query to each patch, averaged over heads.

    Args:
        q: The [CLS] query of the scoring layer, ``[batch_size, num_q_heads, 1, head_dim]``.
        k: The keys of that layer, [CLS] first, ``[batch_size, num_kv_heads, 1 + num_tokens, head_dim]``.
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``[batch_size, num_tokens]`` float32; [CLS] takes part in the softmax and is left out of the result.
    """
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"fastervlm: expected q of shape [batch_size, num_q_heads, 1, head_dim], got {list(q.shape)}")
    received, _ = tokred.attn_received(q, k, scale=scale)
    return received.mean(dim=1)[:, 1:]


def fastervlm(
    x: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    keep: int,
    score: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep the ``keep`` visual tokens with the highest [CLS] attention, in their original order.

    Args:
        x: Patch tokens without [CLS], ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``: the projector's
            input or output (pruning before the projector gives the same tokens for less work).
        q: [CLS] query of the scoring layer (the last but one of CLIP), see ``cls_attention``. Dense input only.
        k: Keys of that layer.
        keep: How many tokens to keep of each image or crop. The paper's README uses round(576 * (1 - R)).
        score: Scores instead of ``q`` and ``k``, ``[batch_size, num_tokens]`` or, packed, ``[total_tokens]``.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x``, ``kept_idx``, ``score`` and, for packed input, ``num_kept``.

    Source: the paper's section on [CLS] attentions; the authors' code for the layer and the order of tokens.
    """
    if score is None:
        if q is None or k is None:
            raise ValueError("fastervlm: expected q and k of the scoring layer, or score")
        score = cls_attention(q, k, scale=scale)
    if cu_seqlens is None:
        x_kept, kept_idx = tokred.prune_topk(x, score, keep)
        return Reduced(x_kept, kept_idx=kept_idx, score=score)
    x_kept, kept_idx, num_kept = tokred.prune_topk(x, score, keep, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return Reduced(x_kept, kept_idx=kept_idx, score=score, num_kept=num_kept)
