# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_topk: the list of the k best-scored tokens of each row."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op, _topk


def select_topk(
    score: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    complement: bool = False,
    return_num_kept: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """List the ``k`` highest-scored tokens of each row, in their original order or by falling score.

    A row is a sequence or, with a score per head, one head of it: each has a list of its own.

    Args:
        score: ``[batch_size, num_tokens]`` or ``[batch_size, num_heads, num_tokens]``; packed, with ``cu_seqlens``,
            ``[total_tokens]`` or ``[num_heads, total_tokens]``. float32, float16 or bfloat16, compared exactly; any strides
            with a contiguous last dimension.
        k: How many to keep. An int: dense in ``[0, num_tokens]``; packed at least 0, and a sequence with fewer tokens keeps
            all of them. Or an int32 or int64 tensor with a count per row, ``[batch_size]`` or ``[batch_size, num_heads]``:
            its values are not read back, they are clamped to ``[0, max_k]``.
        max_k: The length of the lists when ``k`` is a tensor, and only then; bounded like an int ``k``.
        keep_mask: Bool, of the shape of ``score``, contiguous in its last dimension (so ``mask[:, None].expand_as(score)``
            serves all heads); these tokens are kept and count towards ``k``. When more than ``k`` are forced, the ``k``
            best-scored of them are kept.
        drop_mask: Bool, likewise; these tokens are never kept, whatever forces them.
        keep_first: So many tokens at the start of each row are forced, as by ``keep_mask``: attention sinks.
        keep_last: So many at the end of each row (of a packed sequence's own end): recent tokens, an observation window.
        order: ``"index"``, the list ascends; or ``"score"``, it descends by score, equal scores by ascending index, forced
            tokens at the place of their score, NaN last.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.
        max_seqlen: The longest sequence of a packed input (the default, ``total_tokens``, is always right and slower on
            CUDA); tokens of a sequence beyond it are not looked at.
        complement: Return ``rest_idx``, too.
        return_num_kept: Return ``num_kept`` for a dense input with an int ``k``, too.

    Returns:
        ``kept_idx``; a tuple when ``num_kept`` (``k`` is a tensor, the input is packed, or ``return_num_kept``) or
        ``rest_idx`` (``complement``) follow, in this order.

        - ``kept_idx``: ``[batch_size, k]`` or ``[batch_size, num_heads, k]`` int64 (``max_k`` for ``k`` when it is a
          tensor), positions within the sequence, then -1 in slots that no token fills (fewer are eligible).
        - ``num_kept``: ``[batch_size]`` or ``[batch_size, num_heads]`` int32.
        - ``rest_idx``: the tokens of the row that are not kept, excluded ones among them, ascending, then -1; int64. Where
          every row is certain to keep ``k`` (a dense score, an int ``k``, no ``drop_mask``) its last dimension is
          ``num_tokens - k`` and holds no -1; else it is ``num_tokens``, packed ``max_seqlen``.

    Ties go to the lowest index; NaN ranks below every number, above excluded tokens; -0.0 equals 0.0. Deterministic, the
    same indices on every device; a row's result does not depend on its batch. Shapes depend on shapes, integers and which
    arguments are given. On CUDA, rows beyond 8,192 tokens take a workspace of 8 bytes per candidate, 260 KiB a row at
    most, and lists beyond 4,096 tokens in order of score one of 16 bytes per slot. A selection has no gradient; a score
    that requires grad is taken as it is.

    Example:
        >>> score = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.2], [3.0, 2.0, 1.0, 0.0, -1.0]])
        >>> tokred.select_topk(score, 3).tolist()
        [[1, 2, 3], [0, 1, 2]]
        >>> tokred.select_topk(score, 3, order="score", keep_last=1).tolist()
        [[1, 3, 4], [0, 1, 4]]
        >>> kept_idx, num_kept = tokred.select_topk(score, torch.tensor([1, 3]), max_k=3)
        >>> kept_idx.tolist(), num_kept.tolist()
        ([[1, -1, -1], [0, 1, 2]], [1, 3])
    """
    per_row = isinstance(k, Tensor)
    if per_row != (max_k is not None):
        given = "a tensor k without max_k" if per_row else "an int k with max_k"
        raise RuntimeError(f"select_topk: expected max_k with a tensor k, and only then, got {given}")
    counted = per_row or cu_seqlens is not None or return_num_kept
    if not (counted or keep_first or keep_last or complement) and order == "index":
        return torch.ops.tokred.select_topk.default(score, k, keep_mask, drop_mask)
    if max_seqlen is None:
        max_seqlen = score.shape[-1] if cu_seqlens is not None else 0
    kept_idx, num_kept, rest_idx = torch.ops.tokred.select_topk.full(
        score,
        max_k if per_row else k,
        k if per_row else None,
        keep_mask,
        drop_mask,
        cu_seqlens,
        max_seqlen,
        keep_first,
        keep_last,
        order,
        complement,
    )
    out = (kept_idx, *((num_kept,) if counted else ()), *((rest_idx,) if complement else ()))
    return out if len(out) > 1 else kept_idx


def reference(
    score: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    complement: bool = False,
    return_num_kept: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Define select_topk in plain PyTorch; tests and benchmarks measure against this."""
    rows, lead = _topk.rows(score, cu_seqlens, max_seqlen)
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    length = max_k if max_k is not None else int(k)
    counts = k.clamp(0, length).flatten().tolist() if isinstance(k, Tensor) else [length] * len(rows)
    certain = cu_seqlens is None and drop_mask is None and not isinstance(k, Tensor)
    kept, rest = [], []
    masks = [
        [None] * len(rows) if mask is None else _topk.rows(mask, cu_seqlens, max_seqlen)[0]
        for mask in (keep_mask, drop_mask)
    ]
    for row, count, keep, drop in zip(rows, counts, *masks):
        place = torch.arange(row.shape[0], device=row.device)
        forced = (place < keep_first) | (place >= row.shape[0] - keep_last)
        picked = _topk.select_reference(row, count, forced if keep is None else forced | keep, drop)
        picked = picked[picked >= 0]
        left = torch.ones_like(forced).index_fill(0, picked, False).nonzero()[:, 0]
        if order == "score":
            picked = picked[_topk.rank(row[picked])]
        kept.append(_topk.pad(picked, length))
        rest.append(_topk.pad(left, longest - length if certain else longest))
    kept_idx = _topk.stacked(kept, lead, length, score.device)
    out = [kept_idx]
    if isinstance(k, Tensor) or cu_seqlens is not None or return_num_kept:
        out.append((kept_idx >= 0).sum(-1, dtype=torch.int32))
    if complement:
        out.append(_topk.stacked(rest, lead, longest - length if certain else longest, score.device))
    return tuple(out) if len(out) > 1 else kept_idx


@torch.library.register_fake("tokred::select_topk")
def _(score: Tensor, k: int, keep_mask: Any = None, drop_mask: Any = None) -> Tensor:
    return score.new_empty((*score.shape[:-1], k), dtype=torch.int64)


@torch.library.register_fake("tokred::select_topk.full")
def _(
    score: Tensor,
    k: int,
    row_k: Tensor | None = None,
    keep_mask: Any = None,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    complement: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = cu_seqlens is not None
    lead = (cu_seqlens.shape[0] - 1, *score.shape[:-1]) if cu_seqlens is not None else score.shape[:-1]
    longest = max_seqlen if packed else score.shape[-1]
    num_rest = longest - k if not packed and row_k is None and drop_mask is None else longest
    return (
        score.new_empty((*lead, k), dtype=torch.int64),
        score.new_empty(lead, dtype=torch.int32),
        score.new_empty((*lead, num_rest) if complement else (0,), dtype=torch.int64),
    )


_op.fold_vmap("select_topk")
_op.fold_vmap("select_topk.full", absent=(5,))


def floor(
    score: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    complement: bool = False,
    return_num_kept: bool = False,
) -> _op.Floor:
    """Scores, masks and counts read once, lists and counts written. Packed: as if there were no -1 in ``rest_idx``."""
    per_row, packed = isinstance(k, Tensor), cu_seqlens is not None
    rows = score.numel() // max(score.shape[-1], 1) * (cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 1)
    length = max_k if max_k is not None else int(k)
    given = (score, keep_mask, drop_mask, cu_seqlens, k)
    read = sum(t.nbytes for t in given if isinstance(t, Tensor))
    written = 8 * rows * length + 4 * rows * (per_row or packed or return_num_kept)
    return read + written + (8 * max(score.numel() - rows * length, 0) if complement else 0), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    score, heads = randn(3, 13, dtype=dtype), randn(2, 3, 40, dtype=dtype)
    mask = score > 1
    k = torch.tensor([[4, 9, 0], [99, -1, 6]], device=device)
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 39], dtype=torch.int32, device=device), "max_seqlen": 36}
    return [
        ((score, 5), {}),
        ((score, 5), {"keep_mask": mask, "drop_mask": score < 0}),
        ((heads, 9), {"keep_first": 2, "keep_last": 3, "order": "score", "complement": True}),
        ((heads, k), {"max_k": 9, "complement": True}),
        ((score.flatten(), 7), {**packed, "keep_last": 1, "complement": True}),
    ]
