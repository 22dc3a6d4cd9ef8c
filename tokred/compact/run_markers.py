# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""run_markers: one marker for each run of dropped tokens."""

from itertools import pairwise

import torch
from torch import Tensor

from tokred import _op


def run_markers(keep: Tensor, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Find the last token of every run of dropped tokens, which stays as a marker of what was dropped there.

    A run is a maximal stretch of neighbours that are not kept; it ends with its sequence, and may cross image rows.

    Args:
        keep: Bool, ``[batch_size, num_tokens]`` or, packed, ``[total_tokens]``, contiguous: true for tokens that are kept.
            Fewer than 2^31 tokens.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.

    Returns:
        ``(kept_or_marker, marker, num_runs)``.

        - ``kept_or_marker``: bool, of the shape of ``keep``: what stays in the sequence, a mask for ``pack_tokens``.
        - ``marker``: bool, likewise: the last token of each run. A caller puts its marker embedding there and keeps the
          token's position ids.
        - ``num_runs``: ``[batch_size]`` int32. Where a sequence keeps ``k`` of ``n`` tokens it is at most
          ``min(k + 1, n - k)``.

    Deterministic, the same on every device; shapes depend on shapes alone. Masks have no gradient.

    Source: PosPad of "FocusUI" (position-preserving padding).

    Example:
        >>> keep = torch.tensor([[True, False, False, True, False]])
        >>> kept_or_marker, marker, num_runs = tokred.run_markers(keep)
        >>> marker.int().tolist(), num_runs.tolist()
        ([[0, 0, 1, 0, 1]], [2])
    """
    return torch.ops.tokred.run_markers.default(keep, cu_seqlens)


def reference(keep: Tensor, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Define run_markers in plain PyTorch; tests and benchmarks measure against this."""
    marker = torch.zeros_like(keep)
    if cu_seqlens is None:
        pairs = list(zip(keep, marker))
    else:
        bounds = cu_seqlens.tolist()
        pairs = [(keep[a:b], marker[a:b]) for a, b in pairwise(bounds)]
    for row, ends in pairs:
        ends[:] = ~row & torch.cat([row[1:], torch.ones_like(row[:1])])
    num_runs = torch.tensor([int(ends.sum()) for _, ends in pairs], dtype=torch.int32, device=keep.device)
    return keep | marker, marker, num_runs


@torch.library.register_fake("tokred::run_markers")
def _(keep: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    batch_size = keep.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        keep.new_empty(keep.shape),
        keep.new_empty(keep.shape),
        keep.new_empty((batch_size,), dtype=torch.int32),
    )


_op.fold_vmap("run_markers", absent=(1,))


def floor(keep: Tensor, *, cu_seqlens: Tensor | None = None) -> _op.Floor:
    """A mask read, two written, the counts."""
    batch_size = keep.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return 3 * keep.nbytes + 4 * batch_size + (0 if cu_seqlens is None else cu_seqlens.nbytes), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests; there is nothing of ``dtype`` in them."""
    keep = _op.seeded(device)(3, 40) > 0.5
    cu_seqlens = torch.tensor([0, 33, 33, 120], dtype=torch.int32, device=device)
    return [((keep.flatten(),), {"cu_seqlens": cu_seqlens}), ((keep,), {})]
