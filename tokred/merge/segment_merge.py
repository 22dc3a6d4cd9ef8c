# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_merge: tokens that share a destination become one."""

from typing import Any, Literal

import torch
from torch import Tensor

from tokred import _op

Mode = Literal["mean", "sum", "max"]


def segment_merge(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: Mode = "mean",
) -> tuple[Tensor, Tensor]:
    """Merge the tokens that ``dst_idx`` sends to the same output row into one, and add up their sizes.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, float32, float16 or bfloat16; any strides, the last dimension
            contiguous.
        dst_idx: ``[batch_size, num_tokens]`` int64 or int32, contiguous: the output row of each token. A token whose
            id is outside ``[0, num_out)`` (-1 by convention) is dropped.
        num_out: How many output rows each sequence gets.
        weight: ``[batch_size, num_tokens]`` float32: what a token counts for in the mean or sum. Of any sign.
        size: ``[batch_size, num_tokens]`` float32: how many original tokens a token stands for; None is one each.
        mode: ``"mean"``: ``sum(w / W * x)`` with ``W = sum(w)`` over the members of a row, where ``w`` is ``weight`` if
            given, else ``size`` if given, else 1. ``"sum"``: ``sum(w * x)`` with ``w = weight``, else 1; ``size`` is
            added up but does not weigh. ``"max"``: elementwise maximum; ``weight`` must be None.

    Returns:
        ``(merged, size_out)``.

        - ``merged``: ``[batch_size, num_out, dim]``, the dtype of ``x``, accumulated in float32 and rounded once.
        - ``size_out``: ``[batch_size, num_out]`` float32, the sum of ``size`` (without it, the number) of the members.

    A row without members is 0 with size 0; so is the mean of a row whose weights sum to exactly 0. A row with one
    member is that token bit for bit, in a sum without weights, a maximum, or a mean whose weight is finite and not 0.
    NaN propagates, in the maximum too. Members are added in ascending token order, so the result is deterministic and
    does not depend on the batch; devices may differ in the last bit (fused multiply-add). Shapes depend on shapes and
    ``num_out`` alone.

    Differentiable in ``x``, ``weight`` and ``size``. A maximum's gradient is split evenly among the members that equal
    it, as ``torch.amax`` does; where the maximum is NaN it is 0. Memory beyond the outputs: one int32 per token and
    output row; backward takes a few tensors as large as ``x``.

    The size-weighted mean is the merge of "Token Merging: Your ViT But Faster" (section 3); weights apart from sizes
    are those of "Multi-criteria Token Fusion with One-step-ahead Attention".

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> dst_idx, size = torch.tensor([[0, 1, 0, -1]]), torch.tensor([[1.0, 1.0, 3.0, 1.0]])
        >>> merged, size_out = tokred.segment_merge(x, dst_idx, 2, size=size)
        >>> merged.flatten().tolist(), size_out.tolist()
        ([3.25, 2.0], [[4.0, 1.0]])
    """
    return torch.ops.tokred.segment_merge.default(x, dst_idx, num_out, weight, size, mode)


def reference(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: Mode = "mean",
) -> tuple[Tensor, Tensor]:
    """Define segment_merge in plain PyTorch; tests and benchmarks measure against this. float64 stays float64."""
    kept = (dst_idx >= 0) & (dst_idx < num_out)
    dst = torch.where(kept, dst_idx.long(), num_out)  # dropped tokens go to a row of their own, cut off below
    value = x if x.dtype == torch.float64 else x.float()

    def total(t: Tensor) -> Tensor:  # [batch_size, num_tokens, d] to [batch_size, num_out + 1, d]
        out = t.new_zeros((t.shape[0], num_out + 1, t.shape[2]))
        return out.scatter_add(1, dst[..., None].expand_as(t), t)

    ones = value.new_ones(dst.shape)
    size_out = total((ones if size is None else size)[..., None])[:, :num_out, 0]
    if mode == "max":
        lowest = value.new_full((x.shape[0], num_out + 1, x.shape[2]), -torch.inf)
        top = lowest.scatter_reduce(1, dst[..., None].expand_as(value), value, "amax", include_self=False)
        empty = total(ones[..., None]) == 0
        return torch.where(empty, 0, top)[:, :num_out].to(x.dtype), size_out
    if mode == "mean":
        w = weight if weight is not None else size if size is not None else ones
        sums = total(w[..., None])[..., 0].gather(1, dst)  # each token's W
        zero = sums == 0
        terms = torch.where(zero, 0, w / torch.where(zero, 1, sums))[..., None] * value
        terms = torch.where(zero[..., None], 0, terms)
    else:
        terms = (ones if weight is None else weight)[..., None] * value
    return total(terms)[:, :num_out].to(x.dtype), size_out


@torch.library.register_fake("tokred::segment_merge")
def _(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: str = "mean",
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], num_out)
    return x.new_empty((*shape, x.shape[2])), x.new_empty(shape, dtype=torch.float32)


def _rows(value: Tensor, dst_idx: Tensor) -> Tensor:
    """Give each token the number of its output row, 0 to dropped ones: ``[batch_size, num_out]`` to tokens."""
    return torch.ops.tokred.segment_expand.default(value[..., None], dst_idx)[..., 0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dst_idx, ctx.num_out, weight, size, ctx.mode = inputs
    merged, size_out = output
    # torch passes no trailing arguments that have their default value, so ctx.needs_input_grad may be short.
    ctx.need_size = size is not None and size.requires_grad
    ctx.size_weighs = ctx.mode == "mean" and weight is None and size is not None
    ctx.need_factor = ctx.need_size if ctx.size_weighs else weight is not None and weight.requires_grad
    keep_x = x if ctx.need_factor or ctx.mode == "max" else None
    factor = size if ctx.size_weighs else weight
    ctx.save_for_backward(dst_idx, keep_x, factor, merged if ctx.mode == "max" else None, size_out)
    if not ctx.need_size:
        ctx.mark_non_differentiable(size_out)


def _backward(ctx: Any, grad: Tensor, grad_size_out: Tensor) -> tuple[Tensor | None, ...]:
    dst_idx, x, factor, merged, size_out = ctx.saved_tensors
    merge, expand = torch.ops.tokred.segment_merge.default, torch.ops.tokred.segment_expand.default
    grad = grad.contiguous()
    need_x = ctx.needs_input_grad[0]
    grad_x = grad_factor = None
    if ctx.mode == "max":
        if need_x:
            hit = (x == expand(merged, dst_idx)).float()
            num_hits = merge(hit, dst_idx, ctx.num_out, None, None, "sum")[0].clamp(min=1)
            grad_x = (hit * expand(grad / num_hits, dst_idx)).to(x.dtype)
    elif factor is None:
        # In a mean, size_out is the count here unless size stands beside weight, and then factor is weight.
        shared = grad if ctx.mode == "sum" else (grad / size_out.clamp(min=1)[..., None]).to(grad.dtype)
        grad_x = expand(shared, dst_idx) if need_x else None
    else:
        of_row = expand(grad, dst_idx)
        share = factor
        if ctx.mode == "mean":  # w / W, and 0 where W is 0: dropped tokens, and rows whose weights cancel
            if ctx.size_weighs:
                total = size_out
            else:
                total = merge(factor[..., None], dst_idx, ctx.num_out, None, None, "sum")[0][..., 0]
            total = _rows(total, dst_idx)
            live = total != 0
            total = torch.where(live, total, 1)
            share = torch.where(live, factor / total, 0)
        if need_x:
            grad_x = (share[..., None] * of_row).to(grad.dtype)
        if ctx.need_factor:
            kept = (dst_idx >= 0) & (dst_idx < ctx.num_out)
            dot = torch.where(kept, (x.float() * of_row.float()).sum(-1), 0)
            grad_factor = dot
            if ctx.mode == "mean":
                # d merged / d w_i = (x_i - mean) / W; the mean of the dot products is exact where merged was rounded.
                mean = merge(dot[..., None], dst_idx, ctx.num_out, factor, None, "mean")[0][..., 0]
                grad_factor = torch.where(live, (dot - _rows(mean, dst_idx)) / total, 0)
    grad_size = _rows(grad_size_out.contiguous(), dst_idx) if ctx.need_size else None
    if ctx.size_weighs and grad_size is not None and grad_factor is not None:
        grad_size = grad_size + grad_factor
    return grad_x, None, None, None if ctx.size_weighs else grad_factor, grad_size, None


torch.library.register_autograd("tokred::segment_merge", _backward, setup_context=_setup)
_op.fold_vmap("segment_merge")


def floor(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: str = "mean",
) -> _op.Floor:
    """Tokens, map, weights and sizes read once; output rows and their float32 sizes written."""
    batch_size, _, dim = x.shape
    read = sum(t.nbytes for t in (x, dst_idx, weight, size) if t is not None)
    return read + batch_size * num_out * (dim * x.itemsize + 4), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x = randn(2, 13, 24, dtype=dtype)
    dst_idx = torch.tensor([[0, 1, 1, 4, -1, 2, 0, 0, 5, 9, 1, 5, 4], [3] * 13], device=device)
    weight, size = randn(2, 13).exp(), randn(2, 13).abs() + 1
    return [
        ((x, dst_idx, 6), {}),
        ((x, dst_idx, 6), {"size": size}),
        ((x, dst_idx.int(), 6), {"weight": weight, "size": size}),
        ((x, dst_idx, 6), {"weight": weight, "mode": "sum"}),
        ((x, dst_idx, 6), {"mode": "max"}),
        ((x, dst_idx, 0), {}),
    ]
