# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""DUET-VLM, first stage: keep what [CLS] attends to, merge the next tokens in clusters of a limited width, drop the rest."""

from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, kept_mask
from tokred.methods.visionzip import merge_rest

METHOD = Method(
    name="duetvlm",
    paper="DUET-VLM: Dual stage Unified Efficient Token reduction for VLM Training and Inference",
    stage="encoder, projector, training",
    basis="authors' code",
    deviations=(
        "The vision-to-vision stage; the text-to-vision one ranks as `tokred.methods.sparsevlm` does, with weight 1 for each "
        "salient word (the released code finds them by a tagger of parts of speech) or for all of the text.",
        "A contextual token is the mean of its group.",
        "The order of the LLaVA code, contextual tokens last; the Qwen2.5-VL code leaves them at their anchors.",
        "Scores and cosines are float32, ties go to the lowest index; images of different sizes.",
    ),
    compat={"released": "a contextual token is its anchor plus the mean of those merged into it"},
)


def duetvlm(
    x: Tensor,
    score: Tensor,
    metric: Tensor,
    *,
    dominant: int = 170,
    contextual: int = 35,
    width: int = 4,
    num_protected: int = 1,
    compat: str | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep ``dominant`` tokens by [CLS] attention, merge the next ``width * contextual`` into ``contextual``, drop the rest.

    Args:
        x: Output of the encoder's last layer but one with [CLS] first, ``[batch_size, num_tokens, dim]``, or packed
            ``[total_tokens, dim]``.
        score: The attention of [CLS] there (or what each token receives), ``[batch_size, num_tokens]`` or
            ``[total_tokens]``; those of protected tokens do not matter.
        metric: What cosines are of, ``[batch_size, num_tokens, d]`` or ``[total_tokens, d]``: that layer's keys, averaged over
            heads.
        dominant: How many tokens are kept, [CLS] among them.
        contextual: How many the next ones are merged into, at least 1.
        width: How many tokens a cluster has on average.
        num_protected: The first tokens, which are always kept: 1 for [CLS], 0 for encoders without one.
        compat: None, or "released" (see ``METHOD``).
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` as ``tokred.methods.visionzip`` returns it, merged tokens by falling score of their anchors; ``dst_idx`` is
        -1 for what is dropped. Differentiable in ``x``.

    Source: the authors' vision-to-vision stage: anchors are every ``width``-th of the next tokens by falling score.
    """
    if compat not in (None, "released"):
        raise ValueError(f"duetvlm: expected compat to be None or 'released', got {compat!r}")
    longest = x.shape[1] if cu_seqlens is None else x.shape[0] if max_seqlen is None else max_seqlen
    if contextual < 1 or (cu_seqlens is None and dominant + contextual > longest):
        raise ValueError(f"duetvlm: expected contextual in [1, num_tokens - dominant], got {contextual}")
    kept_idx, counts = tokred.select_topk(
        score, dominant, keep_first=num_protected, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, return_num_kept=True
    )
    pool = min(width * contextual, longest - (dominant if cu_seqlens is None else 0))
    next_idx, _ = tokred.select_topk(
        score, pool, drop_mask=kept_mask(kept_idx, x.shape[-2], cu_seqlens), order="score", cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, return_num_kept=True,
    )  # fmt: skip
    out, all_idx, dst_idx, size = merge_rest(
        x, metric, kept_idx, next_idx, contextual, cu_seqlens=cu_seqlens, plus_mean=compat == "released"
    )
    num_kept = None if cu_seqlens is None else counts + (all_idx[:, dominant:] >= 0).sum(1, dtype=counts.dtype)
    return Reduced(out, kept_idx=all_idx, dst_idx=dst_idx, size=size, score=score, num_kept=num_kept)
