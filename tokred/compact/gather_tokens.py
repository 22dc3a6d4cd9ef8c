# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""gather_tokens: many tensors by one index list."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import _op

_MERGEABLE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of the deterministic scatter-add


def gather_tokens(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    dims: int | Sequence[int] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gather the listed tokens of several tensors at once: hidden states, positions, masks, K, V.

    Args:
        tensors: Any number of tensors of any dtype: ``[batch_size, num_tokens, ...]`` (token dimension 1) or
            ``[batch_size, num_heads, num_tokens, ...]`` (token dimension 2), by strides; what follows the token dimension
            is contiguous. Up to 16 share one launch on CUDA.
        kept_idx: ``[batch_size, k]``, shared by all heads, or ``[batch_size, num_heads, k]``, a list per head; int64 or
            int32. Ids outside ``[0, num_tokens)``, usually -1, give rows of zeros. Any order, repeats allowed.
        dims: The token dimension of each tensor, 1 or 2, or one for all; by default 1 for shared lists and 2 for lists per
            head. -2 for ``[num_axes, batch_size, num_tokens, ...]``, position ids of several axes with their cos and sin: the
            result is such a view.
        keep_first: So many tokens at the start of each sequence are kept in front of the listed ones: a system prompt. Ids
            count from the first token behind them.
        keep_last: So many at the end, behind the listed ones: the text after an image. An id that reaches them is outside.
        out: Contiguous tensors to write to, for example the buffers of a captured graph; not differentiable. With
            axes first it is the transpose of a contiguous tensor that is written to.

    Returns:
        The gathered tensors, with ``keep_first + k + keep_last`` in place of ``num_tokens``; ``out`` itself when given.

    Deterministic; shapes depend on shapes alone. Differentiable in every tensor: the backward adds gradients of repeated
    ids in list order (float32, float16 and bfloat16; by ``torch.scatter_add`` for float64).

    Example:
        >>> x, position_ids = torch.randn(1, 6, 8), torch.arange(6)[None]
        >>> x_kept, positions_kept = tokred.gather_tokens([x, position_ids], torch.tensor([[4, 0, -1]]))
        >>> positions_kept.tolist()
        [[4, 0, 0]]
    """
    dims = token_dims(tensors, kept_idx, dims)
    if -2 in dims:
        by_batch = [2 if dim == -2 else dim for dim in dims]
        into = None if out is None else _swap_axes(out, dims)
        gathered = gather_tokens(
            _swap_axes(tensors, dims), kept_idx, dims=by_batch, keep_first=keep_first, keep_last=keep_last, out=into
        )
        return _swap_axes(gathered, dims) if out is None else list(out)
    if out is not None:
        torch.ops.tokred.gather_tokens.out(list(tensors), kept_idx, dims, keep_first, keep_last, out=list(out))
        return list(out)
    if keep_first or keep_last:
        return torch.ops.tokred.gather_tokens.spans(list(tensors), kept_idx, dims, keep_first, keep_last)
    return torch.ops.tokred.gather_tokens.default(list(tensors), kept_idx, dims)


def _swap_axes(tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Exchange axes and batch of those that have the axes first."""
    axes_first = [dim == -2 for dim in dims] + [False] * len(tensors)
    return [t.transpose(0, 1) if first and t.dim() > 1 else t for t, first in zip(tensors, axes_first)]


def token_dims(tensors: Sequence[Tensor], kept_idx: Tensor, dims: int | Sequence[int] | None) -> list[int]:
    """Return the token dimension of each tensor."""
    if dims is None:
        dims = kept_idx.dim() - 1
    return [dims] * len(tensors) if isinstance(dims, int) else list(dims)


def with_spans(kept_idx: Tensor, num_tokens: int, keep_first: int, keep_last: int) -> Tensor:
    """Return the lists of what is kept in all, in positions of the sequence: both ends, and the listed ones between."""
    inside = (kept_idx >= 0) & (kept_idx < num_tokens - keep_first - keep_last)
    first = torch.arange(keep_first, device=kept_idx.device).expand(*kept_idx.shape[:-1], -1)
    last = torch.arange(num_tokens - keep_last, num_tokens, device=kept_idx.device).expand(*kept_idx.shape[:-1], -1)
    return torch.cat([first, torch.where(inside, kept_idx + keep_first, -1), last], -1)


def scatter_rows(grad: Tensor, kept_idx: Tensor, num_tokens: int) -> Tensor:
    """Add rows ``[batch_size, k, ...]`` into zeros ``[batch_size, num_tokens, ...]`` at ``kept_idx``, in list order.

    Ids outside ``[0, num_tokens)`` are left out.
    """
    tail = grad.shape[2:]
    rows = grad.flatten(2) if tail else grad.unsqueeze(2)
    if grad.dtype in _MERGEABLE:
        out = torch.ops.tokred.segment_merge.default(rows.contiguous(), kept_idx, num_tokens, None, None, "sum")[0]
    else:
        valid = (kept_idx >= 0) & (kept_idx < num_tokens)
        slot = torch.where(valid, kept_idx, num_tokens).long()[..., None].expand_as(rows)
        out = rows.new_zeros((rows.shape[0], num_tokens + 1, rows.shape[2])).scatter_add(1, slot, rows)[:, :num_tokens]
    return out.reshape(grad.shape[0], num_tokens, *tail)


def reference(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    dims: int | Sequence[int] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Define gather_tokens in plain PyTorch; tests and benchmarks measure against this."""
    gathered = []
    for x, dim in zip(tensors, token_dims(tensors, kept_idx, dims)):
        if dim == -2:
            by_axis = reference([*x], kept_idx, dims=1, keep_first=keep_first, keep_last=keep_last)
            gathered.append(torch.stack(by_axis))
            continue
        lists = kept_idx if dim == kept_idx.dim() - 1 else kept_idx[:, None].expand(-1, x.shape[1], -1)
        if keep_first or keep_last:
            lists = with_spans(lists, x.shape[dim], keep_first, keep_last)
        valid = (lists >= 0) & (lists < x.shape[dim])
        tail = (1,) * (x.dim() - dim - 1)
        index = (
            torch.where(valid, lists, 0).long().reshape(*lists.shape, *tail).expand(*lists.shape, *x.shape[dim + 1 :])
        )
        if x.shape[dim] == 0:
            gathered.append(x.new_zeros(index.shape))
            continue
        rows = x.gather(dim, index)
        gathered.append(torch.where(valid.reshape(*lists.shape, *tail), rows, torch.zeros_like(rows)))
    if out is None:
        return gathered
    for target, value in zip(out, gathered):
        target.copy_(value)
    return list(out)


def _gathered_like(tensors: list[Tensor], dims: list[int], k: int) -> list[Tensor]:
    return [t.new_empty((*t.shape[:dim], k, *t.shape[dim + 1 :])) for t, dim in zip(tensors, dims)]


@torch.library.register_fake("tokred::gather_tokens")
def _(tensors: list[Tensor], kept_idx: Tensor, dims: list[int]) -> list[Tensor]:
    return _gathered_like(tensors, dims, kept_idx.shape[-1])


@torch.library.register_fake("tokred::gather_tokens.spans")
def _(tensors: list[Tensor], kept_idx: Tensor, dims: list[int], keep_first: int, keep_last: int) -> list[Tensor]:
    return _gathered_like(tensors, dims, keep_first + kept_idx.shape[-1] + keep_last)


@torch.library.register_fake("tokred::gather_tokens.out")
def _(
    tensors: list[Tensor],
    kept_idx: Tensor,
    dims: list[int],
    keep_first: int = 0,
    keep_last: int = 0,
    *,
    out: list[Tensor],
) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, kept_idx, dims, *ctx.spans = inputs
    ctx.dims, ctx.num_tokens = dims, [t.shape[dim] for t, dim in zip(tensors, dims)]
    ctx.needs = [t.requires_grad for t in tensors]
    ctx.save_for_backward(kept_idx)


def _backward(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    (kept_idx,) = ctx.saved_tensors

    def back(grad: Tensor, dim: int, num_tokens: int) -> Tensor:
        lists = with_spans(kept_idx, num_tokens, *ctx.spans) if ctx.spans else kept_idx
        if dim == 1:
            return scatter_rows(grad, lists, num_tokens)
        heads = grad.shape[1]
        if lists.dim() == 2:
            lists = lists[:, None].expand(-1, heads, -1)
        return scatter_rows(grad.flatten(0, 1), lists.flatten(0, 1).contiguous(), num_tokens).unflatten(0, (-1, heads))

    parts = zip(grads, ctx.dims, ctx.num_tokens, ctx.needs)
    of_tensors = [back(g, d, n) if need and g is not None else None for g, d, n, need in parts]
    return of_tensors, None, None, *(None for _ in ctx.spans)


for _name in ("gather_tokens", "gather_tokens.spans"):
    torch.library.register_autograd(f"tokred::{_name}", _backward, setup_context=_setup)
    _op.fold_vmap(_name)


def floor(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    dims: int | Sequence[int] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    out: Sequence[Tensor] | None = None,
) -> _op.Floor:
    """Kept rows read and written, the list read once; repeats count each time, -1 as a row."""
    k = keep_first + kept_idx.shape[-1] + keep_last
    dims = token_dims(tensors, kept_idx, dims)
    moved = sum(t.nbytes // max(t.shape[abs(dim)], 1) * k for t, dim in zip(tensors, dims))
    return kept_idx.nbytes + 2 * moved, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, kv = randn(2, 11, 24, dtype=dtype), randn(2, 3, 11, 8, dtype=dtype)
    positions = torch.arange(22, device=device).reshape(2, 11)
    shared = torch.tensor([[0, 4, 4, -1], [10, 3, 11, 2]], device=device)
    per_head = torch.tensor([0, 5, -1, 10, 2, 7], device=device).reshape(1, 3, 2).expand(2, 3, 2).contiguous()
    return [
        (([x, positions, positions > 5], shared), {}),
        (([x, kv], shared.int()), {"dims": [1, 2]}),
        (([kv, kv], per_head), {}),
        (
            ([x, positions.expand(3, 2, 11)], shared[:, :3].contiguous()),
            {"dims": [1, -2], "keep_first": 2, "keep_last": 1},
        ),
    ]
