# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""block_summary: the mean, or minimum and maximum, of each block of keys."""

import torch
from torch import Tensor

from tokred import _op


def block_summary(
    k: Tensor,
    block_size: int,
    *,
    reduce: str = "mean",
    kv_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Summarize each block of ``block_size`` consecutive keys by its mean, or by its minimum and maximum per channel.

    Args:
        k: ``[batch_size, num_kv_heads, kv_len, head_dim]`` by strides; or packed, with ``cu_seqlens``,
            ``[total_tokens, num_kv_heads, head_dim]`` by strides. float32, float16 or bfloat16; contiguous in ``head_dim``.
            Pages are blocks already: ``block_summary(pages.transpose(1, 2), page_size)`` summarizes a paged cache
            ``[num_pages, page_size, num_kv_heads, head_dim]`` page by page.
        block_size: Keys per block, at least 1. The last block of a sequence may hold fewer.
        reduce: ``"mean"``, or ``"minmax"``.
        kv_lens: ``[batch_size]`` int32, contiguous: keys from there on are not read. Dense only.
        cu_seqlens: ``[batch_size + 1]`` int32, contiguous, starts with 0, ends with ``total_tokens``: the input is packed,
            and each sequence has blocks of its own.
        max_seqlen: The longest sequence of a packed input (the default is ``total_tokens``); keys beyond it are not read.

    Returns:
        The means, ``[batch_size, num_kv_heads, num_blocks, head_dim]`` in the dtype of ``k``, with ``num_blocks`` the number
        of blocks in ``kv_len`` or ``max_seqlen`` keys; or ``(low, high)``, two of these. Zeros in blocks without any key.

    Means are summed in float32 in the order of the keys and rounded once; minimum and maximum are exact, and NaN where a key
    is NaN. Deterministic, equal bits on every device. K is read once; no memory beyond the outputs. Shapes depend on shapes
    and integers alone. No gradient: use ``k.unflatten(2, (-1, block_size)).mean(3)`` to train through a mean.

    Block keys of NSA and MInference (means), page bounds of Quest (``tokred.page_bound_score``).

    Example:
        >>> k = torch.arange(10.0).view(1, 1, 10, 1)
        >>> tokred.block_summary(k, 4).flatten().tolist()
        [1.5, 5.5, 8.5]
        >>> low, high = tokred.block_summary(k, 4, reduce="minmax")
        >>> high.flatten().tolist()
        [3.0, 7.0, 9.0]
    """
    if max_seqlen is None:
        max_seqlen = 0 if cu_seqlens is None else k.shape[0]
    low, high = torch.ops.tokred.block_summary.default(k, block_size, kv_lens, cu_seqlens, max_seqlen, reduce)
    return (low, high) if reduce == "minmax" else low


def reference(
    k: Tensor,
    block_size: int,
    *,
    reduce: str = "mean",
    kv_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Define block_summary in plain PyTorch, in float64; tests and benchmarks measure against this."""
    total = k.shape[2 if cu_seqlens is None else 0]
    longest = total if max_seqlen is None else max_seqlen
    num_blocks = -(-longest // block_size)
    position = torch.arange(num_blocks * block_size, device=k.device)
    if cu_seqlens is None:
        begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        lens = torch.full_like(begin, total) if kv_lens is None else kv_lens.long().clamp(0, total)
    else:
        begin = cu_seqlens[:-1].long()
        lens = (cu_seqlens[1:] - begin).clamp(0, longest)
        k = k.transpose(0, 1)[None].expand(len(begin), -1, -1, -1)
    exists = position < lens[:, None]
    if total == 0 or num_blocks == 0:
        rows = k.new_zeros((len(begin), k.shape[1], len(position), k.shape[3]), dtype=torch.float64)
    else:
        at = torch.where(exists, begin[:, None] + position, torch.zeros_like(position))
        rows = k.gather(2, at[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])).double()
    rows = rows.view(*rows.shape[:2], num_blocks, block_size, rows.shape[3])
    exists = exists.view(len(begin), 1, num_blocks, block_size, 1)
    some = exists.any(3)
    if reduce == "mean":
        return (torch.where(exists, rows, 0.0).sum(3) / exists.sum(3).clamp(min=1)).to(k.dtype)
    low, high = torch.where(exists, rows, torch.inf).amin(3), torch.where(exists, rows, -torch.inf).amax(3)
    return torch.where(some, low, 0.0).to(k.dtype), torch.where(some, high, 0.0).to(k.dtype)


@torch.library.register_fake("tokred::block_summary")
def _(
    k: Tensor,
    block_size: int,
    kv_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    batch_size, longest = (k.shape[0], k.shape[2]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, max_seqlen)
    shape = (k.shape[1], (longest + block_size - 1) // block_size, k.shape[-1])
    return k.new_empty((batch_size, *shape)), k.new_empty((batch_size if reduce == "minmax" else 0, *shape))


_op.no_gradient("block_summary", "use k.unflatten(2, (-1, block_size)).mean(3) to train through a mean")
_op.fold_vmap("block_summary", absent=(3,))


def floor(
    k: Tensor,
    block_size: int,
    *,
    reduce: str = "mean",
    kv_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> _op.Floor:
    """K read once, summaries written."""
    packed = cu_seqlens is not None
    batch_size = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else k.shape[0]
    longest = k.shape[0 if packed else 2] if max_seqlen is None else max_seqlen
    written = batch_size * k.shape[1] * -(-longest // block_size) * k.shape[-1] * k.itemsize
    lens = sum(x.nbytes for x in (kv_lens, cu_seqlens) if x is not None)
    return k.nbytes + lens + written * (2 if reduce == "minmax" else 1), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    k, packed = randn(2, 3, 37, 40, dtype=dtype), randn(29, 2, 24, dtype=dtype)
    lens = torch.tensor([37, 9], dtype=torch.int32, device=device)
    cu_seqlens = torch.tensor([0, 17, 17, 29], dtype=torch.int32, device=device)
    return [
        ((k, 8), {"kv_lens": lens}),
        ((k, 16), {"reduce": "minmax", "kv_lens": lens}),
        ((packed, 4), {"reduce": "minmax", "cu_seqlens": cu_seqlens, "max_seqlen": 17}),
    ]
