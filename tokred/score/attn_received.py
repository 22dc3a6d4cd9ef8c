# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attn_received: the attention that each key receives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import _op


def attn_received(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    q_start: int | None = None,
    lse: Tensor | None = None,
    q_weight: Tensor | None = None,
    reduce: str = "sum",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    return_diagonal: bool = False,
) -> tuple[Tensor, ...]:
    """Sum (or take the maximum of) the softmax attention that each key receives from the given queries.

    ``received[b, h, j] = sum_i q_weight[b, h, i] * P[i, j]`` with ``P = softmax(logits)`` over the keys that a query sees,
    ``logits = softcap * tanh(scale * q k^T / softcap) + key_bias``, per query head, without the matrix. Slice ``q`` to choose
    the queries: ``q[:, :, -64:]`` is SnapKV's window, all of ``q`` is H2O's accumulated attention, ``q[:, :, :1]`` the CLS row
    of a ViT. Slice ``k`` to normalise over a span only.

    Args:
        q: ``[batch_size, num_q_heads, q_len, head_dim]``, float32, float16 or bfloat16; any strides (a transposed
            ``[batch_size, q_len, num_q_heads, head_dim]`` is taken without a copy) with a contiguous last dimension;
            head_dim at most 256. Packed: ``[total_q, num_q_heads, head_dim]``, likewise.
        k: ``[batch_size, num_kv_heads, kv_len, head_dim]``, likewise, of the dtype of ``q``. ``num_q_heads`` is a multiple
            of ``num_kv_heads``: query head ``h`` reads key head ``h // (num_q_heads // num_kv_heads)``. Packed:
            ``[total_k, num_kv_heads, head_dim]``. Paged: ``[num_pages, page_size, num_kv_heads, head_dim]`` with pages of 1,
            16, 32, 64 or 128 tokens.
        causal: Query ``i`` is at position ``q_start + i`` and sees the keys at positions up to its own.
        q_start: The position of the first query, when ``causal`` or with a ``window``; the default ``kv_len - q_len`` aligns
            the last query with the last key. May be negative.
        lse: ``[batch_size, num_q_heads, q_len]`` float32, the natural logarithm of each query's sum of exponentials of the
            scaled logits, as attention kernels return it: saves the pass that computes it. It is taken as it is; keys that
            are not in ``k`` may be part of it.
        q_weight: ``[batch_size, num_q_heads, q_len]`` float32; the default is 1.
        reduce: ``"sum"``, or ``"max"`` for the greatest ``q_weight * P`` over the queries.
        scale: Greater than 0; the default is ``head_dim ** -0.5``.
        window: A query at position ``p`` sees the keys from ``p - window`` to ``p + window``, both included, and not beyond
            ``p`` when ``causal``: FlashAttention's ``window_size=(window, window)``. A model whose layer sees its last W
            tokens, itself among them, has ``window=W - 1``.
        softcap: Greater than 0; logits are capped to ``(-softcap, softcap)`` by a tanh, as in Gemma 2. The default is not to.
        sink: ``[num_q_heads]`` float32, a logit per head that takes part in the softmax's denominator and belongs to no
            key. Not with ``lse``, which is the whole denominator already: ``torch.logaddexp(lse, sink[:, None])`` adds it.
        key_bias: ``[batch_size, num_q_heads | num_kv_heads | 1, kv_len]`` float32, added to the logits after the cap: the log
            size of merged tokens, or -inf for keys that are padding or masked. One per query head of a larger group makes
            each query head read K by itself.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_q``: ``q`` and ``k`` are packed, and each
            sequence (window, image) attends within itself. ``lse`` and ``q_weight`` are then ``[num_q_heads, total_q]``,
            ``key_bias`` is ``[heads, total_k]``, positions count from the start of each sequence, and the results have no
            batch dimension either. Tokens behind the last sequence receive 0; where offsets do not ascend, results are
            undefined.
        cu_seqlens_k: Likewise for ``k`` where it has other lengths.
        max_seqlen: An upper bound of the key lengths of packed sequences. Up to 1,024 it saves a launch on CUDA.
        page_table: ``[batch_size, max_pages]`` int32: ``k`` is paged, and position ``p`` of row ``b`` lies in page
            ``page_table[b, p // page_size]``; ``kv_len`` is ``max_pages * page_size``. Keys on pages outside of
            ``[0, num_pages)`` are seen by no query.
        kv_lens: ``[batch_size]`` int32, with ``page_table``: how many keys each row has; the others are no keys. ``q_start``
            is ``kv_lens[b] - q_len`` by default.
        return_diagonal: Return the sums along diagonals, too. For dense ``q`` and ``k``, ``causal``, with the default
            ``q_start`` and ``reduce``; it costs another pass.

    Returns:
        ``(received, lse)``, or ``(received, lse, diagonal)`` with ``return_diagonal``.

        - ``received``: ``[batch_size, num_q_heads, kv_len]`` float32. A key that no query sees receives 0. Under ``"max"``
          the maximum includes 0, so it is never negative and a query of negative weight counts as absent.
        - ``lse``: ``[batch_size, num_q_heads, q_len]`` float32, a new tensor, a copy when given; the sink is part of it. -inf
          for a query that sees no key (and no sink); such a query contributes nothing.
        - ``diagonal``: ``[batch_size, num_q_heads, kv_len]`` float32; ``diagonal[b, h, o]`` is the sum of
          ``q_weight * P`` over the pairs of a query and the key that lies ``o`` positions before it: the slashes of
          MInference, whose verticals are ``received``.

    A NaN or +inf among the logits that a query sees, a sink among them, makes its lse NaN, and with it ``received`` of every
    key that it sees, as NaN in a given ``lse`` or in ``q_weight`` does (0 times NaN is NaN). A logit of -inf is an attention
    of 0.

    Accumulates in float32; float32 inputs are multiplied to float32 accuracy on every device (inf in float32 inputs is NaN
    on CUDA). Deterministic: a row's result does not depend on its batch, on threads, or on the run, nor on whether it comes
    dense, packed or paged. CPU and CUDA agree up to rounding. On CPUs that multiply bfloat16 themselves (AVX-512's
    instruction), bfloat16 numbers below 2^-126 count as zeros. Memory beyond the outputs: on the CPU 4 MiB of logits per
    thread beside one packed tile, and partial columns of up to 16 tasks per batch row (64 MiB at most, or one batch row's);
    on CUDA two floats per query and split of at least 1,024 keys, no more than two per query and one for every two keys of a
    key head. Shapes depend on shapes alone. No gradient: scores select tokens; detach the inputs, or compute
    ``softmax(q k^T)`` eagerly to train through it.

    The score of H2O (column sums), SnapKV section 4 (a window of queries), FastV and VisionZip (one layer's attention),
    MInference (verticals and slashes of the last 64 queries).

    Example:
        >>> q, k = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 12, 64)
        >>> received, lse = tokred.attn_received(q, k, causal=True)
        >>> received.shape, lse.shape, round(received[0, 0].sum().item(), 3)
        (torch.Size([1, 8, 12]), torch.Size([1, 8, 5]), 5.0)
    """
    op = torch.ops.tokred.attn_received
    options = (lse, q_weight, causal, q_start, reduce, scale, window, softcap, sink, key_bias)
    if return_diagonal:
        layout = [x for x in (cu_seqlens, cu_seqlens_k, page_table, kv_lens) if x is not None]
        if layout or not causal or q_start is not None or reduce != "sum":
            raise RuntimeError(
                'attn_received: expected dense q and k, causal=True, q_start=None and reduce="sum" with return_diagonal, '
                f'got {"packed or paged ones, " if layout else ""}causal={causal}, q_start={q_start}, reduce="{reduce}"'
            )
        return op.diagonal(q, k, lse, q_weight, scale, window, softcap, sink, key_bias)
    if cu_seqlens is not None:
        if page_table is not None:
            raise RuntimeError("attn_received: expected cu_seqlens or page_table, not both")
        return op.packed(q, k, cu_seqlens, cu_seqlens_k, max_seqlen, *options)
    if cu_seqlens_k is not None:
        raise RuntimeError("attn_received: expected cu_seqlens with cu_seqlens_k")
    if page_table is not None:
        return op.paged(q, k, page_table, kv_lens, *options)
    if kv_lens is not None:
        raise RuntimeError("attn_received: expected page_table with kv_lens; a key_bias of -inf hides dense keys")
    return op.default(q, k, *options)


def _dense_reference(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    q_start: int | None = None,
    lse: Tensor | None = None,
    q_weight: Tensor | None = None,
    reduce: str = "sum",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_bias: Tensor | None = None,
    absent: Tensor | None = None,
    return_diagonal: bool = False,
) -> tuple[Tensor, ...]:
    (num_q_heads, q_len), (num_kv_heads, kv_len) = q.shape[1:3], k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads = torch.arange(num_q_heads, device=q.device) // max(1, num_q_heads // max(1, num_kv_heads))
    logits = q.to(dtype) @ k[:, heads].to(dtype).mT * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if key_bias is not None:
        bias = key_bias.to(dtype)
        bias = bias[:, heads] if key_bias.shape[1] == num_kv_heads else bias.expand(-1, num_q_heads, -1)
        logits = logits + bias[:, :, None]
    start = kv_len - q_len if q_start is None else q_start
    ahead = torch.arange(kv_len, device=q.device) - (start + torch.arange(q_len, device=q.device))[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        seen &= ahead.abs() <= window
    if absent is not None:
        seen = seen & ~absent
    logits = logits.masked_fill(~seen, -torch.inf)
    if lse is None:
        lse = logits.logsumexp(-1)
        if sink is not None:
            lse = torch.logaddexp(lse, sink.to(dtype)[None, :, None])
        lse = lse.masked_fill(lse == torch.inf, torch.nan)
    absent = (lse == -torch.inf)[..., None]
    p = (logits - lse[..., None].to(dtype)).exp()
    p = p if q_weight is None else p * q_weight[..., None].to(dtype)
    p = p.masked_fill(~seen | absent, 0)
    received = p.sum(-2) if reduce == "sum" else torch.cat([p, p.new_zeros((*p.shape[:2], 1, kv_len))], -2).amax(-2)
    if return_diagonal:  # a query's distance to a key that it sees is in [0, kv_len)
        diagonal = torch.zeros((*p.shape[:2], kv_len), dtype=p.dtype, device=p.device)
        diagonal.index_add_(2, (-ahead).clamp(0, max(kv_len - 1, 0)).flatten(), p.flatten(2))
        return received, lse.clone(), diagonal
    return received, lse.clone()


def reference(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    q_start: int | None = None,
    lse: Tensor | None = None,
    q_weight: Tensor | None = None,
    reduce: str = "sum",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    return_diagonal: bool = False,
) -> tuple[Tensor, ...]:
    """Define attn_received in plain PyTorch; tests and benchmarks measure against this. float64 in, float64 out."""
    shared: dict[str, Any] = {"causal": causal, "q_start": q_start, "reduce": reduce, "scale": scale}
    shared |= {"window": window, "softcap": softcap, "sink": sink}
    if cu_seqlens is None and page_table is None:
        shared |= {"lse": lse, "q_weight": q_weight, "key_bias": key_bias}
        return _dense_reference(q, k, **shared, return_diagonal=return_diagonal)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is not None:
        q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
        lse, q_weight, key_bias = (None if x is None else x[None] for x in (lse, q_weight, key_bias))
        ends = [*cu_seqlens.tolist(), q.shape[2]]
        ends_k = [*(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist(), k.shape[2]]
        # What lies behind the last sequence is one more, whose keys no query sees.
        parts = [
            (0, slice(a, b), slice(c, d), torch.full((d - c,), i == len(ends) - 2, device=q.device))
            for i, (a, b, c, d) in enumerate(zip(ends, ends[1:], ends_k, ends_k[1:]))
        ]
    else:
        assert page_table is not None
        on_page = (page_table >= 0) & (page_table < k.shape[0])
        pages = torch.cat([k, k.new_zeros(1, *k.shape[1:])])[torch.where(on_page, page_table.long(), k.shape[0])]
        absent = ~on_page.repeat_interleave(k.shape[1], 1)
        k = pages.flatten(1, 2).transpose(1, 2)
        lens = [k.shape[2]] * k.shape[0] if kv_lens is None else kv_lens.clamp(0, k.shape[2]).tolist()
        parts = [(b, slice(0, q.shape[2]), slice(0, n), absent[b, :n]) for b, n in enumerate(lens)]
    received = torch.zeros((q.shape[0], q.shape[1], k.shape[2]), dtype=dtype, device=q.device)
    lse_out = torch.zeros(q.shape[:3], dtype=dtype, device=q.device)
    for b, i, j, hidden in parts:
        rows = {"lse": lse, "q_weight": q_weight}
        given: dict[str, Any] = {name: None if x is None else x[b : b + 1, :, i] for name, x in rows.items()}
        bias = None if key_bias is None else key_bias[b : b + 1, :, j]
        out = _dense_reference(q[b : b + 1, :, i], k[b : b + 1, :, j], key_bias=bias, absent=hidden, **given, **shared)
        received[b, :, j], lse_out[b, :, i] = out[0][0], out[1][0]
    return (received, lse_out) if cu_seqlens is None else (received[0], lse_out[0])


def _outputs(q: Tensor, heads: Sequence[int], q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*heads, kv_len), dtype=torch.float32), q.new_empty((*heads, q_len), dtype=torch.float32)


@torch.library.register_fake("tokred::attn_received")
def _(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, q.shape[:2], q.shape[2], k.shape[2])


@torch.library.register_fake("tokred::attn_received.diagonal")
def _(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    received, lse = _outputs(q, q.shape[:2], q.shape[2], k.shape[2])
    return received, lse, torch.empty_like(received)


@torch.library.register_fake("tokred::attn_received.packed")
def _(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, q.shape[1:2], q.shape[0], k.shape[0])


@torch.library.register_fake("tokred::attn_received.paged")
def _(q: Tensor, k: Tensor, page_table: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, q.shape[:2], q.shape[2], page_table.shape[1] * k.shape[1])


for _name in ("attn_received", "attn_received.diagonal", "attn_received.packed", "attn_received.paged"):
    _op.no_gradient(_name, "detach q and k, or compute softmax(q k^T) eagerly to train through it")
    _op.autocast(_name, 2)
_op.fold_vmap("attn_received", shared=(10,))  # sink
_op.fold_vmap("attn_received.diagonal", shared=(7,))  # sink
_op.fold_vmap("attn_received.packed", absent=(2,))
_op.fold_vmap("attn_received.paged", shared=(1, 12))  # pages, sink


def floor(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    q_start: int | None = None,
    lse: Tensor | None = None,
    q_weight: Tensor | None = None,
    reduce: str = "sum",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    return_diagonal: bool = False,
) -> _op.Floor:
    """Q and K read and multiplied once per pass. One pass when ``lse`` is given, or on the CPU, which keeps a block's logits.

    Another one for diagonals. At a head_dim of 64 or less a GPU is bound by exponentials before it is by this product.
    Packed: as if all sequences were of one length. Paged: as if all pages were full.
    """
    passes = (1 if lse is not None or q.device.type == "cpu" else 2) + return_diagonal
    extra = (lse, q_weight, sink, key_bias, cu_seqlens, cu_seqlens_k, page_table, kv_lens)
    read = passes * q.nbytes + sum(t.nbytes for t in extra if t is not None)
    head_dim = q.shape[-1]
    if cu_seqlens is not None:
        sequences, heads = max(1, cu_seqlens.shape[0] - 1), q.shape[1]
        rows, columns = heads * q.shape[0], heads * k.shape[0]
        q_len, kv_len, keys_read = q.shape[0] // sequences, k.shape[0] // sequences, k.nbytes
    else:
        sequences, heads, q_len = q.shape[:3]
        kv_len = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[1]
        num_kv_heads = k.shape[1 if page_table is None else 2]
        rows, columns = sequences * heads * q_len, sequences * heads * kv_len
        keys_read = sequences * num_kv_heads * kv_len * head_dim * k.itemsize
    pairs = q_len * kv_len
    if causal or window is not None:
        start = kv_len - q_len if q_start is None else q_start
        back = kv_len + q_len + abs(start) if window is None else window
        ahead = 0 if causal else back
        pairs = sum(
            min(max(start + i + ahead + 1, 0), kv_len) - min(max(start + i - back, 0), kv_len) for i in range(q_len)
        )
    moved = read + passes * keys_read + 4 * (rows + columns * (1 + return_diagonal))
    return moved, 2 * passes * sequences * heads * pairs * head_dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    q, k = randn(2, 4, 7, 40, dtype=dtype), randn(2, 2, 19, 40, dtype=dtype)
    blhd = randn(2, 19, 2, 40, dtype=dtype).transpose(1, 2)
    weight, lse = randn(2, 4, 7).abs(), randn(2, 4, 7) + 4
    cu_seqlens, cu_seqlens_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5, 5, 7], [0, 2, 9, 19])
    )
    packed = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "max_seqlen": 10, "causal": True}
    pages = randn(5, 16, 2, 40, dtype=dtype)
    table = torch.tensor([[3, 0], [1, -1]], dtype=torch.int32, device=device)
    lens = torch.tensor([23, 16], dtype=torch.int32, device=device)
    return [
        ((q, k), {}),
        ((q, blhd), {"causal": True, "q_weight": weight}),
        ((q, k), {"causal": True, "q_start": 3, "reduce": "max", "scale": 0.3}),
        ((q, k), {"lse": lse}),
        ((q[:, :, :0], k), {}),
        ((q, k), {"window": 4, "causal": True, "softcap": 2.0, "sink": randn(4), "key_bias": randn(2, 1, 19)}),
        ((q, k), {"window": 5, "key_bias": randn(2, 4, 19)}),
        ((q, blhd), {"causal": True, "q_weight": weight, "return_diagonal": True, "softcap": 3.0}),
        ((q[0].transpose(0, 1), k[0].transpose(0, 1)), packed),
        ((q, pages), {"page_table": table, "kv_lens": lens, "causal": True}),
    ]
