# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""ToDRE, first stage: keep the visual tokens that together are the least alike, from the one [CLS] attends to most."""

from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="todre",
    paper="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
    stage="encoder, projector",
    basis="paper",
    deviations=(
        "The first stage alone: the second one removes all visual tokens at once in a late layer of the language model.",
        "Version 2's max-sum dispersion is the default; version 1's greedy k-centre is a switch.",
        "The pivot comes from scores that are given; the paper draws it at random for encoders without [CLS].",
        "Ties go to the lowest index.",
    ),
    compat={"v1": "greedy k-centre (max-min) from the same pivot, as version 1 of the paper describes"},
)


def todre(
    x: Tensor,
    score: Tensor,
    *,
    keep: int,
    compat: str | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep ``keep`` tokens: first the highest-scored, then again and again the one least similar to all kept so far.

    Args:
        x: Visual tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        score: Where the pivot comes from, ``[batch_size, num_tokens]`` or ``[total_tokens]``: [CLS] attention of the
            encoder's last layer (``tokred.methods.fastervlm.cls_attention``), for AnyRes that of the thumbnail, for video the
            maximum over frames.
        keep: How many tokens to keep; the paper keeps 288 (10%) or 720 (25%) of 2880.
        compat: None, or "v1" (see ``METHOD``), which takes dense input.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` and ``kept_idx`` in original order, ``score`` and, for packed input, ``num_kept``.

    Source: version 2 of the paper, its section on visual token selection: the sum of cosines to the kept tokens, least first.
    """
    if compat not in (None, "v1"):
        raise ValueError(f"todre: expected compat to be None or 'v1', got {compat!r}")
    if compat == "v1":
        if cu_seqlens is not None:
            raise ValueError("todre: expected dense input with compat='v1', got cu_seqlens")
        kept_idx = tokred.select_diverse(x, keep, start=score.argmax(1))
        return Reduced(take_kept(x, kept_idx), kept_idx=kept_idx, score=score)
    kept_idx, num_kept = tokred.select_diverse(
        x, keep, rule="max_sum", weight=score, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, return_num_kept=True
    )
    counts = None if cu_seqlens is None else num_kept
    return Reduced(take_kept(x, kept_idx, cu_seqlens), kept_idx=kept_idx, score=score, num_kept=counts)
