# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_expand against ATen: gather with an expanded index, and index_select on flattened rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case


def gather(y: Tensor, dst_idx: Tensor) -> Tensor:
    return y.gather(1, dst_idx[..., None].expand(*dst_idx.shape, y.shape[2]))


def index_select(y: Tensor, dst_idx: Tensor) -> Tensor:
    first = torch.arange(0, y.shape[0] * y.shape[1], y.shape[1], device=y.device)[:, None]
    return y.flatten(0, 1).index_select(0, (dst_idx + first).flatten()).unflatten(0, dst_idx.shape)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    shapes = [(2, 4096, 2048, 640), (32, 577, 289, 1024), (1, 65536, 32768, 1024)]
    for dtype in (torch.float32, torch.bfloat16):
        for batch_size, num_tokens, num_out, dim in [(2, 40, 7, 16)] if smoke else shapes:

            def make(i: int, shape=(batch_size, num_tokens, num_out, dim), dtype=dtype) -> tuple[Tensor, Tensor]:
                generator = torch.Generator().manual_seed(i)
                y = torch.randn(shape[0], shape[2], shape[3], generator=generator).to(device, dtype)
                return y, torch.randint(0, shape[2], shape[:2], generator=generator).to(device)

            yield Case(
                op="segment_expand",
                name=f"{batch_size} x {num_out} -> {num_tokens} x {dim}",
                dtype=str(dtype).removeprefix("torch."),
                make=make,
                run={"tokred": tokred.segment_expand, "gather": gather, "index_select": index_select},
                bytes=batch_size * (num_tokens + num_out) * dim * dtype.itemsize,
                tolerance=(0, 0),
            )
