# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_expand against ATen: gather with an expanded index, and index_select on flattened rows."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def gather(y: Tensor, dst_idx: Tensor) -> Tensor:
    return y.gather(1, dst_idx[..., None].expand(*dst_idx.shape, y.shape[2]))


def index_select(y: Tensor, dst_idx: Tensor) -> Tensor:
    first = torch.arange(0, y.shape[0] * y.shape[1], y.shape[1], device=y.device)[:, None]
    return y.flatten(0, 1).index_select(0, (dst_idx + first).flatten()).unflatten(0, dst_idx.shape)


def make_inputs(i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    batch_size, num_tokens, num_out, dim = shape
    random = generator(device, i)
    y = torch.randn(batch_size, num_out, dim, generator=random, device=device).to(dtype)
    return y, torch.randint(0, num_out, (batch_size, num_tokens), generator=random, device=device)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: batch_size, num_tokens, num_out, dim."""
    # Stable Diffusion with ToMeSD; ViT-L at 336; a long sequence
    shapes = [(2, 4096, 2048, 640), (32, 577, 289, 1024), (1, 65536, 32768, 1024)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in [(2, 40, 7, 16)] if smoke else shapes:
            batch_size, num_tokens, num_out, dim = shape
            yield Case(
                op="segment_expand",
                name=f"{batch_size} x {num_out} -> {num_tokens} x {dim}",
                dtype=dtype_word(dtype),
                make=partial(make_inputs, device=device, dtype=dtype, shape=shape),
                run={"tokred": tokred.segment_expand, "gather": gather, "index_select": index_select},
                tolerance=(0, 0),
                core=device == "cuda" and dtype == torch.bfloat16 and shape[0] != 2,
            )
