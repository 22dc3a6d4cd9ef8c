# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Packed sequences in torch, for composites."""

import torch
from torch import Tensor


def sequence_of(op: str, cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each token of a packed tensor, int64 ``[num_tokens]``, and whether it is in one at all.

    A token in none has sequence 0, which exists if any does.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise RuntimeError(
            f"{op}: expected cu_seqlens int32 of shape [batch_size + 1], "
            f"got {str(cu_seqlens.dtype).removeprefix('torch.')} {list(cu_seqlens.shape)}"
        )
    token = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    inside = (sequence < cu_seqlens.shape[0] - 1) & (token >= cu_seqlens[:1])
    return torch.where(inside, sequence, 0), inside
