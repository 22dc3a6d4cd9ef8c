# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""VTC-CLS: keep the visual tokens that the [CLS] tokens of several layers of the encoder attend to, taken together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokred.methods import Method, Reduced
from tokred.methods.fastervlm import cls_attention, fastervlm

METHOD = Method(
    name="vtccls",
    paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
    stage="encoder, projector",
    basis="authors' code",
    deviations=(
        "Batches, and images of different sizes; the released code takes one crop of 576 patches.",
        "Scores are float32; the released code sums them in the model's dtype.",
        "Ties go to the lowest index.",
    ),
)


def vtccls(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    keep: int,
    score: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep the ``keep`` visual tokens with the highest [CLS] attention summed over layers, in their original order.

    Args:
        x: Patch tokens without [CLS], ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        layers: Of each scoring layer the [CLS] query and all keys, as ``tokred.methods.fastervlm.cls_attention`` takes
            them. The released code starts at a layer of the caller's choice and leaves out the last one. Dense input only.
        keep: How many tokens to keep of each image.
        score: Sums over layers instead, ``[batch_size, num_tokens]`` or, packed, ``[total_tokens]``.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x``, ``kept_idx``, ``score`` and, for packed input, ``num_kept``.

    Source: the authors' sum over layers of the attention averaged over heads.
    """
    if score is None:
        if not layers:
            raise ValueError("vtccls: expected q and k of the scoring layers, or score")
        score = torch.stack([cls_attention(q, k, scale=scale) for q, k in layers]).sum(0)
    return fastervlm(x, keep=keep, score=score, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
