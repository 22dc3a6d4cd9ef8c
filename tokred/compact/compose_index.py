# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""compose_index: where tokens that were kept again and again stood at first."""

import torch
from torch import Tensor


def compose_index(*lists: Tensor) -> Tensor:
    """Compose the lists of successive layers into one list of positions before the first: ``first[second][third]``.

    Args:
        lists: One or more lists, the first layer's first: ``[batch_size, k]``, or ``[batch_size, num_heads, k]``, int64 or
            int32. The ids of each name slots of the list before; outside of it, usually -1, they name nothing. A list shared
            by all heads may be followed by one per head, not the other way round.

    Returns:
        int64, of the shape of the last list: positions in what the first list was made from, -1 for an empty slot. The list
        by which the original's KV, positions or hidden states are gathered to match the last layer.

    A composite of torch ops, without a sync. Deterministic; shapes depend on shapes alone. Integers have no gradient.

    MustDrop compacts the cache of each earlier layer to the survivors of the last by such lists.

    Example:
        >>> first, second = torch.tensor([[2, 5, 7, 9]]), torch.tensor([[3, 0, -1]])
        >>> tokred.compose_index(first, second).tolist()
        [[9, 2, -1]]
    """
    if not lists:
        raise RuntimeError("compose_index: expected one list at least, got none")
    composed = lists[0].long()
    for i, ids in enumerate(lists[1:], 1):
        if ids.dim() == composed.dim() + 1:
            composed = composed[:, None].expand(-1, ids.shape[1], -1)
        if ids.dim() != composed.dim() or ids.shape[:-1] != composed.shape[:-1]:
            raise RuntimeError(
                f"compose_index: expected list {i} with the leading sizes of the one before, {list(composed.shape[:-1])}, "
                f"got {list(ids.shape)}"
            )
        length = composed.shape[-1]
        slot = torch.where((ids >= 0) & (ids < length), ids, length).long()
        composed = torch.nn.functional.pad(composed, (0, 1), value=-1).gather(-1, slot)
    return composed
