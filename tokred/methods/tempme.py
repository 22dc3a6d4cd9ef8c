# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""TempMe: merge similar tokens inside each frame, then across neighbouring clips of a video."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="tempme",
    paper="TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval",
    stage="encoder",
    basis="authors' code",
    deviations=(
        "Tokens stay in their original order; the released code puts unmerged tokens before destinations.",
        "A zero metric has similarity 0 (unit vectors are v / max(|v|, 1e-12)); the released code divides by 0.",
        "Ties go to the lowest index.",
        "The metric and the sizes are float32 whatever the model's dtype.",
    ),
    compat={"released": "the released order of tokens: class tokens, unmerged tokens, then destinations"},
)


def join_clips(x: Tensor, group: int, num_cls: int = 1) -> Tensor:
    """Return clips joined by ``group`` neighbours: all their class tokens first, then all other tokens.

    ``x`` is ``[batch_size * num_clips, num_tokens, ...]`` with each clip's ``num_cls`` class tokens first (sizes, too:
    ``[..., num_tokens]``); the result has ``1 / group`` of the rows and ``group * num_cls`` class tokens.
    """
    clips = x.unflatten(0, (-1, group))
    return torch.cat([clips[:, :, :num_cls].flatten(1, 2), clips[:, :, num_cls:].flatten(1, 2)], dim=1)


def tempme(
    x: Tensor,
    metric: Tensor,
    *,
    r: int | None = None,
    ratio: float | None = None,
    size: Tensor | None = None,
    num_cls: int = 1,
    compat: str | None = None,
) -> Reduced:
    """Merge tokens of a frame or of a joined clip once; a block after ``join_clips`` does so twice.

    Args:
        x: Tokens, ``[batch_size * num_clips, num_tokens, dim]``, the clip's class tokens first.
        metric: What tokens are compared by: inside a frame and after attention the keys, ``[rows, num_heads, num_tokens,
            head_dim]``, of which the mean over heads is taken; before the attention of a block that joins clips the hidden
            states, ``[rows, num_tokens, dim]``, without the clips' position vectors (which ``x`` has).
        r: How many tokens to merge, 2 per layer and frame in the paper; at most half of the others.
        ratio: Instead of ``r``: ``int(num_tokens * ratio)``; 0.3 before the attention of a joining block, 0.1 after it and
            in later ones.
        size: How many originals each token stands for, ``[rows, num_tokens]`` float32.
        num_cls: Class tokens, which never merge: one per clip that was joined.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x`` (the size-weighted means), ``dst_idx`` and ``size``, for the logarithms that the next
        attention adds to its logits.

    Even positions are sources whatever ``num_cls`` is. Differentiable in ``x``. Source: paper section 3; the authors' code
    for parity and rounding.
    """
    if compat not in (None, "released"):
        raise ValueError(f"tempme: expected compat to be None or 'released', got {compat!r}")
    if (r is None) == (ratio is None):
        raise ValueError("tempme: expected either r or ratio")
    num_tokens = x.shape[1]
    wanted = int(num_tokens * ratio) if ratio is not None else r or 0
    count = max(0, min(wanted, (num_tokens - num_cls) // 2))
    keys = metric if metric.dim() == 3 else metric.mean(dim=1, dtype=torch.float32)
    order = "index" if compat is None else "grouped"
    dst_idx: Tensor = tokred.bipartite_match(keys, count, num_protected=num_cls, order=order)
    if compat == "released" and num_cls > 1:
        # Class tokens at odd positions stand among the destinations: they go to the front, in their order.
        first_odd = (num_tokens + 1) // 2 - count
        place = torch.arange(num_tokens - count, device=x.device)
        even = (place * 2 < num_cls) & (place < first_odd)
        odd = (place >= first_odd) & ((place - first_odd) * 2 + 1 < num_cls)
        front = torch.where(even, 2 * place, 2 * (place - first_odd) + 1)
        behind = num_cls + (~(even | odd)).cumsum(0) - 1
        dst_idx = torch.where(even | odd, front, behind)[dst_idx]
    merged, merged_size = tokred.segment_merge(x, dst_idx, num_tokens - count, size=size)
    return Reduced(merged, dst_idx=dst_idx, size=merged_size)
