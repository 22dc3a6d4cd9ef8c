# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""scatter_tokens against ATen: clone and index_copy on flattened rows (unique ids); scatter for lists per head."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def index_copy(x: Tensor, kept_idx: Tensor, base: Tensor) -> list[Tensor]:
    batch_size, num_tokens, dim = base.shape
    first = torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device)[:, None]
    out = base.clone()
    out.view(-1, dim).index_copy_(0, (kept_idx + first).flatten(), x.reshape(-1, dim))
    return [out]


def scatter(x: Tensor, kept_idx: Tensor, num_tokens: int) -> list[Tensor]:
    batch_size, num_heads, _, dim = x.shape
    index = kept_idx[..., None].expand(-1, -1, -1, dim)
    return [x.new_zeros((batch_size, num_heads, num_tokens, dim)).scatter_(2, index, x)]


def kept_lists(shape: tuple[int, ...], num_tokens: int, k: int, random: torch.Generator) -> Tensor:
    return torch.rand(*shape, num_tokens, generator=random, device=random.device).topk(k).indices.sort().values


def make_layer(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    random = generator(device, i)
    base = torch.randn(*shape, generator=random, device=device).to(dtype)
    x = torch.randn(shape[0], k, shape[2], generator=random, device=device).to(dtype)
    return x, kept_lists(shape[:1], shape[1], k, random), base


def make_heads(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int
) -> tuple[Tensor, Tensor, int]:
    random = generator(device, i)
    x = torch.randn(1, shape[0], k, shape[2], generator=random, device=device).to(dtype)
    return x, kept_lists((1, shape[0]), shape[1], k, random), shape[1]


def over(x: Tensor, kept_idx: Tensor, base: Tensor) -> list[Tensor]:
    return tokred.scatter_tokens([x], kept_idx, base=[base])


def onto_zeros(x: Tensor, kept_idx: Tensor, num_tokens: int) -> list[Tensor]:
    return tokred.scatter_tokens([x], kept_idx, num_tokens=num_tokens)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    cuda = device == "cuda"
    # STC's attention output of 8 frames; LLaVA-NeXT's layer; the heads of Token Sparse Attention
    layers, heads = [((8, 729, 1152), 182), ((1, 2880, 4096), 320)], [((32, 16384, 128), 4096)]
    if smoke:
        layers, heads = [((1, 40, 64), 10)], [((2, 60, 16), 10)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, k in layers:
            yield Case(
                op="scatter_tokens",
                name=f"over a base: {shape[0]} x {k} -> {shape[1]} x {shape[2]}",
                dtype=dtype_word(dtype),
                make=partial(make_layer, device=device, dtype=dtype, shape=shape, k=k),
                run={"tokred": over, "clone+index_copy": index_copy},
                call=lambda x, kept_idx, base: (([x], kept_idx), {"base": [base]}),
                tolerance=(0, 0),
            )
        for shape, k in heads:
            yield Case(
                op="scatter_tokens",
                name=f"per head, onto zeros: {shape[0]} x {k} -> {shape[1]} x {shape[2]}",
                dtype=dtype_word(dtype),
                make=partial(make_heads, device=device, dtype=dtype, shape=shape, k=k),
                run={"tokred": onto_zeros, "zeros+scatter": scatter},
                call=lambda x, kept_idx, num_tokens: (([x], kept_idx), {"num_tokens": num_tokens}),
                tolerance=(0, 0),
                core=cuda and dtype == torch.bfloat16,
                note="on CUDA a launch that turns the lists around comes first; expected 42 us in bfloat16 at 4.3 TB/s",
            )
