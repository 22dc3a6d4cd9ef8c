# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""list_to_slots: logical positions to slots of a paged cache."""

import torch
from torch import Tensor

from tokred import _op


def list_to_slots(kept_idx: Tensor, page_table: Tensor, *, page_size: int, kv_lens: Tensor | None = None) -> Tensor:
    """Turn lists of logical positions into slots of a paged cache: ``page_table[p // page_size] * page_size + p % page_size``.

    Args:
        kept_idx: ``[batch_size, k]`` or ``[batch_size, num_heads, k]`` int64 or int32, contiguous, any order; -1 is an empty
            entry.
        page_table: ``[batch_size, max_pages]`` int32, contiguous, shared by all heads; or a table per kv head,
            ``[batch_size, num_kv_heads, max_pages]``, where ``num_kv_heads`` divides ``num_heads``: list ``h`` reads table
            ``h // (num_heads // num_kv_heads)``.
        page_size: Tokens per page, at least 1.
        kv_lens: ``[batch_size]``, or ``[batch_size, num_kv_heads]`` with a table per kv head, int32, contiguous: positions
            from there on count as -1. The default is that all pages are full.

    Returns:
        Slots, int32, of the shape of ``kept_idx``; rows of ``cache.view(num_pages * page_size, ...)``. -1 for an entry
        outside ``[0, kv_lens)`` or the table, for one on a page with a negative number, and for a slot beyond int32. That
        pages lie inside the cache is not checked: nothing of the tensors is read back.

    Deterministic, the same on every device; shapes depend on shapes alone. Integers have no gradient.

    Example:
        >>> page_table = torch.tensor([[7, 2, 5]], dtype=torch.int32)
        >>> tokred.list_to_slots(torch.tensor([[0, 17, 40, -1]]), page_table, page_size=16).tolist()
        [[112, 33, 88, -1]]
    """
    return torch.ops.tokred.list_to_slots.default(kept_idx, page_table, page_size, kv_lens)


def reference(kept_idx: Tensor, page_table: Tensor, *, page_size: int, kv_lens: Tensor | None = None) -> Tensor:
    """Define list_to_slots in plain PyTorch; tests and benchmarks measure against this."""
    if page_table.shape[-1] == 0:
        return torch.full_like(kept_idx, -1, dtype=torch.int32)
    lists = kept_idx.long() if kept_idx.dim() == 3 else kept_idx[:, None].long()
    tables = page_table.long() if page_table.dim() == 3 else page_table[:, None].long()
    lens = torch.full_like(tables[..., 0], page_table.shape[-1] * page_size)
    if kv_lens is not None:
        lens = torch.minimum(lens, kv_lens.reshape(lens.shape))
    group = lists.shape[1] // max(tables.shape[1], 1)
    tables, lens = tables.repeat_interleave(group, 1), lens.repeat_interleave(group, 1)
    valid = (lists >= 0) & (lists < lens[..., None])
    position = torch.where(valid, lists, 0)
    page = tables.gather(2, position // page_size)
    slot = page * page_size + position % page_size
    valid &= (page >= 0) & (slot < 2**31)
    return torch.where(valid, slot, -1).int().reshape(kept_idx.shape)


@torch.library.register_fake("tokred::list_to_slots")
def _(kept_idx: Tensor, page_table: Tensor, page_size: int, kv_lens: Tensor | None = None) -> Tensor:
    return kept_idx.new_empty(kept_idx.shape, dtype=torch.int32)


_op.fold_vmap("list_to_slots")


def floor(kept_idx: Tensor, page_table: Tensor, *, page_size: int, kv_lens: Tensor | None = None) -> _op.Floor:
    """Lists read, slots written; of the tables at most a page number per entry."""
    lens = 0 if kv_lens is None else kv_lens.nbytes
    return kept_idx.nbytes + 4 * kept_idx.numel() + min(page_table.nbytes, 4 * kept_idx.numel()) + lens, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests; there is nothing of ``dtype`` in them."""
    randn = _op.seeded(device)
    lists = randn(2, 4, 9).mul(40).long()
    table = randn(2, 2, 5).argsort(-1).int()
    lens = torch.tensor([[80, 33], [1, 0]], dtype=torch.int32, device=device)
    return [
        ((lists[:, 0].contiguous(), table[:, 0].contiguous()), {"page_size": 16}),
        ((lists.int(), table), {"page_size": 16, "kv_lens": lens}),
        ((lists, table[:, 1].contiguous()), {"page_size": 1, "kv_lens": lens[:, 0].contiguous()}),
    ]
