# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The definition of a selection, for the references of all ops that select."""

import torch
from torch import Tensor


def rank(score: Tensor) -> Tensor:
    """Return the tokens of one row from best to worst: ties to the lower index, NaN below every number."""
    value = score.float()
    order = value.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(descending=True, stable=True)
    return order[(~value.isnan())[order].float().argsort(descending=True, stable=True)]


def select_reference(score: Tensor, k: int, keep: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
    """Define the selection of one row: ``[num_tokens]`` to ``[k]`` int64, increasing, then -1."""
    eligible = torch.ones_like(score, dtype=torch.bool) if drop is None else ~drop
    forced = eligible & keep if keep is not None else torch.zeros_like(eligible)
    order = rank(score)
    # Least significant first: each stable sort keeps the order of the ones before it.
    for key in (forced, eligible):
        order = order[key[order].float().argsort(descending=True, stable=True)]
    kept = order[:k]
    kept = kept[eligible[kept]].sort().values
    return pad(kept, k)


def pad(index: Tensor, length: int) -> Tensor:
    """Return the list followed by -1 up to ``length``."""
    return torch.cat([index, index.new_full((length - index.shape[0],), -1)])
