# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""IDPruner: keep visual tokens by maximal marginal relevance, importance against likeness to what is kept."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="idpruner",
    paper="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
    stage="projector",
    basis="authors' code",
    deviations=(
        "Importance is normalised in float32; the released code does so in the scorer's dtype.",
        "Unit vectors are v / max(|v|, 1e-12) instead of v / (|v| + 1e-8).",
        "Each image is selected by its own tokens; the released code reads the first image's for the whole batch.",
        "Ties go to the lowest index.",
    ),
)


def normalized(score: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return each sequence's scores as ``(s - min) / (max - min + 1e-6)``, float32."""
    score = score.float()
    if cu_seqlens is None:
        low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    else:
        sequence = torch.bucketize(torch.arange(len(score), device=score.device), cu_seqlens[1:], right=True)
        empty = score.new_zeros(cu_seqlens.shape[0] - 1)
        low, high = (
            empty.scatter_reduce(0, sequence, score, how, include_self=False)[sequence] for how in ("amin", "amax")
        )
    return (score - low) / (high - low + 1e-6)


def idpruner(
    x: Tensor,
    score: Tensor,
    *,
    keep: int,
    lam: float = 0.5,
    parallel: int = 1,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep ``keep`` tokens, each for ``lam`` times its importance minus ``1 - lam`` times its cosine to the nearest kept one.

    Args:
        x: Projected visual tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        score: Raw importance of any scorer (the paper uses VisionSelector's), ``[batch_size, num_tokens]`` or
            ``[total_tokens]``; made comparable with cosines by ``normalized``.
        keep: How many tokens to keep; the released code keeps ``max(round(num_tokens * (1 - ratio)), 1)``.
        lam: Share of the importance.
        parallel: How many tokens are taken from one ranking (the released ``parallel_k``).
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` and ``kept_idx`` in original order, ``score`` (the normalised importance) and, for packed input,
        ``num_kept``.

    Source: the paper's MMR formulation; the authors' code for the normalisation and the parallel picks.
    """
    importance = normalized(score, cu_seqlens)
    kept_idx, num_kept = tokred.select_diverse(
        x, keep, rule="mmr", weight=importance, lam=lam, picks_per_step=parallel, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, return_num_kept=True,
    )  # fmt: skip
    counts = None if cu_seqlens is None else num_kept
    return Reduced(take_kept(x, kept_idx, cu_seqlens), kept_idx=kept_idx, score=importance, num_kept=counts)
