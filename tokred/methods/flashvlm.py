# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""FlashVLM's scoring: keep the visual tokens that [CLS] attends to and that are like the words of the prompt."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="flashvlm",
    paper="FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models",
    stage="projector",
    basis="authors' code",
    deviations=(
        "The score alone decides; the released code gives it half of the budget and fills the other half by VisPruner's "
        "removal of near duplicates.",
        "Similarities are float32, ties go to the lowest index.",
        "Images of different sizes and texts of different lengths; the released code takes one of each.",
    ),
    compat={"released": "every word counts the same: on LLaVA norms are taken of words that are unit vectors already"},
)


def min_max(score: Tensor, mask: Tensor) -> Tensor:
    """Return ``(s - min) / (max - min + 1e-6)`` of the marked tokens of each row, 0 elsewhere."""
    low = score.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = score.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return ((score - low) / (high - low + 1e-6)).masked_fill(~mask, 0)


def text_relevance(
    visual: Tensor, text: Tensor, *, mask: Tensor, text_mask: Tensor | None = None, compat: str | None = None
) -> Tensor:
    """Return how much each token stands out by its likeness to the words, in [0, 1], ``[batch_size, num_tokens]``.

    ``visual`` is ``[batch_size, num_tokens, dim]``, ``text`` ``[batch_size, num_text, dim]``; the masks mark what is no
    padding, ``mask`` tokens and ``text_mask`` words.
    """
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    words = normalize(text.float(), dim=-1)
    if compat is None:
        norm = text.float().norm(dim=-1, keepdim=True).masked_fill(~text_mask[..., None], 0)
        words = words * (norm / norm.amax(1, keepdim=True))
    similarity = normalize(visual.float(), dim=-1) @ words.mT
    share = (similarity / 0.05).masked_fill(~text_mask[:, None], -torch.inf).softmax(-1)
    relevance = (similarity.masked_fill(~text_mask[:, None], 0) * share).sum(-1)
    sharp = min_max((relevance / 0.01).masked_fill(~mask, -torch.inf).softmax(-1) ** 2.5, mask)
    bound = sharp.masked_fill(~mask, torch.nan).nanquantile(0.995, dim=1, keepdim=True)
    return min_max(torch.where(sharp < bound, 0.1 * sharp, sharp), mask)


def flashvlm(
    x: Tensor,
    attention: Tensor,
    visual: Tensor,
    text: Tensor,
    *,
    keep: int,
    eta: float = 0.5,
    text_mask: Tensor | None = None,
    compat: str | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep the ``keep`` tokens with the best geometric mean of [CLS] attention and likeness to the text.

    Args:
        x: Visual tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        attention: ``[batch_size, num_tokens]`` or ``[total_tokens]``: of [CLS], averaged over heads
            (``tokred.methods.fastervlm.cls_attention``), or what each token receives where there is none.
        visual: Projected tokens, ``[batch_size, num_tokens, d]`` or ``[total_tokens, d]``; often ``x`` itself.
        text: Embeddings of the prompt, ``[batch_size, num_text, d]``.
        keep: How many tokens to keep of each image.
        eta: The exponent of the text's part; the attention has ``1 - eta``.
        text_mask: Bool ``[batch_size, num_text]``: the words that are no padding.
        compat: None, or "released" (see ``METHOD``).
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` and ``kept_idx`` in original order, ``score`` (``[batch_size, num_tokens]``, packed padded to
        ``max_seqlen``) and, for packed input, ``num_kept``.

    Source: the authors' intrinsic and extrinsic scores and their fusion.
    """
    if compat not in (None, "released"):
        raise ValueError(f"flashvlm: expected compat to be None or 'released', got {compat!r}")
    if cu_seqlens is None:
        mask = torch.ones_like(attention, dtype=torch.bool)
    else:
        place = torch.arange(x.shape[0] if max_seqlen is None else max_seqlen, device=x.device)
        mask = place < cu_seqlens.diff()[:, None]
        lists = torch.where(mask, place, -1)
        visual = take_kept(visual, lists, cu_seqlens)
        attention = take_kept(attention[:, None], lists, cu_seqlens)[..., 0]
    own = min_max(attention.float(), mask)
    of_text = text_relevance(visual, text, mask=mask, text_mask=text_mask, compat=compat)
    score = min_max((own.clamp(min=1e-6).log() * (1 - eta) + of_text.clamp(min=1e-6).log() * eta).exp(), mask)
    if cu_seqlens is None:
        x_kept, kept_idx = tokred.prune_topk(x, score, keep)
        return Reduced(x_kept, kept_idx=kept_idx, score=score)
    kept_idx, num_kept = tokred.select_topk(score, keep, drop_mask=~mask, return_num_kept=True)
    return Reduced(take_kept(x, kept_idx, cu_seqlens), kept_idx=kept_idx, score=score, num_kept=num_kept)
