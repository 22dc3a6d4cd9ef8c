# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""scatter_tokens: kept rows back at their original places."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import _op
from tokred.compact.gather_tokens import token_dims


def scatter_tokens(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    num_tokens: int | None = None,
    base: Sequence[Tensor] | None = None,
    dims: int | Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Put the rows of several tensors back where an index list took them from: on zeros, over a base, or blended with it.

    The inverse of ``gather_tokens``: a listed token gets ``alpha * row + beta * base row``, every other one its row of the
    base. ``alpha = w, beta = 1 - w`` mixes, ``beta = 1`` adds to a residual stream, the default replaces.

    Args:
        tensors: The kept rows, any number of tensors, ``[batch_size, k, ...]`` (token dimension 1) or
            ``[batch_size, num_heads, k, ...]`` (token dimension 2), by strides; what follows the token dimension is
            contiguous. Any dtype; float32, float16 or bfloat16 when blended. Up to 16 share one launch on CUDA.
        kept_idx: ``[batch_size, k]``, shared by all heads, or ``[batch_size, num_heads, k]``, a list per head; int64 or
            int32, contiguous. Rows of ids outside ``[0, num_tokens)``, usually -1, are left out. Any order; of the slots that
            name the same token the last one of the list counts.
        num_tokens: Tokens of the outputs; by default those of ``base``.
        base: One tensor per tensor, its shape with ``num_tokens`` for ``k``, the same dtype, by strides; zeros by default.
        dims: The token dimension of each tensor, 1 or 2, or one for all; by default 1 for shared lists and 2 for lists per
            head.
        alpha: Factor of the listed rows.
        beta: Factor of the base under them; with 0 the base is not read there. Only with a ``base``.
        out: Contiguous tensors to write to, for example buffers of a captured graph; those of ``base`` themselves make it
            in place. Not differentiable.

    Returns:
        The restored tensors, with ``num_tokens`` in place of ``k``; ``out`` itself when given. Rows are copies; blended values
        are computed in float32 and rounded once.

    Deterministic; shapes depend on shapes and ``num_tokens`` alone. On CUDA, and for the
    backward, four bytes per token of each list are written beside the outputs. Differentiable in ``tensors`` (the backward
    is a gather; slots that did not count get zeros) and in ``base``; vmap folds into the batch.

    The restore step of Token Sparse Attention and SPTS (onto zeros, before the residual) and of caches that are updated in
    part (STC).

    Example:
        >>> x = torch.arange(1.0, 7.0).reshape(1, 6, 1)
        >>> x_kept, kept_idx = tokred.prune_topk(x, x[..., 0], 2)
        >>> tokred.scatter_tokens([10 * x_kept], kept_idx, base=[x])[0].flatten().tolist()
        [1.0, 2.0, 3.0, 4.0, 50.0, 60.0]
    """
    dims = token_dims(tensors, kept_idx, dims)
    if num_tokens is None:
        num_tokens = _num_tokens(base, dims)
    old = None if base is None else list(base)
    if out is None:
        return torch.ops.tokred.scatter_tokens.default(list(tensors), kept_idx, dims, num_tokens, old, alpha, beta)[0]
    torch.ops.tokred.scatter_tokens.out(list(tensors), kept_idx, dims, num_tokens, old, alpha, beta, out=list(out))
    return list(out)


def _num_tokens(base: Sequence[Tensor] | None, dims: list[int]) -> int:
    if not base or not dims or not 0 <= dims[0] < base[0].dim():
        raise RuntimeError("scatter_tokens: expected num_tokens, or a base to take it from")
    return base[0].shape[dims[0]]


def reference(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    num_tokens: int | None = None,
    base: Sequence[Tensor] | None = None,
    dims: int | Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Define scatter_tokens in plain PyTorch; tests and benchmarks measure against this."""
    dims = token_dims(tensors, kept_idx, dims)
    count = _num_tokens(base, dims) if num_tokens is None else num_tokens
    valid = (kept_idx >= 0) & (kept_idx < count)
    places = torch.where(valid, kept_idx, count).long()  # the others share a place behind the last token
    order = torch.arange(kept_idx.shape[-1], device=kept_idx.device).expand_as(places)
    slots = order.new_full((*kept_idx.shape[:-1], count + 1), -1).scatter_reduce(-1, places, order, "amax")[..., :count]
    restored = []
    for i, (x, dim) in enumerate(zip(tensors, dims)):
        slot = slots if dim == slots.dim() - 1 else slots[:, None].expand(-1, x.shape[1], -1)
        slot = slot.reshape(*slot.shape, *(1,) * (x.dim() - dim - 1))
        shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
        old = x.new_zeros(shape) if base is None else base[i]
        padded = torch.cat([x, x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))], dim)  # for an empty list
        rows = padded.gather(dim, slot.clamp(min=0).expand(shape))
        if alpha != 1 or beta != 0:
            rows = alpha * rows.float() + (beta * old.float() if beta else 0)
        restored.append(torch.where(slot >= 0, rows.to(x.dtype), old))
    if out is None:
        return restored
    for target, value in zip(out, restored):
        target.copy_(value)
    return list(out)


@torch.library.register_fake("tokred::scatter_tokens")
def _(
    tensors: list[Tensor],
    kept_idx: Tensor,
    dims: list[int],
    num_tokens: int,
    base: list[Tensor] | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> tuple[list[Tensor], Tensor]:
    out = [t.new_empty((*t.shape[:dim], num_tokens, *t.shape[dim + 1 :])) for t, dim in zip(tensors, dims)]
    return out, kept_idx.new_empty((*kept_idx.shape[:-1], num_tokens), dtype=torch.int32)


@torch.library.register_fake("tokred::scatter_tokens.out")
def _(
    tensors: list[Tensor],
    kept_idx: Tensor,
    dims: list[int],
    num_tokens: int,
    base: list[Tensor] | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    out: list[Tensor],
) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    tensors, kept_idx, dims, _, base, alpha, beta = inputs
    ctx.dims, ctx.alpha, ctx.beta = dims, alpha, beta
    ctx.needs = [t.requires_grad for t in tensors]
    ctx.needs_base = None if base is None else [t.requires_grad for t in base]
    ctx.save_for_backward(kept_idx, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grads: list[Any], _: Any) -> tuple[Any, ...]:
    kept_idx, slot_idx = ctx.saved_tensors
    num_tokens = slot_idx.shape[-1]
    # The lists without the slots that did not count; of an id outside the appended -1 is asked.
    places = torch.where((kept_idx >= 0) & (kept_idx < num_tokens), kept_idx, num_tokens).long()
    order = torch.arange(kept_idx.shape[-1], device=kept_idx.device)
    counts = torch.nn.functional.pad(slot_idx, (0, 1), value=-1).gather(-1, places) == order
    lists = torch.where(counts, kept_idx, -1)

    def of_rows(grad: Tensor, dim: int) -> Tensor:
        rows = torch.ops.tokred.gather_tokens.default([grad], lists, [dim])[0]
        return rows if ctx.alpha == 1 else ctx.alpha * rows

    def of_base(grad: Tensor, dim: int) -> Tensor:
        slot = slot_idx if dim == slot_idx.dim() - 1 else slot_idx[:, None]
        return torch.where(slot.reshape(*slot.shape, *(1,) * (grad.dim() - dim - 1)) < 0, grad, ctx.beta * grad)

    # Gradients may come with any strides; a gather wants whole rows.
    of_tensors = [
        of_rows(g.contiguous(), d) if need and g is not None else None for g, d, need in zip(grads, ctx.dims, ctx.needs)
    ]
    of_bases = None
    if ctx.needs_base is not None:
        parts = zip(grads, ctx.dims, ctx.needs_base)
        of_bases = [of_base(g, d) if need and g is not None else None for g, d, need in parts]
    # torch passes no trailing arguments that have their default value, and wants as many gradients as it passes.
    return (of_tensors, None, None, None, of_bases, None, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("tokred::scatter_tokens", _backward, setup_context=_setup)
_op.fold_vmap("scatter_tokens")


def floor(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    num_tokens: int | None = None,
    base: Sequence[Tensor] | None = None,
    dims: int | Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Sequence[Tensor] | None = None,
) -> _op.Floor:
    """Lists and kept rows read, outputs written, of the base what is not replaced; as if each slot named another token."""
    dims = token_dims(tensors, kept_idx, dims)
    count = _num_tokens(base, dims) if num_tokens is None else num_tokens
    k = min(kept_idx.shape[-1], count)
    moved = 0
    for t, dim in zip(tensors, dims):
        per_slot = t.nbytes // max(t.shape[dim], 1)
        from_base = 0 if base is None else count if beta else count - k
        moved += per_slot * (k + count + from_base)
    return kept_idx.nbytes + moved, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, kv = randn(2, 4, 24, dtype=dtype), randn(2, 3, 4, 8, dtype=dtype)
    base, base_kv = randn(2, 11, 24, dtype=dtype), randn(2, 3, 11, 8, dtype=dtype)
    positions = torch.arange(8, device=device).reshape(2, 4)
    shared = torch.tensor([[0, 4, 4, -1], [10, 3, 11, 2]], device=device)
    per_head = torch.tensor([0, 5, -1, 10, 2, 7], device=device).reshape(1, 3, 2).expand(2, 3, 2).contiguous()
    return [
        (([x, positions, positions > 5], shared), {"num_tokens": 11}),
        (([x, kv], shared.int()), {"dims": [1, 2], "base": [base, base_kv]}),
        (([kv[:, :, :2], kv[:, :, 2:]], per_head), {"base": [base_kv, base_kv], "alpha": 0.25, "beta": 0.75}),
        (([x], shared), {"num_tokens": 11, "alpha": 0.5}),
    ]
