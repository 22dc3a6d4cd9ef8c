# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""virtual_unmerge: attention of merged tokens as if they had not merged."""

from collections.abc import Callable

from torch import Tensor

from tokred.merge.segment_expand import segment_expand
from tokred.merge.segment_merge import segment_merge


def virtual_unmerge(
    q: Tensor, k: Tensor, v: Tensor, dst_idx: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attend with every token in its original place, and average what the copies of a merged token got.

    Queries, keys and values are made for the merged tokens alone; here each original token gets its copy, ``attend`` rotates
    them by the original positions and attends, and the outputs of the copies are averaged. Norms, projections and MLPs
    never see the long sequence.

    Args:
        q: ``[batch_size, num_q_heads, num_merged, head_dim]`` by strides, float32, float16 or bfloat16, not rotated yet.
        k: ``[batch_size, num_kv_heads, num_merged, head_dim]``, likewise.
        v: ``[batch_size, num_kv_heads, num_merged, head_dim_v]``.
        dst_idx: ``[batch_size, num_tokens]`` int64 or int32: the merged token that each original one went to; text tokens go
            to themselves. Ids outside ``[0, num_merged)`` (-1 for padding) get zeros, which ``attend`` has to mask.
        attend: Called with the three of ``num_tokens`` tokens; returns ``[batch_size, num_q_heads, num_tokens, head_dim_v]``,
            for example of RoPE and ``scaled_dot_product_attention``.

    Returns:
        ``[batch_size, num_q_heads, num_merged, head_dim_v]``, the dtype of what ``attend`` returns; 0 for a merged token
        without an original one.

    A composite of ``segment_expand``, the attention and ``segment_merge``. Deterministic if ``attend`` is; shapes depend on
    shapes alone. Differentiable in ``q``, ``k`` and ``v``.

    Source: "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", the form that its authors run: as fast as
    attention over all tokens. (Its other form multiplies the merged tokens once per rotary frequency, and is slower.)

    Example:
        >>> q = k = v = torch.randn(1, 2, 3, 8)
        >>> attend = torch.nn.functional.scaled_dot_product_attention
        >>> tokred.virtual_unmerge(q, k, v, torch.tensor([[0, 1, 1, 2]]), attend).shape
        torch.Size([1, 2, 3, 8])
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4 or t.shape[0] != q.shape[0] or t.shape[2] != q.shape[2]:
            raise RuntimeError(
                f"virtual_unmerge: expected {name} of shape [batch_size, num_heads, num_merged, head_dim] with "
                f"batch_size {q.shape[0]} and num_merged {q.shape[-2]}, got {list(t.shape)}"
            )

    def expanded(t: Tensor) -> Tensor:
        rows = segment_expand(t.transpose(1, 2).flatten(2), dst_idx)
        return rows.unflatten(2, (t.shape[1], t.shape[3])).transpose(1, 2)

    out = attend(expanded(q), expanded(k), expanded(v))
    merged, _ = segment_merge(out.transpose(1, 2).flatten(2), dst_idx, q.shape[2])
    return merged.unflatten(2, (out.shape[1], out.shape[3])).transpose(1, 2)
