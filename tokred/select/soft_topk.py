# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""soft_topk: a top-k whose threshold is learned."""

import torch
from torch import Tensor

from tokred.select.select_topk import select_topk
from tokred.select.straight_through import straight_through


def soft_topk(
    score: Tensor, threshold: Tensor, *, sharpness: float | None = None, normalize: str = "rank"
) -> tuple[Tensor, Tensor]:
    """Keep tokens whose normalised importance exceeds a learned threshold: hard forward, the gradient of a sigmoid.

    Args:
        score: Importance, ``[batch_size, num_tokens]``, float32, float16 or bfloat16.
        threshold: ``a``, a scalar or ``[batch_size]`` or ``[batch_size, 1]``; with ranks in ``[0, 1]``: the share dropped.
        sharpness: ``lambda`` of the sigmoid, ``num_tokens`` by default: over ranks a few tokens are undecided.
        normalize: ``"rank"``: the worst token is ``1 / num_tokens``, the best 1, ties to the lowest index, NaN last; then
            ``ceil(num_tokens * (1 - a))`` tokens are kept, whatever the scores are, and the gradient reaches the threshold
            alone. ``"min_max"``: ``(s - min) / (max - min)``, 0 where all are equal. ``"none"``: as it is.

    Returns:
        ``(mask, soft)``, both ``[batch_size, num_tokens]`` float32: ``soft = sigmoid(lambda * (c - a))``, and ``mask``, which
        is exactly 1 where ``c > a`` and 0 elsewhere, with the gradient of ``soft``.

    A composite, without a sync; how many are kept depends on data, so pack or multiply by the mask. Deterministic; shapes
    depend on shapes alone. Differentiable in the threshold and, unless by rank, in the score.

    Source: HiDrop's differentiable top-k. Its description leaves the normalisation open; ranks are those of the
    differentiable top-k that uses the same mask, where ``lambda`` is the number of elements.

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> mask, soft = tokred.soft_topk(torch.tensor([[0.1, 3.0, 0.2, 5.0]]), a)
        >>> mask.tolist(), bool(torch.autograd.grad(mask.sum(), a)[0] < 0)
        ([[0.0, 1.0, 0.0, 1.0]], True)
    """
    if score.dim() != 2:
        raise RuntimeError(f"soft_topk: expected score of shape [batch_size, num_tokens], got {list(score.shape)}")
    num_tokens = score.shape[1]
    if normalize == "rank":
        order = select_topk(score.detach(), num_tokens, order="score")
        assert isinstance(order, Tensor)
        worst_first = torch.arange(num_tokens, 0, -1, device=score.device).float() / max(num_tokens, 1)
        value = torch.zeros_like(score, dtype=torch.float32).scatter(1, order, worst_first.expand(score.shape[0], -1))
    elif normalize == "min_max":
        value = score.float()
        if num_tokens > 0:
            low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
            value = (value - low) / torch.where(high > low, high - low, 1)
    elif normalize == "none":
        value = score.float()
    else:
        raise RuntimeError(f"soft_topk: expected normalize 'rank', 'min_max' or 'none', got {normalize!r}")
    limit = threshold.float()
    if limit.dim() == 1:
        limit = limit[:, None]
    soft = (float(num_tokens if sharpness is None else sharpness) * (value - limit)).sigmoid()
    return straight_through(soft, value > limit), soft
