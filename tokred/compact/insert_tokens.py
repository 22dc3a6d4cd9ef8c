# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""insert_tokens: rows spliced into sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokred.compact.gather_tokens import gather_tokens


def insert_tokens(tensors: Sequence[Tensor], rows: Sequence[Tensor], before: Tensor) -> tuple[list[Tensor], Tensor]:
    """Splice rows into the sequences of several tensors: merged tokens, row ends, cached carriers, late visual tokens.

    Args:
        tensors: Any number of tensors, ``[batch_size, num_tokens, ...]``, any dtype.
        rows: One tensor per tensor, ``[batch_size, num_rows, ...]``, of its dtype: what is inserted.
        before: ``[batch_size, num_rows]``, or ``[num_rows]`` for all sequences, integers: the token in front of which each
            row goes, ``num_tokens`` for the end. Rows for the same place keep their order. Ids outside
            ``[0, num_tokens]``, usually -1: the row is left out.

    Returns:
        ``(inserted, source_idx)``.

        - ``inserted``: the tensors, ``[batch_size, num_tokens + num_rows, ...]``, zeros at the end for rows left out.
        - ``source_idx``: ``[batch_size, num_tokens + num_rows]`` int64: the token at each place, ``num_tokens + j`` for
          row ``j``, -1 for none.

    A composite, without a sync. Deterministic; shapes depend on shapes alone. Differentiable in tensors and rows.

    Example:
        >>> x, newline = torch.arange(1.0, 5.0).reshape(1, 4, 1), torch.zeros(1, 2, 1)
        >>> (y,), source_idx = tokred.insert_tokens([x], [newline], torch.tensor([2, 4]))
        >>> y.flatten().tolist(), source_idx.tolist()
        ([1.0, 2.0, 0.0, 3.0, 4.0, 0.0], [[0, 1, 4, 2, 3, 5]])
    """
    if not tensors or len(tensors) != len(rows):
        raise RuntimeError(
            f"insert_tokens: expected rows for each tensor ({len(tensors)}, at least 1), got {len(rows)}"
        )
    batch_size, num_tokens = tensors[0].shape[:2]
    before = before.expand(batch_size, -1) if before.dim() == 1 else before
    for i, (x, r) in enumerate(zip(tensors, rows)):
        if x.shape[:2] != (batch_size, num_tokens) or r.shape != (batch_size, before.shape[-1], *x.shape[2:]):
            raise RuntimeError(
                f"insert_tokens: expected tensors[{i}] of shape {[batch_size, num_tokens, '...']} and rows[{i}] of shape "
                f"{[batch_size, before.shape[-1], *x.shape[2:]]}, got {list(x.shape)} and {list(r.shape)}"
            )
    # Every place in front of a token is an even number, every token an odd one; what is left out comes last.
    used = (before >= 0) & (before <= num_tokens)
    places = torch.where(used, 2 * before, 2 * num_tokens + 1)
    own = (2 * torch.arange(num_tokens, device=before.device) + 1).expand(batch_size, -1)
    order = torch.cat([own, places], 1).argsort(dim=1, stable=True)
    is_used = torch.cat([torch.ones_like(own, dtype=torch.bool), used], 1).gather(1, order)
    source_idx = torch.where(is_used, order, -1)
    return gather_tokens([torch.cat([x, r], 1) for x, r in zip(tensors, rows)], source_idx), source_idx
