# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""list_to_mask: the tokens that lists name, as a mask."""

import torch
from torch import Tensor


def list_to_mask(kept_idx: Tensor, num_tokens: int) -> Tensor:
    """Mark the tokens that lists name: for ``pack_tokens``, ``run_markers``, and as a forced or excluded set.

    Args:
        kept_idx: ``[..., k]`` int64 or int32, any order, repeats allowed; ids outside ``[0, num_tokens)``, usually -1, mark
            nothing.
        num_tokens: The length of the masks.

    Returns:
        Bool, ``[..., num_tokens]``.

    A composite of torch ops, without a sync. Deterministic; shapes depend on shapes and ``num_tokens`` alone. Masks have no
    gradient.

    Example:
        >>> tokred.list_to_mask(torch.tensor([[3, 1, -1]]), 4).int().tolist()
        [[0, 1, 0, 1]]
    """
    place = torch.where((kept_idx >= 0) & (kept_idx < num_tokens), kept_idx, num_tokens).long()
    mask = torch.zeros((*kept_idx.shape[:-1], num_tokens + 1), dtype=torch.bool, device=kept_idx.device)
    return mask.scatter(-1, place, True)[..., :num_tokens].contiguous()
