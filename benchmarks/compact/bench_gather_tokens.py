# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""gather_tokens against ATen: index_select on flattened rows, tensor by tensor; take_along_dim for lists per head."""

from collections.abc import Iterator

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case


def index_select(tensors: list[Tensor], kept_idx: Tensor) -> list[Tensor]:
    batch_size, k = kept_idx.shape
    out = []
    for x in tensors:
        first = torch.arange(0, batch_size * x.shape[1], x.shape[1], device=x.device)[:, None]
        rows = (kept_idx + first).flatten()
        out.append(x.flatten(0, 1).index_select(0, rows).unflatten(0, (batch_size, k)))
    return out


def gather(tensors: list[Tensor], kept_idx: Tensor) -> list[Tensor]:
    return [x.gather(2, kept_idx[..., None].expand(-1, -1, -1, x.shape[3])) for x in tensors]


def kept_lists(shape: tuple[int, ...], num_tokens: int, k: int, seed: int) -> Tensor:
    scores = torch.rand(*shape, num_tokens, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k).indices.sort().values


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    batch_size, num_tokens, dim, k = (1, 200, 64, 30) if smoke else (1, 2880, 4096, 320)
    heads, kv_len, kept = (2, 300, 50) if smoke else (8, 32768, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")

        def layer(i: int, dtype=dtype) -> tuple[list[Tensor], Tensor]:
            x = torch.randn(batch_size, num_tokens, dim).to(device, dtype)
            positions = torch.arange(num_tokens, device=device).expand(batch_size, -1).contiguous()
            return [x, positions, positions > 7], kept_lists((batch_size,), num_tokens, k, i).to(device)

        def cache(i: int, dtype=dtype) -> tuple[list[Tensor], Tensor]:
            kv = [torch.randn(1, heads, kv_len, 128).to(device, dtype) for _ in range(2)]
            return kv, kept_lists((1, heads), kv_len, kept, i).to(device)

        yield Case(
            op="gather_tokens",
            name=f"hidden, positions, mask: {num_tokens} -> {k} x {dim}",
            dtype=word,
            make=layer,
            run={"tokred": tokred.gather_tokens, "index_select": index_select},
            bytes=batch_size * k * (2 * (dim * dtype.itemsize + 9) + 8),
            tolerance=(0, 0),
        )
        yield Case(
            op="gather_tokens",
            name=f"K, V per head: {heads} x {kv_len} -> {kept} x 128",
            dtype=word,
            make=cache,
            run={"tokred": tokred.gather_tokens, "gather": gather},
            bytes=heads * kept * (2 * 2 * 128 * dtype.itemsize + 8),
            tolerance=(0, 0),
        )
