# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""prune_topk: keep the k best-scored tokens of each sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import _op
from tokred._topk import select_reference
from tokred.compact.gather_tokens import scatter_rows


def prune_topk(
    x: Tensor,
    score: Tensor,
    k: int,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    others: Sequence[Tensor] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    position_ids: Tensor | None = None,
    renumber: bool = False,
    return_num_kept: bool = False,
) -> tuple[Any, ...]:
    """Keep the ``k`` highest-scored tokens of each sequence, in their original order.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]`` with ``cu_seqlens``. Any dtype; the
            last dimension is contiguous.
        score: ``[batch_size, num_tokens]``, or ``[total_tokens]``; float32, float16 or bfloat16, compared exactly.
        k: How many to keep. Dense: in ``[0, num_tokens]``. Packed: a sequence with fewer tokens keeps all of them.
        keep_mask: Bool, as ``score``; these tokens are kept and count towards ``k``. When more than ``k`` are marked, the
            ``k`` best-scored of them are kept.
        drop_mask: Bool, as ``score``; these tokens are never kept, whatever ``keep_mask`` says.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.
        max_seqlen: The longest sequence of a packed input (the default, ``total_tokens``, is always right and slower on
            CUDA); tokens of a sequence beyond it are not looked at.
        others: Up to 15 more tensors gathered by the same list: ``[batch_size, num_tokens, ...]`` or
            ``[total_tokens, ...]``, any dtype, contiguous after the token dimension.
        keep_first: So many tokens at the start of each sequence are forced, as by ``keep_mask``, and count towards ``k``: a
            system prompt, attention sinks.
        keep_last: So many at the end of each sequence (of a packed one's own end): the text after an image.
        position_ids: ``[batch_size, num_tokens]`` or, with one to four axes (M-RoPE), ``[num_axes, batch_size, num_tokens]``;
            packed ``[total_tokens]`` or ``[num_axes, total_tokens]``. Each axis is a companion.
        renumber: Count the kept tokens from 0 in every axis, instead of keeping their positions.
        return_num_kept: Return ``num_kept`` for a dense input, too.

    Returns:
        ``(x_kept, kept_idx)``, followed by ``num_kept`` when the input is packed or ``return_num_kept`` is set, by the list
        of gathered ``others`` when given, and by the position ids when given.

        - ``x_kept``: ``[batch_size, k, dim]``; rows past ``num_kept`` are zeros.
        - ``kept_idx``: ``[batch_size, k]`` int64, positions within the sequence, increasing, then -1 in slots that no token
          fills (fewer than ``k`` tokens are eligible).
        - ``num_kept``: ``[batch_size]`` int32.
        - position ids: ``[batch_size, k]`` or ``[num_axes, batch_size, k]``, 0 in slots that no token fills.

        For packed instead of padded outputs see ``pack_lists``.

    Ties go to the lowest index; NaN ranks below every number, above excluded tokens; -0.0 equals 0.0. Deterministic, the
    same indices on every device; a row's result does not depend on its batch. Shapes depend on shapes and ``k`` alone.
    On CUDA, rows beyond 8,192 tokens take a workspace of 8 bytes per candidate, 260 KiB a row at most.
    Differentiable in ``x`` and ``others``; not in ``score``.

    Example:
        >>> x, score = torch.randn(2, 5, 8), torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.2], [3.0, 2.0, 1.0, 0.0, -1.0]])
        >>> x_kept, kept_idx = tokred.prune_topk(x, score, 2)
        >>> kept_idx.tolist()
        [[1, 3], [0, 1]]
    """
    spans = keep_first or keep_last
    if cu_seqlens is None and others is None and position_ids is None and not (return_num_kept or spans or renumber):
        return torch.ops.tokred.prune_topk.default(x, score, k, keep_mask, drop_mask)
    if max_seqlen is None:
        max_seqlen = x.shape[0] if cu_seqlens is not None else 0
    if renumber and position_ids is None:
        raise RuntimeError("prune_topk: expected position_ids with renumber, got none")
    axes = [] if position_ids is None or renumber else _axes(position_ids, score)
    companions = None if others is None and not axes else [*(others or ()), *axes]
    x_kept, kept_idx, num_kept, kept = torch.ops.tokred.prune_topk.packed(
        x, score, k, keep_mask, drop_mask, cu_seqlens, max_seqlen, companions, keep_first, keep_last
    )
    positions: tuple[Tensor, ...] = ()
    if position_ids is not None:
        with_axes = _has_axes(position_ids, score)
        if renumber:
            counted = torch.where(kept_idx < 0, 0, torch.arange(k, device=x.device)).to(position_ids.dtype)
            positions = (counted.expand(position_ids.shape[0], -1, -1) if with_axes else counted,)
        else:
            of_axes = kept[len(kept) - len(axes) :]
            positions = (torch.stack(of_axes) if with_axes else of_axes[0],)
    counts = (num_kept,) if cu_seqlens is not None or return_num_kept else ()
    return (x_kept, kept_idx, *counts, *(() if others is None else (kept[: len(others)],)), *positions)


def _has_axes(position_ids: Tensor, score: Tensor) -> bool:
    """Whether the first dimension of position ids is that of their axes; they stand beside scores of one shape."""
    if position_ids.shape == score.shape:
        return False
    if position_ids.dim() != score.dim() + 1 or position_ids.shape[1:] != score.shape or position_ids.shape[0] == 0:
        lead = "[total_tokens]" if score.dim() == 1 else "[batch_size, num_tokens]"
        raise RuntimeError(
            f"prune_topk: expected position_ids of shape {lead} = {list(score.shape)}, or with axes before it, "
            f"got {list(position_ids.shape)}"
        )
    return True


def _axes(position_ids: Tensor, score: Tensor) -> list[Tensor]:
    return list(position_ids.unbind(0)) if _has_axes(position_ids, score) else [position_ids]


def reference(
    x: Tensor,
    score: Tensor,
    k: int,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    others: Sequence[Tensor] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    position_ids: Tensor | None = None,
    renumber: bool = False,
    return_num_kept: bool = False,
) -> tuple[Any, ...]:
    """Define prune_topk in plain PyTorch; tests and benchmarks measure against this."""
    tensors = [x, *(others or ()), *([] if position_ids is None else _axes(position_ids, score))]
    if cu_seqlens is None:
        spans = None
        rows = list(score.unbind(0))
        sources = [list(t.unbind(0)) for t in tensors]
    else:
        spans = list(zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:]))
        rows = [score[a:e] for a, e in spans]
        sources = [[t[a:e] for a, e in spans] for t in tensors]
    picked = []
    for b, row in enumerate(rows):
        part = b if spans is None else slice(*spans[b])
        keep, drop = (None if mask is None else mask[part] for mask in (keep_mask, drop_mask))
        if keep_first or keep_last:
            place = torch.arange(len(row), device=row.device)
            ends = (place < keep_first) | (place >= len(row) - keep_last)
            keep = ends if keep is None else keep | ends
        picked.append(select_reference(row, k, keep, drop))
    kept_idx = torch.stack(picked) if picked else torch.empty((0, k), dtype=torch.int64, device=x.device)
    outputs = []
    for tensor, per_row in zip(tensors, sources):
        gathered = []
        for source, idx in zip(per_row, picked):
            out = source.new_zeros((k, *source.shape[1:]))
            out[idx >= 0] = source[idx[idx >= 0]]
            gathered.append(out)
        tail = tensor.shape[1 if cu_seqlens is not None else 2 :]
        outputs.append(torch.stack(gathered) if gathered else tensor.new_zeros((0, k, *tail)))
    counts = ((kept_idx >= 0).sum(1, dtype=torch.int32),) if cu_seqlens is not None or return_num_kept else ()
    positions = []
    if position_ids is not None:
        ids = torch.stack(outputs[1 + len(others or ()) :])
        if renumber:
            ids = torch.where(kept_idx < 0, 0, torch.arange(k, device=x.device)).to(ids.dtype).expand_as(ids)
        positions = [ids if _has_axes(position_ids, score) else ids[0]]
    given = () if others is None else (outputs[1 : 1 + len(others)],)
    return (outputs[0], kept_idx, *counts, *given, *positions)


@torch.library.register_fake("tokred::prune_topk")
def _(x: Tensor, score: Tensor, k: int, keep_mask: Any = None, drop_mask: Any = None) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k, x.shape[2])), x.new_empty((x.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("tokred::prune_topk.packed")
def _(
    x: Tensor,
    score: Tensor,
    k: int,
    keep_mask: Any = None,
    drop_mask: Any = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    others: list[Tensor] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    batch_size, lead = (x.shape[0], 2) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 1)
    kept = [t.new_empty((batch_size, k, *t.shape[lead:])) for t in (x, *(others or ()))]
    kept_idx = x.new_empty((batch_size, k), dtype=torch.int64)
    return kept[0], kept_idx, x.new_empty((batch_size,), dtype=torch.int32), kept[1:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.num_tokens = inputs[0].shape[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return scatter_rows(grad, ctx.saved_tensors[0], ctx.num_tokens), None, None, None, None


torch.library.register_autograd("tokred::prune_topk", _backward, setup_context=_setup)


def save_lists(ctx: Any, x: Tensor, cu_seqlens: Tensor | None, others: list[Tensor] | None, kept_idx: Tensor) -> None:
    """Save what ``list_gradients`` needs."""
    ctx.packed = cu_seqlens is not None
    ctx.num_tokens = x.shape[0 if ctx.packed else 1]
    ctx.needs = None if others is None else [t.requires_grad for t in others]
    ctx.save_for_backward(kept_idx, *(() if cu_seqlens is None else (cu_seqlens,)))


def list_gradients(ctx: Any, grad: Tensor, grad_others: list[Any]) -> tuple[Tensor, list[Any] | None]:
    """Return the gradients of ``x`` and of its companions: those of the kept rows at the places they came from."""
    kept_idx = ctx.saved_tensors[0]
    if ctx.packed:  # one list over all sequences, in rows of the packed tensor
        starts = ctx.saved_tensors[1][:-1, None].long()
        kept_idx = torch.where(kept_idx < 0, kept_idx, kept_idx + starts).reshape(1, -1)

    def back(g: Tensor) -> Tensor:
        if not ctx.packed:
            return scatter_rows(g, kept_idx, ctx.num_tokens)
        return scatter_rows(g.flatten(0, 1).unsqueeze(0), kept_idx, ctx.num_tokens)[0]

    others = None
    if ctx.needs is not None:
        others = [back(g) if need and g is not None else None for g, need in zip(grad_others, ctx.needs)]
    return back(grad), others


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    save_lists(ctx, inputs[0], inputs[5], inputs[7], output[1])


def _backward_packed(ctx: Any, grad: Tensor, _idx: Any, _num: Any, grad_others: list[Any]) -> tuple[Any, ...]:
    grad_x, others = list_gradients(ctx, grad, grad_others)
    # torch passes no trailing arguments that have their default value, and wants as many gradients as it passes.
    return (grad_x, *(None,) * 6, others, None, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("tokred::prune_topk.packed", _backward_packed, setup_context=_setup_packed)
_op.fold_vmap("prune_topk")
_op.fold_vmap("prune_topk.packed", absent=(5,))


def floor(
    x: Tensor,
    score: Tensor,
    k: int,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    others: Sequence[Tensor] | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    position_ids: Tensor | None = None,
    renumber: bool = False,
    return_num_kept: bool = False,
) -> _op.Floor:
    """Scores and masks read once, kept rows read and written, the list written. Packed: as if each row kept ``k``."""
    packed = cu_seqlens is not None
    batch_size = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else score.shape[0]
    tokens = score.numel()
    moved = (x, *(others or ()), *(() if position_ids is None or renumber else (position_ids,)))
    row_bytes = sum(t.nbytes for t in moved) // max(tokens, 1)
    read = sum(t.nbytes for t in (score, keep_mask, drop_mask, cu_seqlens) if t is not None)
    written = 8 * batch_size * k + 4 * batch_size * (packed or return_num_kept)
    if renumber and position_ids is not None:
        written += position_ids.nbytes // max(tokens, 1) * batch_size * k
    return read + 2 * min(batch_size * k, tokens) * row_bytes + written, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, score = randn(2, 13, 24, dtype=dtype), randn(2, 13, dtype=dtype)
    mask = score > 1
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 26], dtype=torch.int32, device=device), "max_seqlen": 23}
    flat = x.flatten(0, 1)
    return [
        ((x, score, 5), {}),
        ((x, score, 5), {"keep_mask": mask, "drop_mask": score < 0}),
        ((x, score, 0), {}),
        ((flat, score.flatten(), 7), {**packed, "others": [torch.arange(26, device=device), flat]}),
        (
            (x, score, 6),
            {"keep_first": 2, "keep_last": 1, "position_ids": torch.arange(78, device=device).reshape(3, 2, 13)},
        ),
    ]
