# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_budget: lists per head from one budget that the heads of a layer share."""

import torch
from torch import Tensor

from tokred import _op, _topk


def select_budget(
    score: Tensor,
    budget: int,
    *,
    alpha: float = 0.0,
    rule: str = "exact",
    max_k: int | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """List the tokens that each head keeps when the heads of a sequence share ``num_heads * budget`` places.

    Heads compete: the best-scored tokens of all heads together are kept. Without more, a head may be left with nothing, so
    a share ``alpha`` of the budget is safe:

    - ``rule="exact"`` (kvpress's AdaKVPress): each head keeps its best ``int(budget * alpha)`` tokens, then the best-scored
      of all others fill what is left; together they keep ``num_heads * budget``, as long as there are so many.
    - ``rule="rounded"`` (Ada-KV's code): a head that wins *n* of the places keeps its best ``round(n * (1 - alpha) +
      int(budget * alpha))`` tokens, half to even, in float64; the total may differ from ``num_heads * budget`` by a few.

    For a budget that layers share, too, pass their scores side by side as heads: ``[batch_size, layers * heads, num_tokens]``.

    Args:
        score: ``[batch_size, num_heads, num_tokens]``; packed, with ``cu_seqlens``, ``[num_heads, total_tokens]``. float32,
            float16 or bfloat16, compared exactly; any strides with a contiguous last dimension.
        budget: Tokens per head on average; dense at most ``num_tokens``.
        alpha: The safe share, in [0, 1]. The Ada-KV paper and kvpress use 0.2.
        rule: ``"exact"`` or ``"rounded"``.
        max_k: The length of the lists, by default ``num_heads * budget`` or, if less, ``num_tokens`` (packed
            ``max_seqlen``). A head that won more keeps its best ``max_k``, and the rest goes to nobody.
        keep_mask: Bool, of the shape of ``score``, contiguous in its last dimension; these tokens come first and count
            towards the budget. When they alone exceed it, the best-scored of them are kept.
        drop_mask: Bool, likewise; these tokens are never kept.
        order: ``"index"``, lists ascend; or ``"score"``, they descend by score, equal scores by ascending index.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.
        max_seqlen: The longest sequence of a packed input (default ``total_tokens``).

    Returns:
        ``(kept_idx, num_kept)``: ``[batch_size, num_heads, max_k]`` int64, positions within the sequence, then -1; and
        ``[batch_size, num_heads]`` int32.

    Ties go to the lower head, then to the lower index; NaN ranks below every number; -0.0 equals 0.0. Deterministic, the
    same lists on every device. A selection has no gradient. Temporary memory: one byte per score with ``"exact"`` and
    ``alpha``; on CUDA 75 KB per sequence or head, and as ``select_rule`` where lists are sorted by score.

    Example:
        >>> score = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.1, 0.5, 0.2, 0.3]]])
        >>> kept_idx, num_kept = tokred.select_budget(score, 2)
        >>> kept_idx.tolist(), num_kept.tolist()
        ([[[0, 1, 2, 3], [-1, -1, -1, -1]]], [[4, 0]])
        >>> tokred.select_budget(score, 2, alpha=0.5)[0].tolist()
        [[[0, 1, 2, -1], [1, -1, -1, -1]]]
    """
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    if max_k is None:
        max_k = min(longest, score.shape[-2] * budget) if score.dim() > 1 else longest
    return torch.ops.tokred.select_budget.default(
        score,
        budget,
        max_k,
        keep_mask,
        drop_mask,
        cu_seqlens,
        longest if cu_seqlens is not None else 0,
        alpha,
        rule,
        order,
    )


def reference(
    score: Tensor,
    budget: int,
    *,
    alpha: float = 0.0,
    rule: str = "exact",
    max_k: int | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Define select_budget in plain PyTorch; tests and benchmarks measure against this."""
    rows, lead = _topk.rows(score, cu_seqlens, max_seqlen)
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    heads, least = lead[1], int(budget * alpha)
    length = min(longest, heads * budget) if max_k is None else max_k
    keeps, drops = (
        [torch.zeros_like(row, dtype=torch.bool) for row in rows]
        if mask is None
        else _topk.rows(mask, cu_seqlens, max_seqlen)[0]
        for mask in (keep_mask, drop_mask)
    )
    kept = []
    for first in range(0, len(rows), heads or 1):
        row, drop = (torch.stack(x[first : first + heads]) for x in (rows, drops))
        keep = torch.stack(keeps[first : first + heads])
        if rule == "exact" and least > 0:
            for h in range(heads):
                best = _topk.select_reference(row[h], min(least, row.shape[1]), keep[h], drop[h])
                keep[h, best[best >= 0]] = True
        total = min(heads * budget, row.numel())
        won = _topk.select_reference(row.flatten(), total, keep.flatten(), drop.flatten())
        wins = torch.bincount(won[won >= 0] // max(row.shape[1], 1), minlength=heads).tolist()
        for h in range(heads):
            count = wins[h] if rule == "exact" else round(wins[h] * (1 - alpha) + least)
            picked = _topk.select_reference(row[h], min(count, length, row.shape[1]), keep[h], drop[h])
            picked = picked[picked >= 0]
            kept.append(_topk.pad(picked[_topk.rank(row[h][picked])] if order == "score" else picked, length))
    kept_idx = _topk.stacked(kept, lead, length, score.device)
    return kept_idx, (kept_idx >= 0).sum(-1, dtype=torch.int32)


@torch.library.register_fake("tokred::select_budget")
def _(
    score: Tensor,
    budget: int,
    max_k: int,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    alpha: float = 0.0,
    rule: str = "exact",
    order: str = "index",
) -> tuple[Tensor, Tensor]:
    lead = (cu_seqlens.shape[0] - 1, *score.shape[:-1]) if cu_seqlens is not None else score.shape[:-1]
    return score.new_empty((*lead, max_k), dtype=torch.int64), score.new_empty(lead, dtype=torch.int32)


_op.fold_vmap("select_budget", absent=(5,))


def floor(
    score: Tensor,
    budget: int,
    *,
    alpha: float = 0.0,
    rule: str = "exact",
    max_k: int | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> _op.Floor:
    """Scores and masks read once, lists and counts written."""
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    batch_size = score.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = score.shape[-2]
    read = sum(t.nbytes for t in (score, keep_mask, drop_mask, cu_seqlens) if t is not None)
    length = min(longest, heads * budget) if max_k is None else max_k
    return read + batch_size * heads * (8 * length + 4), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    score = randn(2, 3, 20, dtype=dtype)
    mask = score > 1
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 39], dtype=torch.int32, device=device), "max_seqlen": 36}
    return [
        ((score, 5), {}),
        ((score, 6), {"alpha": 0.4, "keep_mask": mask, "drop_mask": score < -1}),
        ((score, 7), {"alpha": 0.3, "rule": "rounded", "max_k": 12, "order": "score"}),
        ((randn(2, 39, dtype=dtype), 4), {**packed, "alpha": 0.5}),
    ]
