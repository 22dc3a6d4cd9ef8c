# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""qk_score: logits of a few queries against a long K."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op

#: rtol and atol against the reference: float32 sums of up to 256 exact products (float32 input: of three TF32 products), in
#: another order, whatever the dtype.
TOLERANCE = {dtype: (2e-5, 5e-5) for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def qk_score(
    q: Tensor,
    k: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    channels: Tensor | None = None,
    relu: bool = False,
    head_weight: Tensor | None = None,
    sum_heads: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Compute the logits ``scale * q k^T`` of one or a few queries against all keys, without a softmax.

    Args:
        q: Queries, ``[batch_size, num_q_heads, q_len, head_dim]`` by strides, float32, float16 or bfloat16; contiguous in
            ``head_dim``, which is at most 256. ``q_len`` is at most 16.
        k: Keys, up to 2^31 - 1024 per row. Dense: ``[batch_size, num_kv_heads, kv_len, head_dim]`` by strides. Paged:
            ``[num_pages, page_size, num_kv_heads, head_dim]`` by strides with pages of 1, 16, 32, 64 or 128 tokens.
            ``num_q_heads`` is a multiple of ``num_kv_heads``: query head ``h`` reads key head
            ``h // (num_q_heads // num_kv_heads)``. The dtype of ``q``; contiguous in the last dimension.
        page_table: ``[batch_size, max_pages]`` int32: position ``p`` lies in page ``page_table[b, p // page_size]``, and
            ``kv_len`` is ``max_pages * page_size``. The score of a position on a page outside ``[0, num_pages)`` is -inf.
        kv_lens: ``[batch_size]`` int32: the score of positions from ``kv_lens[b]`` on is -inf; they are not read.
        channels: ``[num_channels]`` or ``[num_kv_heads, num_channels]`` int64 or int32, contiguous: only these channels
            count, all others of ``q`` are taken as 0 (FASA's dominant frequencies, two channels each). A set: order and
            repetition do not matter, ids outside ``[0, head_dim)`` are skipped. K is read whole all the same: to read less,
            keep a packed copy of the channels and score that.
        relu: Negative logits become 0 before heads are weighted.
        head_weight: ``[batch_size, q_len, num_q_heads]`` float32, contiguous, with ``sum_heads``: the sum over heads is
            weighted (DSA's indexer).
        sum_heads: Sum over the query heads, in their order.
        scale: Factor of the logits, before ``relu``.

    Returns:
        Scores, float32: ``[batch_size, num_q_heads, q_len, kv_len]``, or ``[batch_size, q_len, kv_len]`` with ``sum_heads``.

    A NaN in a query or key makes NaN of every score that it is part of, in a channel that is not listed, too (0 times NaN);
    with float32 inputs an inf is NaN on CUDA. Accumulates in float32; float32 inputs are multiplied to float32 accuracy on
    every device. Deterministic: a score depends on its query and key alone, not on batch, threads or run; CPU and CUDA agree
    up to rounding. On CPUs that multiply bfloat16 themselves (AVX-512's instruction), bfloat16 numbers below 2^-126 count as
    zeros. No memory beyond the output but 135 KB per thread on the CPU. Shapes depend on shapes alone. No gradient:
    scores select tokens; detach the inputs, or compute ``q @ k.transpose(-1, -2)`` eagerly to train through it.

    The score of GemFilter (last query, heads summed), TokenSelect and TidalDecode (per head), TOVA, landmark tokens, SPTS
    and of the indexer of DeepSeek sparse attention (``relu`` and ``head_weight``).

    Example:
        >>> q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 500, 64)
        >>> tokred.qk_score(q, k).shape, tokred.qk_score(q, k, sum_heads=True).shape
        (torch.Size([1, 8, 1, 500]), torch.Size([1, 1, 500]))
    """
    return torch.ops.tokred.qk_score.default(q, k, page_table, kv_lens, head_weight, channels, relu, sum_heads, scale)


def reference(
    q: Tensor,
    k: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    channels: Tensor | None = None,
    relu: bool = False,
    head_weight: Tensor | None = None,
    sum_heads: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Define qk_score in plain PyTorch, in float64; tests and benchmarks measure against this."""
    batch_size, num_q_heads, _, head_dim = q.shape
    exists = None
    if page_table is not None:
        exists = ((page_table >= 0) & (page_table < k.shape[0])).repeat_interleave(k.shape[1], 1)
        if k.shape[0] == 0:
            k = k.new_zeros((1, *k.shape[1:]))
        k = k[page_table.long().clamp(0, k.shape[0] - 1)].flatten(1, 2).transpose(1, 2)
    num_kv_heads, kv_len = k.shape[1:3]
    q = q.double().unflatten(1, (num_kv_heads, num_q_heads // num_kv_heads))
    if channels is not None:
        every = torch.arange(head_dim, device=q.device)
        lists = channels.long() if channels.dim() == 2 else channels.long()[None]
        listed = (lists[..., None] == every).any(1)
        q = q * listed[:, None, None, :]
    scores = torch.matmul(q, k.double().transpose(2, 3)[:, :, None]).flatten(1, 2) * scale
    if relu:
        scores = scores.relu()
    if sum_heads:
        if head_weight is not None:
            scores = scores * head_weight.double().transpose(1, 2)[..., None]
        scores = scores.sum(1)
    readable = torch.ones((batch_size, kv_len), dtype=torch.bool, device=q.device) if exists is None else exists
    if kv_lens is not None:
        readable = readable & (torch.arange(kv_len, device=q.device) < kv_lens.long()[:, None])
    return scores.masked_fill(~readable.view(batch_size, *[1] * (scores.dim() - 2), kv_len), -torch.inf).float()


@torch.library.register_fake("tokred::qk_score")
def _(
    q: Tensor,
    k: Tensor,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    head_weight: Tensor | None = None,
    channels: Tensor | None = None,
    relu: bool = False,
    sum_heads: bool = False,
    scale: float = 1.0,
) -> Tensor:
    for x in (k, page_table, kv_lens, head_weight, channels):
        if x is not None and x.device != q.device:
            raise RuntimeError(f"qk_score: expected every tensor on the device of q ({q.device}), got {x.device}")
    kv_len = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[1]
    heads = () if sum_heads else (q.shape[1],)
    return q.new_empty((q.shape[0], *heads, q.shape[2], kv_len), dtype=torch.float32)


_op.no_gradient("qk_score", "compute q @ k.transpose(-1, -2) to train through it")
_op.autocast("qk_score", 2)
_dense_vmap, _paged_vmap = _op.fold_rule("qk_score", shared=(5,)), _op.fold_rule("qk_score", shared=(1, 5))


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Pages belong to no batch entry: with a page table, K stays as it is."""
    paged = len(args) > 2 and args[2] is not None
    return (_paged_vmap if paged else _dense_vmap)(info, in_dims, *args)


torch.library.register_vmap("tokred::qk_score", _vmap)


def floor(
    q: Tensor,
    k: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    channels: Tensor | None = None,
    relu: bool = False,
    head_weight: Tensor | None = None,
    sum_heads: bool = False,
    scale: float = 1.0,
) -> _op.Floor:
    """K read once (paged: max_pages pages per row) and what is small; scores written."""
    batch_size, num_q_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[1]
    num_kv_heads = k.shape[1 if page_table is None else 2]
    read = batch_size * num_kv_heads * kv_len * head_dim * k.itemsize + q.nbytes
    read += sum(x.nbytes for x in (page_table, kv_lens, head_weight, channels) if x is not None)
    written = 4 * batch_size * (1 if sum_heads else num_q_heads) * q_len * kv_len
    return read + written, 2 * batch_size * num_q_heads * q_len * kv_len * head_dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    q, k, pages = randn(2, 4, 2, 40, dtype=dtype), randn(2, 2, 70, 40, dtype=dtype), randn(6, 16, 2, 40, dtype=dtype)
    page_table = torch.tensor([[3, 0, -1], [1, 2, 5]], dtype=torch.int32, device=device)
    lens = torch.tensor([40, 48], dtype=torch.int32, device=device)
    channels = torch.tensor([[0, 7, 20, 27], [1, 2, 21, 22]], device=device)
    return [
        ((q, k), {"scale": 0.2}),
        ((q, k), {"relu": True, "head_weight": randn(2, 2, 4), "sum_heads": True}),
        ((q, pages), {"page_table": page_table, "kv_lens": lens, "channels": channels}),
    ]
