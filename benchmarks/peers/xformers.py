# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""xformers: rows gathered by index_select, then its memory-efficient attention with grouped heads.

It has no lists per head. Not run on a GPU yet.
"""

import torch
import xformers
from torch import Tensor
from xformers.ops import fmha

from tokred.testing.peers import NotApplicable, Peer

VERSION = xformers.__version__
DEVICES = ("cuda",)


def prepare(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> tuple:
    if kept_idx.shape[1] != k.shape[1]:
        raise NotApplicable("a list per kv head only")
    return q, k, v, kept_idx


def attend_selected(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> Tensor:
    batch_size, num_kv_heads, kv_len, head_dim = k.shape
    group, num_listed = q.shape[1] // num_kv_heads, kept_idx.shape[2]
    first = torch.arange(0, batch_size * num_kv_heads * kv_len, kv_len, device=q.device)
    rows = (kept_idx.transpose(1, 2) + first.view(batch_size, 1, num_kv_heads)).flatten()

    def kept(x: Tensor) -> Tensor:
        x = x.view(-1, head_dim).index_select(0, rows).view(batch_size, num_listed, num_kv_heads, 1, head_dim)
        return x.expand(-1, -1, -1, group, -1)

    grouped = q.view(batch_size, num_kv_heads, group, -1, head_dim).permute(0, 3, 1, 2, 4)
    out = fmha.memory_efficient_attention_forward(grouped, kept(k), kept(v))
    return out.permute(0, 2, 3, 1, 4).reshape(q.shape)


OPS = {"attend_selected": Peer(attend_selected, prepare)}
