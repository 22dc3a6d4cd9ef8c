# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What the ops over pairs of rows share: their definition of a similarity and of who meets whom, and their vmap rule."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred import _op

EPS = 1e-12  # the smallest norm that a cosine divides by


class Part(NamedTuple):
    """One sequence: x ``[num_x, dim]``, y ``[num_y, dim]``, and a value per row of them."""

    x: Tensor
    y: Tensor
    bias: Tensor | None
    drop_mask: Tensor | None
    x_group: Tensor | None
    y_group: Tensor | None


def both(name: str, cu_seqlens_x: Tensor | None, cu_seqlens_y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both, or say which is missing."""
    if cu_seqlens_x is None or cu_seqlens_y is None:
        there = "cu_seqlens_y" if cu_seqlens_x is None else "cu_seqlens_x"
        raise RuntimeError(f"{name}: expected cu_seqlens_x and cu_seqlens_y, both or none, got {there} alone")
    return cu_seqlens_x, cu_seqlens_y


def sequences(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
    cu_seqlens_x: Tensor | None,
    cu_seqlens_y: Tensor | None,
) -> Iterator[Part]:
    """Yield the sequences of a call."""

    def cut(t: Tensor | None, at: Any) -> Tensor | None:
        return None if t is None else t[at]

    if cu_seqlens_x is not None and cu_seqlens_y is not None:
        for (a, b), (c, d) in zip(pairwise(cu_seqlens_x.tolist()), pairwise(cu_seqlens_y.tolist())):
            i, j = slice(a, b), slice(c, d)
            yield Part(x[i], y[j], cut(bias, j), cut(drop_mask, j), cut(x_group, i), cut(y_group, j))
        return
    for b in range(x.shape[0]):
        at = b if y.dim() == 3 else slice(None)
        yield Part(x[b], y[at], cut(bias, at), cut(drop_mask, at), cut(x_group, b), cut(y_group, at))


def similarities(part: Part, metric: str, group_rule: str, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Return the similarities of all pairs, ``[num_x, num_y]``, and who meets whom."""
    x, y = (v if v.dtype == torch.float64 else v.float() for v in (part.x, part.y))
    if metric == "cosine":
        x, y = (v / v.norm(dim=-1, keepdim=True).clamp_min(EPS) for v in (x, y))
    similar = x @ y.T
    if metric == "l2":
        squared = x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * similar
        similar = -torch.where(squared < 0, 0.0, squared)
    meets = torch.ones(similar.shape, dtype=torch.bool, device=x.device)
    if part.drop_mask is not None:
        meets &= ~part.drop_mask
    if part.x_group is not None and part.y_group is not None:
        meets &= (part.x_group[:, None] == part.y_group) == (group_rule == "same")
    if exclude_self:
        meets &= ~torch.eye(*similar.shape, dtype=torch.bool, device=x.device)
    return similar, meets


def flops(x: Tensor, y: Tensor, cu_seqlens_x: Tensor | None) -> int:
    """Return those of the product of all pairs; packed: as if all sequences were equally long."""
    rows, dim = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    num_y = y.shape[-2] if cu_seqlens_x is None else y.shape[0] // max(cu_seqlens_x.shape[0] - 1, 1)
    return 2 * rows * num_y * dim


def fold_vmap(name: str, of_y: Sequence[int]) -> None:
    """Fold the mapped dimension into the batch. A shared ``y`` and what belongs to it, at ``of_y``, stay as they are."""
    batched, shared = _op.fold_rule(name), _op.fold_rule(name, shared=(1, *of_y))

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        bank = args[1].dim() - (in_dims[1] is not None) == 2
        return (shared if bank else batched)(info, in_dims, *args)

    torch.library.register_vmap(f"tokred::{name}", rule)
    _op.no_vmap(f"{name}.packed", "a packed input has no batch dimension")
