# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""list_union: one list per kv head from the lists of its query heads."""

import torch
from torch import Tensor

from tokred import _op, _topk


def list_union(kept_idx: Tensor, num_kv_heads: int, *, kv_len: int) -> tuple[Tensor, Tensor]:
    """Unite the lists of the query heads that share a kv head (GQA).

    Args:
        kept_idx: ``[batch_size, num_q_heads, k]`` int64 or int32, contiguous, any order, repeats allowed; ids outside
            ``[0, kv_len)``, usually -1, are left out.
        num_kv_heads: Divides ``num_q_heads``: query head ``h`` belongs to kv head ``h // (num_q_heads // num_kv_heads)``.
        kv_len: Positions are in ``[0, kv_len)``.

    Returns:
        ``(union_idx, num_union)``.

        - ``union_idx``: ``[batch_size, num_kv_heads, min(k * num_q_heads // num_kv_heads, kv_len)]`` int64, ascending, no
          position twice, then -1: as long as the union can be.
        - ``num_union``: ``[batch_size, num_kv_heads]`` int32, how many positions there are.

    Deterministic, the same on every device; shapes depend on shapes and integers alone. On the CPU each thread holds a bit
    per position. Integers have no gradient.

    Example:
        >>> kept_idx = torch.tensor([[[0, 3, 9], [3, 4, -1], [8, 7, 7], [1, 2, 3]]])  # 4 query heads
        >>> union_idx, num_union = tokred.list_union(kept_idx, 2, kv_len=10)
        >>> union_idx.tolist(), num_union.tolist()
        ([[[0, 3, 4, 9, -1, -1], [1, 2, 3, 7, 8, -1]]], [[4, 5]])
    """
    return torch.ops.tokred.list_union.default(kept_idx, num_kv_heads, kv_len)


def reference(kept_idx: Tensor, num_kv_heads: int, *, kv_len: int) -> tuple[Tensor, Tensor]:
    """Define list_union in plain PyTorch; tests and benchmarks measure against this."""
    batch_size, num_q_heads, k = kept_idx.shape
    members = num_q_heads // num_kv_heads * k
    size = min(members, kv_len)
    groups = kept_idx.reshape(batch_size * num_kv_heads, members).long()
    unions = [group[(group >= 0) & (group < kv_len)].unique() for group in groups]
    padded = [_topk.pad(union, size) for union in unions]
    flat = torch.stack(padded) if padded else groups.new_empty((0, size))
    counts = torch.tensor([union.shape[0] for union in unions], dtype=torch.int32, device=kept_idx.device)
    return flat.reshape(batch_size, num_kv_heads, size), counts.reshape(batch_size, num_kv_heads)


@torch.library.register_fake("tokred::list_union")
def _(kept_idx: Tensor, num_kv_heads: int, kv_len: int) -> tuple[Tensor, Tensor]:
    lead = (kept_idx.shape[0], num_kv_heads)
    members = kept_idx.shape[1] // num_kv_heads * kept_idx.shape[2]
    size = torch.sym_min(members, kv_len)
    return kept_idx.new_empty((*lead, size), dtype=torch.int64), kept_idx.new_empty(lead, dtype=torch.int32)


_op.fold_vmap("list_union")


def floor(kept_idx: Tensor, num_kv_heads: int, *, kv_len: int) -> _op.Floor:
    """Lists read, unions and counts written."""
    unions = kept_idx.shape[0] * num_kv_heads
    members = kept_idx.shape[1] // num_kv_heads * kept_idx.shape[2]
    return kept_idx.nbytes + unions * (8 * min(members, kv_len) + 4), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests; there is nothing of ``dtype`` in them."""
    lists = _op.seeded(device)(2, 4, 9).mul(20).long()
    return [
        ((lists, 2), {"kv_len": 33}),
        ((lists.int(), 1), {"kv_len": 12}),
        ((lists, 4), {"kv_len": 99}),
    ]
