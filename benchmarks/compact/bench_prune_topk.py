# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""prune_topk against the strongest ATen composition: topk, sort, and index_select on flattened rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case


def aten(x: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch_size, num_tokens, dim = x.shape
    kept_idx = score.topk(k, sorted=False).indices.sort().values
    rows = (kept_idx + torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device)[:, None]).flatten()
    return x.view(-1, dim).index_select(0, rows).view(batch_size, k, dim), kept_idx


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    sizes = [(8, 576, 1024, 192, 1.6), (1, 2880, 4096, 320, None), (1, 131072, 1, 2048, 15.0), (512, 576, 1, 64, None)]
    if smoke:
        sizes = [(2, 576, 32, 192, None), (1, 5000, 1, 100, None)]
    for dtype in (torch.float32, torch.bfloat16):
        for batch_size, num_tokens, dim, k, reach in sizes:
            if dim == 1 and dtype != torch.float32:
                continue

            def make(i: int, shape=(batch_size, num_tokens, dim), k=k, dtype=dtype) -> tuple[Tensor, Tensor, int]:
                generator = torch.Generator().manual_seed(i)
                x = torch.randn(*shape, generator=generator)
                return x.to(device, dtype), torch.randn(*shape[:2], generator=generator).to(device), k

            row = dim * dtype.itemsize
            yield Case(
                op="prune_topk",
                name=f"({batch_size}, {num_tokens}, {dim}) keep {k}",
                dtype=str(dtype).removeprefix("torch."),
                make=make,
                run={"tokred": tokred.prune_topk, "topk+sort+index_select": aten},
                bytes=batch_size * (num_tokens * 4 + 2 * k * row + 8 * k),
                tolerance=(0, 0),
                min_copies=64,
                reach=reach,
                note="float32 scores without ties, so that both select the same tokens",
            )
