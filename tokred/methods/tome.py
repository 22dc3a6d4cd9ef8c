# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""ToMe: merge the most similar tokens of each layer, by bipartite soft matching of their keys."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="tome",
    paper="Token Merging: Your ViT But Faster",
    stage="encoder",
    basis="authors' code",
    deviations=(
        "Tokens stay in their original order; the released code puts unmerged tokens before destinations.",
        "A zero key has similarity 0 (unit vectors are v / max(|v|, 1e-12)); the released code divides by 0.",
        "Ties go to the lowest index.",
        "The metric and the sizes are float32 whatever the model's dtype.",
    ),
    compat={
        "released": "the released order of tokens: unmerged (by similarity without a class token), then destinations"
    },
)


def schedule(r: int, num_layers: int, inflect: float = 0.0) -> list[int]:
    """Return how many tokens each layer merges: ``r`` on average, from r (1 - inflect) to r (1 + inflect).

    ``inflect`` 0 is constant, -1 merges early, 1 merges late. Values are truncated, as in the released code.
    """
    low = int(r * (1.0 - inflect))
    step = (2 * r - 2 * low) / (num_layers - 1) if num_layers > 1 else 0.0
    return [int(low + step * i) for i in range(num_layers)]


def tome(
    x: Tensor, k: Tensor, *, r: int, size: Tensor | None = None, num_protected: int = 1, compat: str | None = None
) -> Reduced:
    """Merge up to ``r`` tokens into similar ones, between a block's attention and its MLP.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``.
        k: The block's keys, ``[batch_size, num_heads, num_tokens, head_dim]``; their mean over heads is the metric. Or a
            metric of your own, ``[batch_size, num_tokens, dim]``.
        r: How many tokens to merge; as in the paper at most half of the unprotected ones are (``(num_tokens -
            num_protected) // 2``).
        size: How many originals each token stands for, ``[batch_size, num_tokens]`` float32; None: one each.
        num_protected: The first tokens, which never merge: 1 for a class token, 2 with a distillation token.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x`` (the size-weighted means), ``dst_idx`` and ``size``. Keep ``size`` for the next block: its
        attention adds ``size.log()`` to the logits of each key ("proportional attention", paper section 3).

    ``tokred.segment_expand(y, dst_idx)`` unmerges; maps of several layers compose as ``second.gather(1, first)``.
    Differentiable in ``x``. Source: paper sections 3.1 to 3.3.
    """
    if compat not in (None, "released"):
        raise ValueError(f"tome: expected compat to be None or 'released', got {compat!r}")
    num_tokens = x.shape[1]
    r = max(0, min(r, (num_tokens - num_protected) // 2))
    metric = k if k.dim() == 3 else k.mean(dim=1, dtype=torch.float32)
    order = "index" if compat is None else "grouped" if num_protected else "score"
    dst_idx: Tensor = tokred.bipartite_match(metric, r, num_protected=num_protected, order=order)
    if compat == "released" and num_protected == 2:
        # The distillation token, first of the destinations, goes to row 1; unmerged tokens after the class token move up.
        unmerged = (num_tokens + 1) // 2 - r
        moved = torch.where((dst_idx > 0) & (dst_idx < unmerged), dst_idx + 1, dst_idx)
        dst_idx = torch.where(dst_idx == unmerged, 1, moved)
    merged, merged_size = tokred.segment_merge(x, dst_idx, num_tokens - r, size=size)
    return Reduced(merged, dst_idx=dst_idx, size=merged_size)
