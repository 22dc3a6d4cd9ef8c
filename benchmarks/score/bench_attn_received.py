# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attn_received against softmax(q k^T) summed over the queries, which makes the whole matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case


def eager(q: Tensor, k: Tensor) -> Tensor:
    """All queries see all keys; K is repeated over the group, as attention in eager mode does."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).sum(-2)


def ours(q: Tensor, k: Tensor) -> Tensor:
    return tokred.attn_received(q, k)[0]


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    f32, bf16 = torch.float32, torch.bfloat16
    # batch_size, num_q_heads, num_kv_heads, q_len, kv_len, head_dim
    sizes = [
        (f32, (1, 16, 16, 577, 577, 64), 1.2),
        (f32, (1, 32, 32, 2880, 2880, 128), 2.0),
        (bf16, (1, 32, 8, 64, 16384, 128), 2.0),
        (bf16, (1, 16, 16, 577, 577, 64), None),
    ]
    if device == "cuda":
        sizes = [
            (bf16, (32, 16, 16, 577, 577, 64), None),
            (bf16, (1, 32, 8, 64, 16384, 128), None),
            (bf16, (1, 32, 8, 64, 131072, 128), None),
            (bf16, (1, 32, 32, 2880, 2880, 128), None),
            (f32, (1, 16, 16, 577, 577, 64), None),
        ]
    if smoke:
        sizes = [(f32, (1, 2, 1, 20, 40, 16), None), (bf16, (1, 2, 1, 20, 40, 16), None)]
    for dtype, (batch_size, q_heads, kv_heads, q_len, kv_len, head_dim), reach in sizes:

        def make(
            i: int,
            q_shape=(batch_size, q_heads, q_len, head_dim),
            k_shape=(batch_size, kv_heads, kv_len, head_dim),
            dtype=dtype,
        ) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(i)
            return tuple(torch.randn(*s, generator=generator).to(device, dtype) for s in (q_shape, k_shape))

        moved = 2 * (q_heads * q_len + kv_heads * kv_len) * head_dim * dtype.itemsize
        yield Case(
            op="attn_received",
            name=f"B{batch_size} H{q_heads}/{kv_heads} q{q_len} k{kv_len} d{head_dim}",
            dtype=str(dtype).removeprefix("torch."),
            make=make,
            run={"tokred": ours, "eager softmax": eager},
            bytes=batch_size * (moved + 4 * q_heads * (kv_len + q_len)),
            flops=4.0 * batch_size * q_heads * q_len * kv_len * head_dim,
            # Eager rounds bfloat16 logits to 8 bits before the softmax; the sums average that out.
            tolerance=(1e-4, 1e-5) if dtype == f32 else (5e-2, 5e-3),
            reach=reach,
            note="flops count two passes, as CUDA computes them; one where the CPU keeps the logits",
        )
