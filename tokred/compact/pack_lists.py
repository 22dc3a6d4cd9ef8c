# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pack_lists: padded lists as one list of rows, for packed outputs."""

import torch
from torch import Tensor

from tokred.compact.pack_tokens import pack_tokens


def pack_lists(
    kept_idx: Tensor,
    *,
    num_tokens: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_total: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn padded lists, as selections return them, into the rows of a packed tensor: empty slots go, sequences adjoin.

    Then ``gather_tokens([x.flatten(0, 1)[None], ...], kept_rows[None])`` gathers packed tensors, in one pass.

    Args:
        kept_idx: ``[batch_size, k]`` int64 or int32, positions in each sequence; negative ids are empty slots.
        num_tokens: Tokens of each sequence of a dense input, which is flattened.
        cu_seqlens: ``[batch_size + 1]`` int32 of a packed input, instead of ``num_tokens``.
        max_total: Capacity of the output, at most ``batch_size * k``, which is the default; see ``pack_tokens``.
        exact: Instead: read from the device how many slots are filled; this waits for it, and shapes depend on data.

    Returns:
        ``(kept_rows, cu_seqlens_kept, num_kept)`` as ``pack_tokens`` returns them: ``[max_total]`` int64 rows of the
        flattened or packed input, then -1; where each sequence starts among them; filled slots of each list.

    A composite, without a sync unless ``exact``. Deterministic; shapes depend on shapes and ``max_total`` alone. Integers
    have no gradient.

    Example:
        >>> rows, cu_seqlens, num_kept = tokred.pack_lists(torch.tensor([[0, 2, -1], [1, -1, -1]]), num_tokens=3)
        >>> rows.tolist(), cu_seqlens.tolist()
        ([0, 2, 4, -1, -1, -1], [0, 2, 3])
    """
    if kept_idx.dim() != 2:
        raise RuntimeError(f"pack_lists: expected kept_idx of shape [batch_size, k], got {list(kept_idx.shape)}")
    if num_tokens is not None and cu_seqlens is None:
        starts = torch.arange(kept_idx.shape[0], device=kept_idx.device) * num_tokens
    elif num_tokens is None and cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()
    else:
        given = "neither" if num_tokens is None else "both"
        raise RuntimeError(
            f"pack_lists: expected num_tokens of a dense input or cu_seqlens of a packed one, got {given}"
        )
    (rows,), slots, cu_seqlens_kept, num_kept = pack_tokens(
        [kept_idx + starts[:, None]], kept_idx >= 0, max_total=max_total, exact=exact
    )
    return torch.where(slots < 0, -1, rows), cu_seqlens_kept, num_kept
