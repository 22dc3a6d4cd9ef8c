# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""straight_through: a hard choice with the gradient of a soft one."""

import torch
from torch import Tensor

import tokred


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """Return factors that are the hard choice, exactly 0 or 1, and have the gradient of the soft weights behind it.

    Multiply kept tokens by them to train the scorer that chose: ``x_kept * straight_through(soft, kept_idx)[..., None]``.

    Args:
        soft: Weights, ``[batch_size, num_tokens]`` or ``[batch_size, num_heads, num_tokens]``, finite, float32, float16 or
            bfloat16: ``(score / tau).softmax(-1)`` in EchoingPixels.
        hard: What was chosen. A bool mask of the shape of ``soft``: the factors have that shape. Or lists, int64 or int32,
            ``[batch_size, k]`` or ``[batch_size, num_heads, k]``: the factors stand beside the kept tokens, 0 in empty
            slots.

    Returns:
        ``[..., num_tokens]`` or ``[..., k]``, the dtype of ``soft``.

    A composite, without a sync. Deterministic; shapes depend on shapes alone. Differentiable in ``soft``: the gradient of each
    factor is that of its weight. With a mask, tokens that were not chosen pass a gradient, too; with lists they do not,
    except through a softmax.

    Source: EchoingPixels (lists), DUET-VLM (mask).

    Example:
        >>> score = torch.tensor([[0.5, 2.0, 1.0]], requires_grad=True)
        >>> kept_idx = tokred.select_topk(score, 2)
        >>> factor = tokred.straight_through(score.softmax(-1), kept_idx)
        >>> factor.tolist(), bool(torch.autograd.grad(factor.sum(), score)[0].abs().sum() > 0)
        ([[1.0, 1.0]], True)
    """
    if hard.dtype == torch.bool:
        if hard.shape != soft.shape:
            raise RuntimeError(
                f"straight_through: expected a mask of the shape of soft, {list(soft.shape)}, got {list(hard.shape)}"
            )
        return hard.to(soft.dtype) + (soft - soft.detach())  # the bracket is 0, and comes first
    if hard.shape[:-1] != soft.shape[:-1]:
        raise RuntimeError(
            f"straight_through: expected lists with the leading sizes of soft, {list(soft.shape[:-1])}, got "
            f"{list(hard.shape)}"
        )
    kept = tokred.gather_tokens([soft], hard, dims=soft.dim() - 1)[0]
    chosen = (hard >= 0) & (hard < soft.shape[-1])
    return chosen.to(soft.dtype) + (kept - kept.detach())
