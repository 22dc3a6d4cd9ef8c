# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""gather_tokens: many tensors by one index list."""

import torch
from torch import Tensor


def scatter_rows(grad: Tensor, kept_idx: Tensor, num_tokens: int) -> Tensor:
    """Add rows ``[batch_size, k, ...]`` into zeros ``[batch_size, num_tokens, ...]`` at ``kept_idx``; -1 is left out."""
    valid = (kept_idx >= 0) & (kept_idx < num_tokens)
    tail = grad.shape[2:]
    rows = grad.reshape(*grad.shape[:2], -1) * valid[..., None]
    out = rows.new_zeros((grad.shape[0], num_tokens, rows.shape[2]))
    out.scatter_add_(1, kept_idx.clamp(0, max(num_tokens - 1, 0))[..., None].expand_as(rows), rows)
    return out.reshape(grad.shape[0], num_tokens, *tail)
