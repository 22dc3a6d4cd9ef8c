# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""merge_attention: an attention map of tokens that have merged since."""

from typing import Literal

from torch import Tensor

from tokred.merge.segment_merge import segment_merge

Mode = Literal["mean", "sum", "max"]


def merge_attention(
    attn: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    row_mode: Mode = "mean",
    col_mode: Mode = "sum",
) -> Tensor:
    """Merge the rows and the columns of a map by the same destinations: queries averaged, keys added up.

    Args:
        attn: ``[batch_size, num_heads, num_tokens, num_tokens]``, float32, float16 or bfloat16: probabilities, a mask, or
            which tokens came from which. Rows are queries.
        dst_idx: ``[batch_size, num_tokens]`` int64 or int32: the output row of each token; ids outside ``[0, num_out)`` are
            dropped on both sides.
        num_out: How many tokens each sequence has after the merge.
        weight: ``[batch_size, num_tokens]`` float32: what a query counts for in the mean or sum of rows.
        row_mode: ``"mean"``, ``"sum"`` or ``"max"`` of queries.
        col_mode: The same of keys.

    Returns:
        ``[batch_size, num_heads, num_out, num_out]``, the dtype of ``attn``. Where no token is dropped, rows that sum to 1
        still do, with the default modes.

    A composite of two calls of ``segment_merge``, with one transposed copy of the smaller map between them, rounded to the
    dtype in between. Deterministic; shapes depend on shapes and ``num_out`` alone. Differentiable in ``attn`` and ``weight``.

    Source: "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers": its map is that of
    the tokens before they merge, rows with the weights of the tokens. For chained merges compose the maps first
    (``second.gather(1, first)``) or call it for each. Maxima merge 0/1 masks.

    Example:
        >>> attn = torch.tensor([[[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]]])
        >>> tokred.merge_attention(attn, torch.tensor([[0, 1, 0]]), 2).tolist()
        [[[[0.75, 0.25], [0.0, 1.0]]]]
    """
    if attn.dim() != 4 or attn.shape[2] != attn.shape[3]:
        raise RuntimeError(
            "merge_attention: expected attn of shape [batch_size, num_heads, num_tokens, num_tokens], "
            f"got {list(attn.shape)}"
        )
    num_heads = attn.shape[1]

    def of_heads(t: Tensor) -> Tensor:
        return t.repeat_interleave(num_heads, 0)

    ids = of_heads(dst_idx)
    of_rows = None if weight is None else of_heads(weight)
    rows, _ = segment_merge(attn.flatten(0, 1), ids, num_out, weight=of_rows, mode=row_mode)
    merged, _ = segment_merge(rows.mT.contiguous(), ids, num_out, mode=col_mode)
    return merged.mT.unflatten(0, (attn.shape[0], num_heads)).contiguous()
