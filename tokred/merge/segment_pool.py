# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_pool: each segment as one token: its first, last, mean, maximum or weighted mean."""

from typing import Literal

import torch
from torch import Tensor

from tokred import _ragged
from tokred.merge.segment_expand import segment_expand
from tokred.merge.segment_member import segment_member
from tokred.merge.segment_merge import segment_merge

Pool = Literal["first", "last", "mean", "max", "sum", "softmax"]


def segment_pool(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    mode: Pool = "mean",
    weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Pool the tokens of each segment, such as the bytes of a word.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``, float32, float16 or bfloat16.
        dst_idx: The segment of each token in its sequence, of the shape of ``x`` without ``dim``: what ``boundary_map``
            gives. Ids outside ``[0, num_out)`` are dropped.
        num_out: How many segments each sequence gets.
        mode: ``"first"`` or ``"last"`` member, ``"mean"`` (weighted, if there is a weight), ``"sum"``, ``"max"``;
            ``"softmax"``: the mean with weights ``exp(weight)``, taken relative to the segment's largest: attention of one
            learned query per segment.
        weight: float32, the shape of ``dst_idx``: for ``"mean"`` and ``"sum"``, required for ``"softmax"``.
        cu_seqlens: ``[batch_size + 1]`` int32, for packed tokens.

    Returns:
        ``[batch_size, num_out, dim]``, the dtype of ``x``; segments without members are 0.

    The way back is ``segment_expand(y, dst_idx)``: each token gets its segment's row; with ``dst_idx - 1`` that of the
    segment before, so that no byte sees the word that it is in.

    A composite of ``segment_merge``, or of a list and a gather. Deterministic; shapes depend on shapes and ``num_out`` alone.
    Differentiable in ``x`` and ``weight``.

    Source: words from bytes (HAT, Learn Your Tokens), segment maxima (PoNet), identifiers of code by a mean or by learned
    weights ("On the Effect of Token Merging on Pre-trained Models for Code").

    Example:
        >>> x, dst_idx = torch.tensor([[[1.0], [2.0], [6.0], [4.0]]]), torch.tensor([[0, 0, 0, 1]])
        >>> [tokred.segment_pool(x, dst_idx, 2, mode=m).flatten().tolist() for m in ("mean", "max", "last")]
        [[3.0, 4.0], [6.0, 4.0], [6.0, 4.0]]
        >>> tokred.segment_expand(tokred.segment_pool(x, dst_idx, 2), dst_idx - 1).flatten().tolist()
        [0.0, 0.0, 0.0, 3.0]
    """
    if mode not in ("first", "last", "mean", "max", "sum", "softmax"):
        raise RuntimeError(
            f"segment_pool: expected mode 'first', 'last', 'mean', 'max', 'sum' or 'softmax', got {mode!r}"
        )
    if (weight is None) if mode == "softmax" else (weight is not None and mode not in ("mean", "sum")):
        wanted = "a tensor" if mode == "softmax" else "None"
        raise RuntimeError(f"segment_pool: expected weight {wanted} in mode {mode!r}")
    if cu_seqlens is not None:  # one long sequence, in which each has segments of its own
        batch_size = cu_seqlens.shape[0] - 1
        sequence, inside = _ragged.sequence_of("segment_pool", cu_seqlens, x.shape[0])
        row = torch.where(inside & (dst_idx >= 0) & (dst_idx < num_out), dst_idx + sequence * num_out, -1)
        of_row = None if weight is None else weight[None]
        pooled = segment_pool(x[None], row[None], batch_size * num_out, mode=mode, weight=of_row)
        return pooled[0].unflatten(0, (batch_size, num_out))
    if mode == "first" or mode == "last":  # not "in": mypy narrows by equality
        return segment_expand(x, segment_member(dst_idx, num_out, mode))
    if mode == "softmax":
        assert weight is not None
        with torch.no_grad():
            largest, _ = segment_merge(weight[..., None], dst_idx, num_out, mode="max")
            shift = segment_expand(largest, dst_idx)[..., 0]
        return segment_merge(x, dst_idx, num_out, weight=(weight - shift).exp())[0]
    return segment_merge(x, dst_idx, num_out, weight=weight, mode=mode)[0]
