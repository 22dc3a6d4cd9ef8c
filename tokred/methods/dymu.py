# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""DyMU's DToMe: merge tokens that are more alike than a calibrated threshold, as many as an image has."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="dymu",
    paper="DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs",
    stage="encoder",
    basis="authors' code",
    deviations=(
        "DToMe alone; virtual unmerging is the attention's.",
        "Tokens stay in their original order and padding comes last; the released orders differ for one image and several.",
        "Batches are padded to the input's length: nothing waits for the longest image.",
        "Means are exact; the released code divides by size + 1e-4 in a batch of several images.",
        "A zero key has similarity 0 (unit vectors are v / max(|v|, 1e-12)); the released code divides by 0.",
        "The metric and the sizes are float32 whatever the model's dtype. Ties go to the lowest index.",
    ),
    compat={"released": "the released order of tokens for one image (ToMe's), and of means for several"},
)


def calibrate(k: Tensor, r: int, *, num_protected: int = 1, seq_lens: Tensor | None = None) -> Tensor:
    """Return the threshold with which ``r`` tokens per image merge on average over this batch, a scalar, at least 0.

    The released calibration takes the running mean of it over batches of images, layer by layer.
    """
    metric = k if k.dim() == 3 else k.mean(dim=1, dtype=torch.float32)
    score: Tensor = tokred.bipartite_match(
        metric, 0, num_protected=num_protected, seq_lens=seq_lens, return_score=True
    )[2]
    pooled = score[:, ::2].flatten()
    return pooled.topk(min(r * k.shape[0] + 1, pooled.shape[0])).values[-1].clamp(min=0)


def dymu(
    x: Tensor,
    k: Tensor,
    *,
    threshold: float | Tensor = 1.0,
    max_r: int | None = None,
    size: Tensor | None = None,
    seq_lens: Tensor | None = None,
    num_protected: int = 1,
    compat: str | None = None,
) -> Reduced:
    """Merge all even tokens whose best similarity exceeds ``threshold``, between a block's attention and its MLP.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``.
        k: The block's keys, ``[batch_size, num_heads, num_tokens, head_dim]``; their mean over heads is the metric. Or a
            metric of your own, ``[batch_size, num_tokens, dim]``.
        threshold: Of the layer, see ``calibrate``; 1 merges nothing. A tensor is not read back.
        max_r: At most so many merge per image; at most half of the unprotected tokens do in any case.
        size: How many originals each token stands for, ``[batch_size, num_tokens]`` float32; None: one each.
        seq_lens: ``[batch_size]`` int32, the tokens of each image; the rest is padding: ``num_kept`` of the layer before.
        num_protected: The first tokens, which never merge.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` with ``x``, as long as the input, zeros past ``num_kept``; ``dst_idx``, -1 for padding; ``size``, 0 there,
        so that ``size.log()`` masks padding in the next attention; and ``num_kept``, int32.

    Maps of several layers compose as ``second.gather(1, first)``. Differentiable in ``x``. Source: paper section 3.1.
    """
    if compat not in (None, "released"):
        raise ValueError(f"dymu: expected compat to be None or 'released', got {compat!r}")
    num_tokens = x.shape[1]
    metric = k if k.dim() == 3 else k.mean(dim=1, dtype=torch.float32)
    most = max(0, (num_tokens - num_protected) // 2)
    order = "index" if compat is None else "grouped" if num_protected else "score"
    dst_idx, num_kept = tokred.bipartite_match(
        metric,
        most if max_r is None else min(max_r, most),
        num_protected=num_protected,
        threshold=threshold,
        seq_lens=seq_lens,
        order=order,
    )
    merged, merged_size = tokred.segment_merge(x, dst_idx, num_tokens, size=size)
    if compat == "released" and x.shape[0] > 1:
        merged = merged * (merged_size / (merged_size + 1e-4))[..., None].to(x.dtype)
    return Reduced(merged, dst_idx=dst_idx, size=merged_size, num_kept=num_kept)
