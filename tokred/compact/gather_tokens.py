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
            head.
        out: Contiguous tensors to write to, for example the buffers of a captured graph; not differentiable.

    Returns:
        The gathered tensors, with ``k`` in place of ``num_tokens``; ``out`` itself when given.

    Deterministic; shapes depend on shapes alone. Differentiable in every tensor: the backward adds gradients of repeated
    ids in list order (float32, float16 and bfloat16; by ``torch.scatter_add`` for float64).

    Example:
        >>> x, position_ids = torch.randn(1, 6, 8), torch.arange(6)[None]
        >>> x_kept, positions_kept = tokred.gather_tokens([x, position_ids], torch.tensor([[4, 0, -1]]))
        >>> positions_kept.tolist()
        [[4, 0, 0]]
    """
    if dims is None:
        dims = kept_idx.dim() - 1
    dims = [dims] * len(tensors) if isinstance(dims, int) else list(dims)
    if out is None:
        return torch.ops.tokred.gather_tokens.default(list(tensors), kept_idx, dims)
    torch.ops.tokred.gather_tokens.out(list(tensors), kept_idx, dims, out=list(out))
    return list(out)


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
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Define gather_tokens in plain PyTorch; tests and benchmarks measure against this."""
    if dims is None:
        dims = kept_idx.dim() - 1
    gathered = []
    for x, dim in zip(tensors, [dims] * len(tensors) if isinstance(dims, int) else dims):
        lists = kept_idx if dim == kept_idx.dim() - 1 else kept_idx[:, None].expand(-1, x.shape[1], -1)
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


@torch.library.register_fake("tokred::gather_tokens")
def _(tensors: list[Tensor], kept_idx: Tensor, dims: list[int]) -> list[Tensor]:
    k = kept_idx.shape[-1]
    return [t.new_empty((*t.shape[:dim], k, *t.shape[dim + 1 :])) for t, dim in zip(tensors, dims)]


@torch.library.register_fake("tokred::gather_tokens.out")
def _(tensors: list[Tensor], kept_idx: Tensor, dims: list[int], *, out: list[Tensor]) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, kept_idx, dims = inputs
    ctx.dims, ctx.num_tokens = dims, [t.shape[dim] for t, dim in zip(tensors, dims)]
    ctx.needs = [t.requires_grad for t in tensors]
    ctx.save_for_backward(kept_idx)


def _backward(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    (kept_idx,) = ctx.saved_tensors

    def back(grad: Tensor, dim: int, num_tokens: int) -> Tensor:
        if dim == 1:
            return scatter_rows(grad, kept_idx, num_tokens)
        heads = grad.shape[1]
        lists = kept_idx if kept_idx.dim() == 3 else kept_idx[:, None].expand(-1, heads, -1)
        return scatter_rows(grad.flatten(0, 1), lists.flatten(0, 1).contiguous(), num_tokens).unflatten(0, (-1, heads))

    parts = zip(grads, ctx.dims, ctx.num_tokens, ctx.needs)
    return [back(g, d, n) if need and g is not None else None for g, d, n, need in parts], None, None


torch.library.register_autograd("tokred::gather_tokens", _backward, setup_context=_setup)
_op.fold_vmap("gather_tokens")


def floor(
    tensors: Sequence[Tensor],
    kept_idx: Tensor,
    *,
    dims: int | Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> _op.Floor:
    """Listed rows read and written, the list read once; repeats count each time, -1 as a row."""
    if dims is None:
        dims = kept_idx.dim() - 1
    dims = [dims] * len(tensors) if isinstance(dims, int) else list(dims)
    moved = sum(t.nbytes // max(t.shape[dim], 1) * kept_idx.shape[-1] for t, dim in zip(tensors, dims))
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
    ]
