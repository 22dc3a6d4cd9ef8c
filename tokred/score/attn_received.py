# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attn_received: the attention that each key receives."""

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
) -> tuple[Tensor, Tensor]:
    """Sum (or take the maximum of) the softmax attention that each key receives from the given queries.

    ``received[b, h, j] = sum_i q_weight[b, h, i] * P[i, j]`` with ``P = softmax(logits)`` over the keys that a query sees,
    ``logits = softcap * tanh(scale * q k^T / softcap) + key_bias``, per query head, without the matrix. Slice ``q`` to choose
    the queries: ``q[:, :, -64:]`` is SnapKV's window, all of ``q`` is H2O's accumulated attention, ``q[:, :, :1]`` the CLS row
    of a ViT. Slice ``k`` to normalise over a span only.

    Args:
        q: ``[batch_size, num_q_heads, q_len, head_dim]``, float32, float16 or bfloat16; any strides (a transposed
            ``[batch_size, q_len, num_q_heads, head_dim]`` is taken without a copy) with a contiguous last dimension;
            head_dim at most 256.
        k: ``[batch_size, num_kv_heads, kv_len, head_dim]``, likewise, of the dtype of ``q``. ``num_q_heads`` is a multiple
            of ``num_kv_heads``: query head ``h`` reads key head ``h // (num_q_heads // num_kv_heads)``.
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

    Returns:
        ``(received, lse)``.

        - ``received``: ``[batch_size, num_q_heads, kv_len]`` float32. A key that no query sees receives 0. Under ``"max"``
          the maximum includes 0, so it is never negative and a query of negative weight counts as absent.
        - ``lse``: ``[batch_size, num_q_heads, q_len]`` float32, a new tensor, a copy when given; the sink is part of it. -inf
          for a query that sees no key (and no sink); such a query contributes nothing.

    A NaN or +inf among the logits that a query sees, a sink among them, makes its lse NaN, and with it ``received`` of every
    key that it sees, as NaN in a given ``lse`` or in ``q_weight`` does (0 times NaN is NaN). A logit of -inf is an attention
    of 0.

    Accumulates in float32; float32 inputs are multiplied to float32 accuracy on every device (inf in float32 inputs is NaN
    on CUDA). Deterministic: a row's result does not depend on its batch, on threads, or on the run. CPU and CUDA agree up
    to rounding. Memory beyond the outputs: on the CPU 4 MiB of logits per thread beside one packed tile, and partial columns
    of up to 16 tasks per batch row (64 MiB at most, or one batch row's); on CUDA two floats per query and split of at least
    1,024 keys. Shapes depend on shapes alone. No gradient: scores select tokens; detach the inputs, or compute
    ``softmax(q k^T)`` eagerly to train through it.

    The score of H2O (column sums), SnapKV section 4 (a window of queries), FastV and VisionZip (one layer's attention).

    Example:
        >>> q, k = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 12, 64)
        >>> received, lse = tokred.attn_received(q, k, causal=True)
        >>> received.shape, lse.shape, round(received[0, 0].sum().item(), 3)
        (torch.Size([1, 8, 12]), torch.Size([1, 8, 5]), 5.0)
    """
    return torch.ops.tokred.attn_received.default(
        q, k, lse, q_weight, causal, q_start, reduce, scale, window, softcap, sink, key_bias
    )


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
) -> tuple[Tensor, Tensor]:
    """Define attn_received in plain PyTorch; tests and benchmarks measure against this. float64 in, float64 out."""
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
    return received, lse.clone()


@torch.library.register_fake("tokred::attn_received")
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    q_weight: Tensor | None = None,
    causal: bool = False,
    q_start: int | None = None,
    reduce: str = "sum",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch_size, num_q_heads, q_len, _ = q.shape
    received = q.new_empty((batch_size, num_q_heads, k.shape[2]), dtype=torch.float32)
    return received, q.new_empty((batch_size, num_q_heads, q_len), dtype=torch.float32)


_op.no_gradient("attn_received", "detach q and k, or compute softmax(q k^T) eagerly to train through it")
_op.autocast("attn_received", 2)
_op.fold_vmap("attn_received", shared=(10,))  # sink


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
) -> _op.Floor:
    """Q and K read and multiplied once per pass. One pass when ``lse`` is given, or on the CPU, which keeps a block's logits.

    At a head_dim of 64 or less a GPU is bound by exponentials before it is by this product.
    """
    batch_size, num_q_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    passes = 1 if lse is not None or q.device.type == "cpu" else 2
    pairs = q_len * kv_len
    if causal or window is not None:
        start = kv_len - q_len if q_start is None else q_start
        back = kv_len + q_len + abs(start) if window is None else window
        ahead = 0 if causal else back
        pairs = sum(
            min(max(start + i + ahead + 1, 0), kv_len) - min(max(start + i - back, 0), kv_len) for i in range(q_len)
        )
    read = passes * (q.nbytes + k.nbytes) + sum(t.nbytes for t in (lse, q_weight, sink, key_bias) if t is not None)
    written = 4 * batch_size * num_q_heads * (kv_len + q_len)
    return read + written, 2 * passes * batch_size * num_q_heads * pairs * head_dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    q, k = randn(2, 4, 7, 40, dtype=dtype), randn(2, 2, 19, 40, dtype=dtype)
    blhd = randn(2, 19, 2, 40, dtype=dtype).transpose(1, 2)
    weight, lse = randn(2, 4, 7).abs(), randn(2, 4, 7) + 4
    return [
        ((q, k), {}),
        ((q, blhd), {"causal": True, "q_weight": weight}),
        ((q, k), {"causal": True, "q_start": 3, "reduce": "max", "scale": 0.3}),
        ((q, k), {"lse": lse}),
        ((q[:, :, :0], k), {}),
        ((q, k), {"window": 4, "causal": True, "softcap": 2.0, "sink": randn(4), "key_bias": randn(2, 1, 19)}),
        ((q, k), {"window": 5, "key_bias": randn(2, 4, 19)}),
    ]
