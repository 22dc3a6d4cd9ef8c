# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""FlashInfer: top_k (radix, clusters or CUB, as it chooses), and batch decode over pages of one token.

Each kv head is a request of its own, so that lists may differ per head. The plan is not timed. Not run on a GPU yet.
"""

import flashinfer
import torch
from torch import Tensor

from tokred.testing.peers import NotApplicable, Peer

VERSION = flashinfer.__version__
DEVICES = ("cuda",)


def prune_topk(x: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch_size, num_tokens, dim = x.shape
    kept_idx = select_topk(score, k)
    rows = (kept_idx + torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device)[:, None]).flatten()
    return x.view(-1, dim).index_select(0, rows).view(batch_size, k, dim), kept_idx


def select_topk(score: Tensor, k: int) -> Tensor:
    return flashinfer.top_k(score, k)[1].long().sort().values


_workspace: list[Tensor] = []  # FlashInfer's scratch, one for all copies: they run one after the other


def prepare_attend(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> tuple:
    batch_size, num_kv_heads, kv_len, head_dim = k.shape
    num_listed = kept_idx.shape[2]
    if q.dtype == torch.float32:
        raise NotApplicable("decodes float16 and bfloat16 only")
    if kept_idx.shape[1] != num_kv_heads:
        raise NotApplicable("a list per kv head only")
    if not _workspace:
        _workspace.append(torch.zeros(128 << 20, dtype=torch.uint8, device=q.device))
    requests, group = batch_size * num_kv_heads, q.shape[1] // num_kv_heads
    first = torch.arange(0, requests * kv_len, kv_len, device=q.device).view(batch_size, num_kv_heads, 1)
    indptr = torch.arange(requests + 1, dtype=torch.int32, device=q.device) * num_listed
    last_page_len = torch.ones(requests, dtype=torch.int32, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace[0], "NHD")
    wrapper.plan(
        indptr,
        (kept_idx + first).flatten().int(),
        last_page_len,
        group,
        1,
        head_dim,
        1,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    pages = tuple(t.view(-1, 1, 1, head_dim) for t in (k, v))
    return wrapper, q.view(requests, group, head_dim), pages, q.shape


def attend_selected(wrapper, q, pages, shape):
    return wrapper.run(q, pages).view(shape)


OPS = {
    "prune_topk": Peer(prune_topk),
    "select_topk": Peer(select_topk),
    "attend_selected": Peer(attend_selected, prepare_attend),
}
