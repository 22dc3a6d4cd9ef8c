# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attend_selected against what users compose: rows gathered by index_select, then matmul and softmax, or SDPA."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

PEERS = ("flashinfer", "xformers")


def gathered(k: Tensor, v: Tensor, kept_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by index_select on flattened K and V, the fastest gather that ATen has."""
    batch_size, num_kv_heads, kv_len, head_dim = k.shape
    first = torch.arange(0, batch_size * num_kv_heads * kv_len, kv_len, device=k.device)
    rows = (kept_idx + first.view(batch_size, num_kv_heads, 1)).flatten()
    shape = (*kept_idx.shape, head_dim)
    return tuple(x.view(-1, head_dim).index_select(0, rows).view(shape) for x in (k, v))


def matmul_softmax(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> Tensor:
    k_kept, v_kept = gathered(k, v, kept_idx)
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    weight = (grouped @ k_kept.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
    return (weight @ v_kept).view(*q.shape[:3], v.shape[3])


def sdpa(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, *gathered(k, v, kept_idx), enable_gqa=True)


def maker(
    device: str, dtype: torch.dtype, batch_size: int, heads: tuple[int, int], kv_len: int, k: int, head_dim: int
) -> Callable[[int], tuple[Any, ...]]:
    """Return ``make``: copies differ in q and the lists; every eighth has the same K and V, of which a call reads little."""
    caches: dict[int, list[Tensor]] = {}

    def make(i: int) -> tuple[Any, ...]:
        if i % 8 not in caches:
            shape = (batch_size, heads[1], kv_len, head_dim)
            random = generator(device, 1000 + i % 8)  # not that of q: the same number gives the same copy again
            caches[i % 8] = [torch.randn(*shape, generator=random, device=device).to(dtype) for _ in range(2)]
        options = {"generator": generator(device, i), "device": device}
        q = torch.randn(batch_size, heads[0], 1, head_dim, **options).to(dtype)
        kept_idx = torch.rand(batch_size, heads[1], kv_len, **options).topk(k).indices.sort().values
        return q, *caches[i % 8], kept_idx

    return make


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: batch_size, (query heads, kv heads), kv_len, k, head_dim, reach."""
    llama, qwen, cuda = (32, 8), (28, 4), device == "cuda"
    aim = None if cuda else 3.0
    sizes = [(1, llama, 32768, 2048, 128, aim), (1, llama, 8192, 1024, 128, aim), (1, qwen, 32768, 1024, 128, None)]
    if cuda:
        sizes += [(32, llama, 8192, k, 128, None) for k in (1024, 2048, 4096)]
    if smoke:
        sizes = [(2, (4, 2), 60, 20, 32, None)]
    for dtype in (torch.bfloat16, torch.float32):
        for batch_size, heads, kv_len, k, head_dim, reach in sizes:
            small = batch_size == 1 and kv_len == 8192
            yield Case(
                op="attend_selected",
                name=f"b{batch_size} {heads[0]}/{heads[1]} d{head_dim} {k} of {kv_len}",
                dtype=dtype_word(dtype),
                make=maker(device, dtype, batch_size, heads, kv_len, k, head_dim),
                run={
                    "tokred": tokred.attend_selected,
                    "index_select+matmul": matmul_softmax,
                    "index_select+sdpa": sdpa,
                },
                # What compiles for seconds per case, once (of a GPU: one): nobody picks it for lists of single keys.
                peers=PEERS + (("flex_attention",) if small or smoke else ()),
                compiled=("index_select+matmul",) if small and not cuda else (),
                # bfloat16: the peers round the logits or the weights, too.
                tolerance=(2e-5, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2),
                reach=reach,
                core=cuda and dtype == torch.bfloat16 and heads == llama and (batch_size, k) != (32, 1024),
            )
