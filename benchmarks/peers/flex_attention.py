# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""FlexAttention: the lists as a mask over the whole cache; blocks without a listed key are skipped.

The block mask is made beforehand and not timed.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tokred.testing.peers import NotApplicable, Peer

VERSION = torch.__version__
DEVICES = ("cpu", "cuda")
COMPILES = True
_compiled = torch.compile(flex_attention, dynamic=False)


def prepare(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> tuple:
    batch_size, num_kv_heads, kv_len, _ = k.shape
    if kept_idx.shape[1] != num_kv_heads:
        raise NotApplicable("a list per kv head only")
    group = q.shape[1] // num_kv_heads
    listed = torch.zeros(batch_size, num_kv_heads, kv_len, dtype=torch.bool, device=q.device)
    listed.scatter_(2, kept_idx, True)

    def mask(b, h, q_idx, kv_idx):
        return listed[b, h // group, kv_idx]

    blocks = create_block_mask(mask, batch_size, q.shape[1], q.shape[2], kv_len, device=q.device)
    return q, k, v, blocks


def attend_selected(q, k, v, blocks):
    return _compiled(q, k, v, block_mask=blocks, enable_gqa=True)


OPS = {"attend_selected": Peer(attend_selected, prepare)}
