# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""VisionDrop: inside the language model, keep the visual tokens that visual tokens attend to, and merge the others."""

import torch
from torch import Tensor
from torch.nn.functional import pad

import tokred
from tokred.methods import Method, Reduced
from tokred.methods.visionzip import merge_rest

METHOD = Method(
    name="visiondrop",
    paper="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "The stages inside the language model; the one in the encoder is `tokred.methods.visionzip`.",
        "A contextual token is the mean of its group.",
        "Scores and cosines are float32; the released code casts probabilities to half before it averages them.",
        "Ties go to the lowest index; batches are of prompts with their images at the same place.",
    ),
    compat={"released": "a contextual token is its target plus the mean of those merged into it"},
)


def visual_attention(q: Tensor, k: Tensor, *, first: int, last: int, scale: float | None = None) -> Tensor:
    """Return the causal attention that visual tokens receive from each other, averaged, ``[batch_size, last - first]``.

    ``q`` and ``k`` are those of all tokens; every query's softmax is over all keys up to its own.
    """
    received = tokred.attn_received(q[:, :, first:last], k, causal=True, q_start=first, scale=scale)[0]
    return received.mean(1)[:, first:last] / (last - first)


def visiondrop(
    x: Tensor,
    score: Tensor,
    metric: Tensor,
    *,
    dominant: int,
    contextual: int,
    first: int,
    last: int,
    compat: str | None = None,
) -> Reduced:
    """Keep the ``dominant`` visual tokens with the most attention from visual ones, and merge the others into ``contextual``.

    Args:
        x: Output of the layer behind which tokens are dropped, ``[batch_size, num_tokens, dim]``. Prompts may be padded at
            their end; the padding stays there.
        score: Of the visual tokens, by the next layer's queries and keys, ``[batch_size, last - first]``: see
            ``visual_attention``.
        metric: What their cosines are of, ``[batch_size, last - first, d]``: that layer's keys, rotated, averaged over heads,
            ``k[:, :, first:last].mean(1)``.
        dominant: How many visual tokens are kept: 30, 22 and 16 behind layers 8, 16 and 24, for 32 on average.
        contextual: How many the others are merged into, at least 1: 5, 4 and 3.
        first: Where the visual tokens start.
        last: Where they end; behind a drop ``first + dominant + contextual``.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x`` (merged tokens behind the kept ones), ``kept_idx`` (of a merged one its target), ``dst_idx``,
        ``size`` and ``score``. The released code renumbers positions from 0. Differentiable in ``x``.

    Source: the authors' visual-to-visual attention and their merging.
    """
    if compat not in (None, "released"):
        raise ValueError(f"visiondrop: expected compat to be None or 'released', got {compat!r}")
    if not 1 <= contextual <= last - first - dominant:
        raise ValueError(f"visiondrop: expected contextual in [1, {last - first - dominant}], got {contextual}")
    lists = tokred.select_topk(score, dominant, complement=True)
    out, kept_idx, dst_idx, size = merge_rest(
        x[:, first:last], metric, lists[0], lists[1], contextual, plus_mean=compat == "released"
    )
    place, behind = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), x.shape[1] - last
    moved = place[:, last:] - (last - first) + dominant + contextual
    return Reduced(
        torch.cat([x[:, :first], out, x[:, last:]], 1),
        kept_idx=torch.cat([place[:, :first], first + kept_idx, place[:, last:]], 1),
        dst_idx=torch.cat([place[:, :first], first + dst_idx, moved], 1),
        size=pad(size, (first, behind), value=1.0),
        score=score,
    )
