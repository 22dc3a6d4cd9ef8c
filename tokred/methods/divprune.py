# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""DivPrune: keep the visual tokens that are farthest from each other."""

from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="divprune",
    paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    stage="projector",
    basis="authors' code",
    deviations=(
        "A picked token cannot be picked again; the released loop may repeat one once all distances left are about 0.",
        "Similarities are float32; the released code keeps them in the model's dtype, where they tie and round below 0.",
        "Ties go to the lowest index. A zero vector has cosine 0; the released code divides by 0.",
        "Each image is selected by its own tokens; the released code applies the picks of the first to the whole batch.",
    ),
)


def divprune(
    x: Tensor,
    *,
    keep: int | None = None,
    ratio: float = 0.098,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep tokens by max-min diversity: each pick is the token whose nearest pick is farthest by cosine distance.

    Args:
        x: Projected visual tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        keep: How many tokens to keep of each image; shorter packed ones are kept whole. Packed input needs it.
        ratio: Share to keep where ``keep`` is not given: ``round(ratio * num_tokens)``, 56 of 576 by the paper's default.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` and ``kept_idx`` in original order and, for packed input, ``num_kept``. The released LLaVA code
        renumbers positions after pruning; its Qwen ports keep the original ones, ``kept_idx``.

    Source: the paper's max-min formulation; the authors' code for the first pick, the token whose nearest other token is
    farthest.
    """
    if keep is None:
        if cu_seqlens is not None:
            raise ValueError("divprune: expected keep for packed input, whose images differ in length")
        keep = round(ratio * x.shape[1])
    if cu_seqlens is None:
        kept_idx = tokred.select_diverse(x, keep)
        return Reduced(take_kept(x, kept_idx), kept_idx=kept_idx)
    kept_idx, num_kept = tokred.select_diverse(x, keep, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return Reduced(take_kept(x, kept_idx, cu_seqlens), kept_idx=kept_idx, num_kept=num_kept)
