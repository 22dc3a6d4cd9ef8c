# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attend_selected against what users compose: rows gathered by index_select, then matmul and softmax, or SDPA."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tokred.testing.bench import Case


def gathered(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by index_select on flattened K and V, the fastest gather that ATen has."""
    batch_size, num_kv_heads, kv_len, head_dim = k.shape
    first = torch.arange(0, batch_size * num_kv_heads * kv_len, kv_len, device=q.device).view(
        batch_size, num_kv_heads, 1
    )
    rows = (kept_idx + first).flatten()
    shape = (*kept_idx.shape, head_dim)
    return k.view(-1, head_dim).index_select(0, rows).view(shape), v.view(-1, head_dim).index_select(0, rows).view(
        shape
    )


def matmul_softmax(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> Tensor:
    k_kept, v_kept = gathered(q, k, v, kept_idx)
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    weight = (grouped @ k_kept.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
    return (weight @ v_kept).view(*q.shape[:3], v.shape[3])


def sdpa(q: Tensor, k: Tensor, v: Tensor, kept_idx: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, *gathered(q, k, v, kept_idx), enable_gqa=True)


def make_inputs(
    i: int, device: str, dtype: torch.dtype, batch_size: int, heads: tuple[int, int], kv_len: int, k: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(i)
    options = {"generator": generator, "device": device}
    q = torch.randn(batch_size, heads[0], 1, head_dim, **options).to(dtype)
    kv = [torch.randn(batch_size, heads[1], kv_len, head_dim, **options).to(dtype) for _ in range(2)]
    kept_idx = torch.rand(batch_size, heads[1], kv_len, **options).topk(k).indices.sort().values
    return q, *kv, kept_idx


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: batch_size, (query heads, kv heads), kv_len, k, head_dim, reach."""
    heads = (32, 8)
    sizes = [(1, heads, 32768, 2048, 128, 3.0), (1, heads, 8192, 1024, 128, 3.0)]
    if device == "cuda":
        sizes += [
            (32, heads, 8192, 2048, 128, None),
            (32, heads, 8192, 4096, 128, None),
            (64, heads, 8192, 1024, 128, None),
        ]
    if smoke:
        sizes = [(2, (8, 2), 200, 70, 64, None)]
    for dtype in (torch.bfloat16, torch.float32):
        for batch_size, (num_q_heads, num_kv_heads), kv_len, k, head_dim, reach in sizes:
            yield Case(
                op="attend_selected",
                name=f"b{batch_size} {num_q_heads}/{num_kv_heads} d{head_dim} {k} of {kv_len}",
                dtype=str(dtype).removeprefix("torch."),
                make=partial(
                    make_inputs,
                    device=device,
                    dtype=dtype,
                    batch_size=batch_size,
                    heads=(num_q_heads, num_kv_heads),
                    kv_len=kv_len,
                    k=k,
                    head_dim=head_dim,
                ),
                run={
                    "tokred": tokred.attend_selected,
                    "index_select+matmul": matmul_softmax,
                    "index_select+sdpa": sdpa,
                },
                bytes=batch_size * num_kv_heads * k * (2 * head_dim * dtype.itemsize + 8)
                + 2 * batch_size * num_q_heads * head_dim * dtype.itemsize,
                flops=4.0 * batch_size * num_q_heads * k * head_dim,
                # bfloat16: the peers round the logits or the weights, too.
                tolerance=(2e-5, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2),
                reach=reach,
            )
