# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The definition of a selection, for the references of all ops that select."""

from itertools import pairwise

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


def rows(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the rows of scores, or of what has their shape, and what leads their lists: ``(batch_size[, num_heads])``."""
    if cu_seqlens is None:
        parts, lead = list(x), tuple(x.shape[:-1])
    else:
        longest = x.shape[-1] if max_seqlen is None else max_seqlen
        ends = cu_seqlens.tolist()
        parts = [x[..., a : min(e, a + longest)] for a, e in pairwise(ends)]
        lead = (len(parts), *x.shape[:-1])
    return [row for part in parts for row in (part if len(lead) == 2 else (part,))], lead


def stacked(lists: list[Tensor], lead: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """Return the rows' lists as one tensor, ``[*lead, length]``."""
    flat = torch.stack(lists) if lists else torch.empty((0, length), dtype=torch.int64, device=device)
    return flat.reshape(*lead, length)
