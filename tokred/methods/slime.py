# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""SliME's router: keep the local visual tokens that hold most of the similarity to the question."""

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="slime",
    paper="Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models",
    stage="projector",
    basis="authors' code",
    deviations=(
        "The similarity router alone; the learned one and the noise of training are left out.",
        "Similarities are float32, and masses are added exactly; the released sums in half precision can miss the share.",
        "Ties go to the lowest index.",
    ),
)


def slime(
    x: Tensor,
    text: Tensor,
    *,
    share: float = 0.95,
    temperature: float = 1.0,
    max_keep: int | None = None,
    text_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep the fewest tokens whose softmax over summed text similarities exceeds ``share``, in their original order.

    Args:
        x: Projected tokens of the local crops, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        text: Embeddings of the question, ``[batch_size, num_text, dim]``.
        share: Of the mass; the authors use 0.95 in fine-tuning.
        temperature: Of the softmax.
        max_keep: The length of the lists, by default all tokens.
        text_mask: Bool ``[batch_size, num_text]``: the tokens that are no padding.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` and ``kept_idx``, padded, ``score`` (the summed cosines) and ``num_kept``.

    Source: the paper's similarity-based router; the authors' code for the sum over text tokens and the shortest prefix.
    """
    unit = functional.normalize(text.float(), dim=-1)
    if text_mask is not None:
        unit = unit * text_mask[..., None]
    question = unit.sum(1)  # the sum of cosines is the product with the sum of unit vectors
    tokens = functional.normalize(x.float(), dim=-1)
    if cu_seqlens is None:
        score = (tokens @ question[..., None])[..., 0]
    else:
        sequence = torch.bucketize(torch.arange(len(x), device=x.device), cu_seqlens[1:], right=True)
        score = (tokens * question[sequence]).sum(-1)
    kept_idx, num_kept = tokred.select_rule(
        score, "top_p", share, temperature=temperature, max_k=max_keep, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
    )
    return Reduced(take_kept(x, kept_idx, cu_seqlens), kept_idx=kept_idx, score=score, num_kept=num_kept)
