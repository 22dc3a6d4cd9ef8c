# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""VisionZip: keep the tokens of the encoder that [CLS] attends to, and merge the others into a few by their keys."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="visionzip",
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    stage="encoder, projector",
    basis="authors' code",
    deviations=(
        "A contextual token is the mean of its group, as the paper describes.",
        "Images of different sizes; one with fewer tokens left than contextual ones asked for has fewer.",
        "Scores and cosines are float32, ties go to the lowest index; a zero key has cosine 0.",
    ),
    compat={
        "released": "a contextual token is its target plus the mean of those merged into it: about twice the scale"
    },
)


def merge_rest(
    x: Tensor,
    metric: Tensor,
    kept_idx: Tensor,
    rest_idx: Tensor,
    contextual: int,
    *,
    cu_seqlens: Tensor | None = None,
    plus_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kept tokens, and behind them the rest, each merged into the nearest of ``contextual`` evenly spaced ones.

    ``kept_idx`` and ``rest_idx`` as of ``tokred.select_topk(..., complement=True)``; cosines are those of ``metric``. The
    result is ``x``, ``kept_idx``, ``dst_idx`` and ``size`` of ``Reduced``.
    """
    (batch_size, num_rest), num_kept = rest_idx.shape, kept_idx.shape[1]
    num_out = num_kept + contextual
    rest_len = (rest_idx >= 0).sum(1, keepdim=True)
    step = (rest_len // contextual).clamp(min=1)
    target = torch.arange(contextual, device=x.device) * step  # places among the rest
    target_idx = torch.where(target < rest_len, rest_idx.gather(1, target.clamp(max=num_rest - 1)), -1)
    rest, targets = (take_kept(metric, idx, cu_seqlens) for idx in (rest_idx, target_idx))
    # By cosine; of equal ones the first is the nearest.
    nearest = tokred.pair_topk(rest, targets, 1, drop_mask=target_idx < 0)[1].squeeze(-1)
    place = torch.arange(num_rest, device=x.device)
    is_target = (place % step == 0) & (place < step * contextual)
    group = torch.where(is_target, place // step, nearest)
    weight = torch.ones(rest_idx.shape, device=x.device)
    if plus_mean:
        merged = (~is_target & (rest_idx >= 0)).float()
        count = weight.new_zeros((batch_size, contextual)).scatter_add(1, group.clamp(0, contextual - 1), merged)
        weight = torch.where(is_target, 1.0, 1 / count.gather(1, group.clamp(0, contextual - 1)))
    # One map for all: kept tokens have rows of their own.
    lists = torch.cat([kept_idx, rest_idx], 1)
    rows = torch.cat([torch.arange(num_kept, device=x.device).expand_as(kept_idx), num_kept + group], 1)
    weight = torch.cat([torch.ones_like(kept_idx, dtype=torch.float32), weight], 1)
    if cu_seqlens is not None:  # as one sequence
        lists = torch.where(lists < 0, lists, lists + cu_seqlens[:-1, None]).reshape(1, -1)
        rows = (rows + num_out * torch.arange(batch_size, device=x.device)[:, None]).reshape(1, -1)
        weight, x = weight.reshape(1, -1), x[None]
    nowhere = torch.full(x.shape[:2], -1, device=x.device)
    dst_idx, weight = tokred.scatter_tokens([rows, weight], lists, base=[nowhere, nowhere.float()])
    num_rows = batch_size * num_out // x.shape[0]
    if plus_mean:
        out, size = tokred.segment_merge(x, dst_idx, num_rows, weight=weight, mode="sum")
    else:
        out, size = tokred.segment_merge(x, dst_idx, num_rows)
    return (
        out.reshape(batch_size, num_out, -1),
        torch.cat([kept_idx, target_idx], 1),
        dst_idx if cu_seqlens is None else dst_idx[0],
        size.reshape(batch_size, num_out),
    )


def visionzip(
    x: Tensor,
    score: Tensor,
    metric: Tensor,
    *,
    dominant: int = 54,
    contextual: int = 10,
    num_protected: int = 1,
    compat: str | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep [CLS] and what it attends to most, ``dominant`` tokens in all, and merge the rest into ``contextual``.

    Args:
        x: Output of the encoder's last layer but one with [CLS] first, ``[batch_size, num_tokens, dim]``, or packed
            ``[total_tokens, dim]``.
        score: The attention of [CLS] there, ``[batch_size, num_tokens]`` or ``[total_tokens]``; those of protected tokens do
            not matter: ``pad(tokred.methods.fastervlm.cls_attention(q, k), (1, 0))``.
        metric: What cosines are of, ``[batch_size, num_tokens, d]`` or ``[total_tokens, d]``: that layer's keys, averaged over
            heads, ``k.mean(1)``.
        dominant: How many tokens are kept, [CLS] among them; the paper has 54 + 10, 108 + 20 and 162 + 30 of 577.
        contextual: How many tokens the others are merged into, at least 1.
        num_protected: The first tokens, which are always kept: 1 for [CLS], 0 for encoders without one.
        compat: None, or "released" (see ``METHOD``).
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` ``[batch_size, dominant + contextual, dim]``, kept tokens in their order, then merged ones;
        ``kept_idx`` (of a merged one its target), ``dst_idx`` (packed: rows of ``x.flatten(0, 1)``), ``size``, ``score`` and,
        for packed input, ``num_kept``. Differentiable in ``x``.

    Source: the authors' selection, their targets and assignment by the mean key.
    """
    if compat not in (None, "released"):
        raise ValueError(f"visionzip: expected compat to be None or 'released', got {compat!r}")
    if contextual < 1 or (cu_seqlens is None and dominant + contextual > x.shape[1]):
        raise ValueError(f"visionzip: expected contextual in [1, num_tokens - dominant], got {contextual}")
    lists = tokred.select_topk(
        score, dominant, keep_first=num_protected, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, complement=True
    )
    out, kept_idx, dst_idx, size = merge_rest(
        x, metric, lists[0], lists[-1], contextual, cu_seqlens=cu_seqlens, plus_mean=compat == "released"
    )
    num_kept = None if cu_seqlens is None else (kept_idx >= 0).sum(1, dtype=torch.int32)
    return Reduced(out, kept_idx=kept_idx, dst_idx=dst_idx, size=size, score=score, num_kept=num_kept)
