# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pack_tokens: the tokens that a mask keeps, one sequence after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import _op


def pack_tokens(
    tensors: Sequence[Tensor],
    mask: Tensor,
    *,
    max_total: int | None = None,
    exact: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Pack the tokens that a mask keeps, in their order: several tensors at once, with ``cu_seqlens`` for varlen attention.

    How many tokens are kept is known on the device alone, so the outputs have a capacity.

    Args:
        tensors: Any number of tensors of any dtype, ``[batch_size, num_tokens, ...]`` or, packed, ``[total_tokens, ...]``, by
            strides; what follows the token dimension is contiguous. Up to 16 share one launch on CUDA.
        mask: Bool, ``[batch_size, num_tokens]`` or, packed, ``[total_tokens]``, contiguous: true for tokens that are kept.
            Fewer than 2^31 tokens.
        max_total: Capacity of the outputs, at most the tokens of the mask, which is the default. Tokens kept beyond it are
            left out.
        exact: Instead of ``max_total``: read from the device how many tokens are kept, and take that. This waits for the
            device, the shapes depend on data, and neither a CUDA graph nor a full-graph compilation takes it.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.

    Returns:
        ``(packed, kept_rows, cu_seqlens_kept, num_kept)``.

        - ``packed``: the tensors, ``[max_total, ...]``; rows past the kept tokens are zeros.
        - ``kept_rows``: ``[max_total]`` int64, ascending: the row of each kept token in the packed or flattened input
          (``batch_idx * num_tokens + position``), then -1. A list for ``gather_tokens`` and ``scatter_tokens`` on
          ``x.flatten(0, 1)[None]``.
        - ``cu_seqlens_kept``: ``[batch_size + 1]`` int32, where each sequence starts in ``packed``; none beyond ``max_total``.
        - ``num_kept``: ``[batch_size]`` int32, what the mask keeps of each sequence, whether there was room or not: the
          capacity was enough if ``num_kept.sum() == cu_seqlens_kept[-1]``.

    Rows are copies: deterministic, the same bits on every device. Shapes depend on shapes and ``max_total`` alone unless
    ``exact``. On CUDA at most 4 KiB of counts are written beside the outputs. Differentiable in ``tensors``: gradients go
    back to the rows, zeros to tokens that were not kept. A packed result has no batch dimension, so there is no vmap.

    Example:
        >>> x, mask = torch.arange(6.0).reshape(2, 3), torch.tensor([[True, False, True], [False, True, False]])
        >>> (x_packed,), kept_rows, cu_seqlens, num_kept = tokred.pack_tokens([x], mask, max_total=4)
        >>> x_packed.tolist(), kept_rows.tolist(), cu_seqlens.tolist()
        ([0.0, 2.0, 4.0, 0.0], [0, 2, 4, -1], [0, 2, 3])
    """
    return torch.ops.tokred.pack_tokens.default(list(tensors), mask, _capacity(mask, max_total, exact), cu_seqlens)


def _capacity(mask: Tensor, max_total: int | None, exact: bool) -> int:
    if exact and max_total is not None:
        raise RuntimeError(f"pack_tokens: expected max_total or exact, got exact and max_total {max_total}")
    if exact:
        return int(mask.sum())
    return mask.numel() if max_total is None else max_total


def reference(
    tensors: Sequence[Tensor],
    mask: Tensor,
    *,
    max_total: int | None = None,
    exact: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Define pack_tokens in plain PyTorch; tests and benchmarks measure against this."""
    capacity = _capacity(mask, max_total, exact)
    rows = mask.flatten().nonzero()[:, 0]
    kept = rows[:capacity]
    packed = []
    for x in tensors:
        flat = x.flatten(0, mask.dim() - 1)
        packed.append(torch.cat([flat[kept], flat.new_zeros((capacity - len(kept), *flat.shape[1:]))]))
    starts = cu_seqlens
    if starts is None:
        starts = torch.arange(mask.shape[0] + 1, device=mask.device) * mask.shape[1]
    ahead = torch.searchsorted(rows, starts.long())
    kept_rows = torch.cat([kept, kept.new_full((capacity - len(kept),), -1)])
    return packed, kept_rows, ahead.clamp(max=capacity).int(), ahead.diff().int()


@torch.library.register_fake("tokred::pack_tokens")
def _(
    tensors: list[Tensor], mask: Tensor, max_total: int, cu_seqlens: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    batch_size = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        [t.new_empty((max_total, *t.shape[mask.dim() :])) for t in tensors],
        mask.new_empty((max_total,), dtype=torch.int64),
        mask.new_empty((batch_size + 1,), dtype=torch.int32),
        mask.new_empty((batch_size,), dtype=torch.int32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, mask = inputs[:2]
    ctx.lead = tuple(mask.shape)
    ctx.needs = [t.requires_grad for t in tensors]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grads: list[Any], *_: Any) -> tuple[Any, ...]:
    (kept_rows,) = ctx.saved_tensors
    total = 1
    for size in ctx.lead:
        total *= size

    def back(grad: Tensor) -> Tensor:
        rows = torch.ops.tokred.scatter_tokens.default([grad.contiguous()[None]], kept_rows[None], [1], total)[0][0]
        return rows.reshape(*ctx.lead, *grad.shape[1:])

    back_grads = [back(g) if need and g is not None else None for g, need in zip(grads, ctx.needs)]
    # torch passes no trailing arguments that have their default value, and wants as many gradients as it passes.
    return (back_grads, None, None, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("tokred::pack_tokens", _backward, setup_context=_setup)
_op.no_vmap("pack_tokens", "a packed result has no batch dimension")


def floor(
    tensors: Sequence[Tensor],
    mask: Tensor,
    *,
    max_total: int | None = None,
    exact: bool = False,
    cu_seqlens: Tensor | None = None,
) -> _op.Floor:
    """Mask read, the capacity's rows written with their numbers and bounds; as if all of the capacity were kept."""
    capacity = _capacity(mask, max_total, exact)
    moved = sum(t.nbytes // max(mask.numel(), 1) * capacity for t in tensors)
    batch_size = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    bounds = 4 * (2 * batch_size + 1) + (0 if cu_seqlens is None else cu_seqlens.nbytes)
    return mask.nbytes + 8 * capacity + bounds + 2 * moved, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, mask = randn(3, 11, 24, dtype=dtype), randn(3, 11) > 0
    cu_seqlens = torch.tensor([0, 20, 20, 33], dtype=torch.int32, device=device)
    positions = torch.arange(33, device=device)
    return [
        (([x, positions.reshape(3, 11), mask], mask), {"max_total": 9}),
        (([x], mask), {}),
        (([x.flatten(0, 1), positions], mask.flatten()), {"cu_seqlens": cu_seqlens, "max_total": 30}),
    ]
