# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attend_selected: decode attention over listed keys and values."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op

#: rtol and atol against the reference: with half and bfloat16, CUDA rounds the weights before they multiply v (2^-11 and
#: 2^-8 of each term), and the result once more.
TOLERANCE = {torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_idx: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Attend to the listed keys only: ``softmax(scale * q k^T + key_bias) v`` over each head's list.

    Args:
        q: Queries, ``[batch_size, num_q_heads, q_len, head_dim]`` by strides, float32, float16 or bfloat16; contiguous
            in ``head_dim``, which is at most 256. Meant for a ``q_len`` of one or a few: every query attends to its
            whole list.
        k: Keys. Dense: ``[batch_size, num_kv_heads, kv_len, head_dim]`` by strides. Paged:
            ``[num_pages, page_size, num_kv_heads, head_dim]`` by strides with pages of 1, 16, 32, 64 or 128 tokens.
            ``num_kv_heads`` divides ``num_q_heads``. The dtype of ``q``; contiguous in the last dimension.
        v: Values, as ``k`` with ``head_dim_v`` (at most 256) instead of ``head_dim``.
        kept_idx: ``[batch_size, num_q_heads | num_kv_heads | 1, k]`` int64 or int32, contiguous: the logical positions
            that each query head, kv head, or all of them attend to. Ids outside ``[0, kv_len)`` (paged:
            ``[0, max_pages * page_size)``) count as -1, an entry that is skipped. An id listed twice counts twice.
        page_table: ``[batch_size, max_pages]`` int32: position ``p`` lies in page ``page_table[b, p // page_size]``.
            Entries on pages outside ``[0, num_pages)`` are skipped.
        kv_lens: ``[batch_size]`` int32: positions from ``kv_lens[b]`` on are skipped.
        key_bias: ``[batch_size, num_q_heads | num_kv_heads | 1, kv_len]`` float32 (paged: ``max_pages * page_size``),
            by logical position, added to the scaled logits: the log size of merged tokens (ToMe's proportional
            attention), or -inf to mask.
        scale: Factor of the logits; ``head_dim ** -0.5`` by default.
        return_lse: Return ``(out, lse)``.
        out: Buffers ``(out, lse)`` to write to, of the shapes below (``out`` by strides, ``lse`` contiguous), for
            callers that capture CUDA graphs. Not differentiable.

    Returns:
        ``out``, ``[batch_size, num_q_heads, q_len, head_dim_v]`` in the dtype of ``q``, or ``(out, lse)``; ``lse``,
        ``[batch_size, num_q_heads, q_len]`` float32, is the natural logarithm of the softmax's denominator, with which
        partial results merge. An empty list gives ``out`` 0 and ``lse`` -inf.

    Rows that no list names are never read. Accumulation in float32, float32 inputs to float32 accuracy; with half and
    bfloat16 the weights are rounded to the input dtype before they multiply ``v`` on CUDA. Deterministic; a row's result
    does not depend on its batch. Shapes depend on shapes alone. Lists longer than one split (512 entries on CPU, 64 to
    512 on CUDA) take a workspace of ``head_dim_v + 2`` floats per query row and split. Forward only: no gradient.

    Selected-KV decoding as in Quest (Tang et al. 2024, section 3.3), SnapKV (Li et al. 2024) and TokenSelect (Wu et al.
    2024); splits merge as in Flash-Decoding.

    Example:
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
        >>> kept_idx = torch.tensor([[[3, 17, 500, -1], [0, 1, 2, 511]]])  # a list per kv head
        >>> out, lse = tokred.attend_selected(q, k, v, kept_idx, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 1, 64]), torch.Size([1, 8, 1]))
    """
    op = torch.ops.tokred.attend_selected
    if out is None:
        result, lse = op.default(q, k, v, kept_idx, page_table, kv_lens, key_bias, scale)
        return (result, lse) if return_lse else result
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, key_bias, *out)):
        raise RuntimeError(
            "attend_selected: out= does not support automatic differentiation, but an argument requires grad"
        )
    op.out(q, k, v, kept_idx, page_table, kv_lens, key_bias, scale, out=out[0], lse=out[1])
    return out if return_lse else out[0]


def _dense(x: Tensor, page_table: Tensor, valid: Tensor) -> Tensor:
    """Lay pages out as [batch_size, num_kv_heads, max_pages * page_size, dim]; entries of no page are zeros."""
    pages = (
        x[page_table.long().clamp(0, x.shape[0] - 1)] if x.shape[0] else x.new_zeros((*page_table.shape, *x.shape[1:]))
    )
    tokens = pages.flatten(1, 2).transpose(1, 2)
    return torch.where(valid[:, None, :, None], tokens, torch.zeros_like(tokens))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_idx: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Define attend_selected in plain PyTorch, in float64; tests and benchmarks measure against this."""
    batch_size, num_q_heads = q.shape[:2]
    if page_table is not None:
        page_size = k.shape[1]
        on_page = ((page_table >= 0) & (page_table < k.shape[0])).repeat_interleave(page_size, 1)
        k, v = _dense(k, page_table, on_page), _dense(v, page_table, on_page)
    num_kv_heads, kv_len = k.shape[1:3]
    group = num_q_heads // num_kv_heads

    def per_q_head(x: Tensor) -> Tensor:
        """Repeat what comes per query head, per kv head or once for each query head."""
        heads = x.shape[1]
        if heads == num_q_heads:
            return x
        return x.expand(-1, num_q_heads, -1) if heads == 1 else x.repeat_interleave(group, 1)

    idx = per_q_head(kept_idx.long())
    listed = (idx >= 0) & (idx < kv_len)
    if kv_lens is not None:
        listed &= idx < kv_lens.long()[:, None, None]
    idx = torch.where(listed, idx, torch.zeros_like(idx))
    if page_table is not None and kv_len:
        listed &= on_page[:, None].expand(-1, num_q_heads, -1).gather(2, idx)

    def rows(x: Tensor) -> Tensor:
        """Gather the listed rows, [batch_size, num_q_heads, k, dim] float64; zeros where nothing is listed."""
        if kv_len == 0:
            return x.new_zeros((*idx.shape, x.shape[3]), dtype=torch.float64)
        heads = torch.arange(num_q_heads, device=x.device)[None, :, None] // group
        batch = torch.arange(batch_size, device=x.device)[:, None, None]
        found = x[batch, heads, idx]
        return torch.where(listed[..., None], found, torch.zeros_like(found)).double()

    logits = (q.double() @ rows(k).transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if key_bias is not None and kv_len:
        bias = per_q_head(key_bias.double()).gather(2, idx)
        logits = logits + torch.where(listed, bias, torch.zeros_like(bias))[:, :, None]
    logits = logits.masked_fill(~listed[:, :, None], -torch.inf)
    lse = logits.logsumexp(3)
    weight = (logits - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)[..., None]).exp()
    result, lse = (weight @ rows(v)).to(q.dtype), lse.float()
    if out is not None:
        out[0].copy_(result)
        out[1].copy_(lse)
        result, lse = out
    return (result, lse) if return_lse else result


@torch.library.register_fake("tokred::attend_selected")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_idx: Tensor,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    for x in (k, v, kept_idx, page_table, kv_lens, key_bias):
        if x is not None and x.device != q.device:
            raise RuntimeError(
                f"attend_selected: expected every tensor on the device of q ({q.device}), got {x.device}"
            )
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("tokred::attend_selected.out")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_idx: Tensor,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    *,
    out: Tensor,
    lse: Tensor,
) -> None:
    return None


_op.no_gradient("attend_selected", "gather the keys and values with torch.gather and use scaled_dot_product_attention")
_op.autocast("attend_selected", 3)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped dimension into the batch; pages have no batch, so paged k and v stay as they are."""
    paged = len(args) > 4 and args[4] is not None  # arguments at their defaults may be left out
    if paged and (in_dims[1] is not None or in_dims[2] is not None):
        raise RuntimeError("attend_selected: paged k and v have no batch dimension and cannot be mapped by vmap")
    folded = []
    for i, (arg, dim) in enumerate(zip(args, in_dims)):
        if isinstance(arg, Tensor) and not (paged and i in (1, 2)):
            arg = arg.unsqueeze(0).expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            arg = arg.flatten(0, 1)
        folded.append(arg)
    out, lse = torch.ops.tokred.attend_selected.default(*folded)
    batch = (info.batch_size, out.shape[0] // info.batch_size)
    return (out.unflatten(0, batch), lse.unflatten(0, batch)), (0, 0)


torch.library.register_vmap("tokred::attend_selected", _vmap)


def floor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_idx: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> _op.Floor:
    """Listed rows of K and V read once per list and kv head, with their biases; lists and q read, out and lse written."""
    batch_size, num_q_heads, q_len, head_dim = q.shape
    num_kv_heads, (list_heads, num_listed) = k.shape[1 if page_table is None else 2], kept_idx.shape[1:]
    dims = head_dim + v.shape[3]
    rows = batch_size * max(list_heads, num_kv_heads) * num_listed
    bias = 0 if key_bias is None else 4 * batch_size * max(list_heads, key_bias.shape[1]) * num_listed
    pages = sum(t.nbytes for t in (page_table, kv_lens) if t is not None)
    moved = rows * dims * k.itemsize + bias + pages + kept_idx.nbytes
    written = batch_size * num_q_heads * q_len * (v.shape[3] * q.itemsize + 4)
    return q.nbytes + moved + written, 2 * batch_size * num_q_heads * q_len * num_listed * dims


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    q, k, v = randn(2, 8, 1, 40, dtype=dtype), randn(2, 2, 50, 40, dtype=dtype), randn(2, 2, 50, 24, dtype=dtype)
    kept_idx = randn(2, 2, 50).argsort()[..., :21].contiguous()
    kept_idx[0, 1, 5:] = -1
    pages, pages_v = randn(9, 16, 2, 40, dtype=dtype), randn(9, 16, 2, 24, dtype=dtype)
    page_table = torch.tensor([[3, 0, 8, -1], [1, 2, 5, 7]], dtype=torch.int32, device=device)
    lens = torch.tensor([40, 64], dtype=torch.int32, device=device)
    return [
        ((q, k, v, kept_idx), {}),
        ((q, k, v, kept_idx[:, :1].contiguous()), {"key_bias": randn(2, 8, 50), "scale": 0.3, "return_lse": True}),
        ((q, pages, pages_v, kept_idx.int()), {"page_table": page_table, "kv_lens": lens}),
    ]
