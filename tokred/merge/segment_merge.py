# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_merge: tokens that share a destination become one."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from tokred import _op, _ragged

Mode = Literal["mean", "sum", "max"]


@overload
def segment_merge(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: Mode = "mean",
    src_idx: Tensor | None = None,
    others: None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def segment_merge(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: Mode = "mean",
    src_idx: Tensor | None = None,
    others: Sequence[Tensor],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]: ...
def segment_merge(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: Mode = "mean",
    src_idx: Tensor | None = None,
    others: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Any, ...]:
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
        src_idx: int64 or int32, contiguous, the shape of ``dst_idx``: many-to-many. Then ``dst_idx``, ``src_idx``, ``weight``
            and ``size`` are ``[batch_size, num_entries]``, and entry ``e`` adds token ``src_idx[b, e]`` to row
            ``dst_idx[b, e]``, for every token any number of times; read "entry" for "token" in all else. An entry with an
            id outside on either side is dropped.
        others: More tensors ``[batch_size, num_tokens, any]``, of any of the three dtypes each, merged alike with the same
            weights, for example positions.
        cu_seqlens: ``[batch_size + 1]`` int32: packed sequences. Then ``x`` is ``[total_tokens, dim]``, ``others``
            ``[total_tokens, any]``, ``dst_idx``, ``weight`` and ``size`` are ``[total_tokens]``, and ``dst_idx`` counts the
            output rows of a token's own sequence. Not with ``src_idx``.

    Returns:
        ``(merged, size_out)``, and with ``others`` the list of them merged.

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

    Rules that give single members a weight of their own (an anchor, the order) are sums with the weights of ``merge_weight``.

    The size-weighted mean is the merge of "Token Merging: Your ViT But Faster" (section 3); weights apart from sizes
    are those of "Multi-criteria Token Fusion with One-step-ahead Attention".

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> dst_idx, size = torch.tensor([[0, 1, 0, -1]]), torch.tensor([[1.0, 1.0, 3.0, 1.0]])
        >>> merged, size_out = tokred.segment_merge(x, dst_idx, 2, size=size)
        >>> merged.flatten().tolist(), size_out.tolist()
        ([3.25, 2.0], [[4.0, 1.0]])
    """
    if cu_seqlens is not None:
        return _packed(x, dst_idx, num_out, weight, size, mode, src_idx, others, cu_seqlens)
    if others is None and src_idx is None:
        return torch.ops.tokred.segment_merge.default(x, dst_idx, num_out, weight, size, mode)
    out = torch.ops.tokred.segment_merge.many(x, list(others or ()), dst_idx, num_out, weight, size, src_idx, mode)
    return out[:2] if others is None else out


def _packed(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    weight: Tensor | None,
    size: Tensor | None,
    mode: Mode,
    src_idx: Tensor | None,
    others: Sequence[Tensor] | None,
    cu_seqlens: Tensor,
) -> tuple[Any, ...]:
    """Merge packed sequences as one long one, in which each has rows of its own: an output row only sees its members."""
    if src_idx is not None:
        raise RuntimeError("segment_merge: expected src_idx=None with cu_seqlens, got a tensor")
    if x.dim() != 2 or dst_idx.shape != x.shape[:1]:
        raise RuntimeError(
            "segment_merge: expected x of shape [total_tokens, dim] and dst_idx of shape [total_tokens] with cu_seqlens, "
            f"got {list(x.shape)} and {list(dst_idx.shape)}"
        )
    batch_size = cu_seqlens.shape[0] - 1
    sequence, inside = _ragged.sequence_of("segment_merge", cu_seqlens, x.shape[0])
    kept = inside & (dst_idx >= 0) & (dst_idx < num_out)
    row = torch.where(kept, dst_idx + sequence * num_out, -1)

    def long(t: Tensor) -> Tensor:
        return t.unsqueeze(0)

    merged, size_out, *rest = segment_merge(
        long(x),
        long(row),
        batch_size * num_out,
        weight=None if weight is None else long(weight),
        size=None if size is None else long(size),
        mode=mode,
        others=[long(t) for t in others or ()],
    )
    out = [t[0].unflatten(0, (batch_size, num_out)) for t in (merged, size_out, *rest[0])]
    return (out[0], out[1]) if others is None else (out[0], out[1], out[2:])


def reference(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: str = "mean",
    src_idx: Tensor | None = None,
    others: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Any, ...]:
    """Define segment_merge in plain PyTorch; tests and benchmarks measure against this. float64 stays float64."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = [
            reference(
                x[None, a:e],
                dst_idx[None, a:e],
                num_out,
                weight=None if weight is None else weight[None, a:e],
                size=None if size is None else size[None, a:e],
                mode=mode,
                others=[t[None, a:e] for t in others or ()],
            )
            for a, e in itertools.pairwise(ends)
        ]
        joined = [torch.cat([part[i] for part in parts]) for i in (0, 1)]
        return *joined, *(() if others is None else ([torch.cat(o) for o in zip(*(part[2] for part in parts))],))
    if src_idx is not None:  # the token of each entry, a row of its own
        kept = (src_idx >= 0) & (src_idx < x.shape[1])
        rows = torch.where(kept, src_idx, 0).long()[..., None]
        dst_idx = torch.where(kept, dst_idx, -1)
        x, *taken = (
            t.gather(1, rows.expand(-1, -1, t.shape[2])) if t.shape[1] else t.new_zeros((*rows.shape[:2], t.shape[2]))
            for t in (x, *(others or ()))
        )
        others = None if others is None else taken
    if others is not None:
        first, *rest = (reference(t, dst_idx, num_out, weight=weight, size=size, mode=mode) for t in (x, *others))
        return *first, [merged for merged, _ in rest]
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


@torch.library.register_fake("tokred::segment_merge.many")
def _(
    x: Tensor,
    others: list[Tensor],
    dst_idx: Tensor,
    num_out: int,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    src_idx: Tensor | None = None,
    mode: str = "mean",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = (x.shape[0], num_out)
    merged = [t.new_empty((*shape, t.shape[2])) for t in (x, *others)]
    return merged[0], x.new_empty(shape, dtype=torch.float32), merged[1:]


def _rows(value: Tensor, dst_idx: Tensor) -> Tensor:
    """Give each token the number of its output row, 0 to dropped ones: ``[batch_size, num_out]`` to tokens."""
    return torch.ops.tokred.segment_expand.default(value[..., None], dst_idx)[..., 0]


def _save(
    ctx: Any,
    tensors: Sequence[Tensor],
    merged: Sequence[Tensor],
    dst_idx: Tensor,
    src_idx: Tensor | None,
    weight: Tensor | None,
    size: Tensor | None,
    size_out: Tensor,
) -> None:
    # torch passes no trailing arguments that have their default value, so ctx.needs_input_grad may be short.
    ctx.need_x = [t.requires_grad for t in tensors]
    ctx.num_tokens = tensors[0].shape[1]
    ctx.need_size = size is not None and size.requires_grad
    ctx.size_weighs = ctx.mode == "mean" and weight is None and size is not None
    ctx.need_factor = ctx.need_size if ctx.size_weighs else weight is not None and weight.requires_grad
    factor = size if ctx.size_weighs else weight
    is_max = ctx.mode == "max"
    ctx.save_for_backward(
        dst_idx,
        src_idx,
        factor,
        size_out,
        *(tensors if ctx.need_factor or is_max else ()),
        *(merged if is_max else ()),
    )
    if not ctx.need_size:
        ctx.mark_non_differentiable(size_out)


def _back(ctx: Any, grads: Sequence[Tensor | None], grad_size_out: Tensor) -> tuple[list[Any], Any, Any]:
    """Return the gradients of the tensors, of weight and of size."""
    dst_idx, src_idx, factor, size_out, *saved = ctx.saved_tensors
    merge, expand = torch.ops.tokred.segment_merge.default, torch.ops.tokred.segment_expand.default
    if src_idx is not None:  # an entry without a token goes nowhere
        dst_idx = torch.where((src_idx >= 0) & (src_idx < ctx.num_tokens), dst_idx.long(), -1)

    def of_tokens(x: Tensor) -> Tensor:  # what the entries are made of
        return x if src_idx is None else expand(x, src_idx)

    def to_tokens(entries: Tensor) -> Tensor:  # and back
        return entries if src_idx is None else merge(entries, src_idx, ctx.num_tokens, None, None, "sum")[0]

    num_tensors = len(ctx.need_x)
    share: Any = None
    total: Any = None
    live: Any = None
    dot: Any = None
    if ctx.mode != "max" and factor is not None:
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
    grad_tensors: list[Any] = []
    for i, (grad, need_x) in enumerate(zip(grads, ctx.need_x)):
        if grad is None:
            grad_tensors.append(None)
            continue
        grad, grad_x = grad.contiguous(), None
        if ctx.mode == "max":
            if need_x:
                x, merged = of_tokens(saved[i]), saved[num_tensors + i]
                hit = (x == expand(merged, dst_idx)).float()
                num_hits = merge(hit, dst_idx, ctx.num_out, None, None, "sum")[0].clamp(min=1)
                grad_x = to_tokens((hit * expand(grad / num_hits, dst_idx)).to(x.dtype))
        elif share is None:
            # In a mean, size_out is the count here unless size stands beside weight, and then factor is weight.
            shared = grad if ctx.mode == "sum" else (grad / size_out.clamp(min=1)[..., None]).to(grad.dtype)
            grad_x = to_tokens(expand(shared, dst_idx)) if need_x else None
        else:
            of_row = expand(grad, dst_idx)
            if need_x:
                grad_x = to_tokens((share[..., None] * of_row).to(grad.dtype))
            if ctx.need_factor:
                products = (of_tokens(saved[i]).float() * of_row.float()).sum(-1)
                dot = products if dot is None else dot + products
        grad_tensors.append(grad_x)
    grad_factor = None
    if dot is not None:
        kept = (dst_idx >= 0) & (dst_idx < ctx.num_out)
        grad_factor = dot = torch.where(kept, dot, 0)
        if ctx.mode == "mean":
            # d merged / d w_i = (x_i - mean) / W; the mean of the dot products is exact where merged was rounded.
            mean = merge(dot[..., None], dst_idx, ctx.num_out, factor, None, "mean")[0][..., 0]
            grad_factor = torch.where(live, (dot - _rows(mean, dst_idx)) / total, 0)
    grad_size = _rows(grad_size_out.contiguous(), dst_idx) if ctx.need_size else None
    if ctx.size_weighs and grad_size is not None and grad_factor is not None:
        grad_size = grad_size + grad_factor
    return grad_tensors, None if ctx.size_weighs else grad_factor, grad_size


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dst_idx, ctx.num_out, weight, size, ctx.mode = inputs
    _save(ctx, [x], [output[0]], dst_idx, None, weight, size, output[1])


def _backward(ctx: Any, grad: Tensor, grad_size_out: Tensor) -> tuple[Tensor | None, ...]:
    (grad_x,), grad_weight, grad_size = _back(ctx, [grad], grad_size_out)
    return grad_x, None, None, grad_weight, grad_size, None


def _setup_many(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    x, others, dst_idx, ctx.num_out, weight, size, src_idx, ctx.mode = inputs
    merged, size_out, others_merged = output
    _save(ctx, [x, *others], [merged, *others_merged], dst_idx, src_idx, weight, size, size_out)


def _backward_many(ctx: Any, grad: Tensor, grad_size_out: Tensor, grad_others: list[Any]) -> tuple[Any, ...]:
    (grad_x, *of_others), grad_weight, grad_size = _back(ctx, [grad, *grad_others], grad_size_out)
    return (grad_x, of_others, None, None, grad_weight, grad_size, None, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("tokred::segment_merge", _backward, setup_context=_setup)
torch.library.register_autograd("tokred::segment_merge.many", _backward_many, setup_context=_setup_many)
_op.fold_vmap("segment_merge")
_op.fold_vmap("segment_merge.many")


def floor(
    x: Tensor,
    dst_idx: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: str = "mean",
    src_idx: Tensor | None = None,
    others: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> _op.Floor:
    """Tokens, map, weights and sizes read once; output rows and their float32 sizes written."""
    batch_size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensors = (x, *(others or ()))
    given = (dst_idx, weight, size, src_idx, cu_seqlens)
    read = sum(t.nbytes for t in (*tensors, *given) if t is not None)
    return read + batch_size * num_out * (sum(t.shape[-1] * t.itemsize for t in tensors) + 4), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x = randn(2, 13, 24, dtype=dtype)
    dst_idx = torch.tensor([[0, 1, 1, 4, -1, 2, 0, 0, 5, 9, 1, 5, 4], [3] * 13], device=device)
    weight, size = randn(2, 13).exp(), randn(2, 13).abs() + 1
    rows, tokens = (torch.arange(40, device=device).reshape(2, 20) % n for n in (7, 15))
    cu_seqlens = torch.tensor([0, 5, 5, 26], dtype=torch.int32, device=device)
    return [
        ((x, dst_idx, 6), {}),
        ((x, dst_idx, 6), {"size": size}),
        ((x, dst_idx.int(), 6), {"weight": weight, "size": size}),
        ((x, dst_idx, 6), {"weight": weight, "mode": "sum"}),
        ((x, dst_idx, 6), {"mode": "max"}),
        ((x, dst_idx, 0), {}),
        ((x, rows, 6), {"src_idx": tokens, "weight": randn(2, 20).exp(), "mode": "sum"}),
        ((x, dst_idx, 6), {"size": size, "others": [randn(2, 13, 3), x[:, :, :8]]}),
        ((x.flatten(0, 1), dst_idx.flatten(), 6), {"size": size.flatten(), "cu_seqlens": cu_seqlens}),
    ]
