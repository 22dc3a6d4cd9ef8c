# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""gather_tokens against ATen: index_select on flattened rows, tensor by tensor; gather for lists per head."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def index_select(tensors: list[Tensor], kept_idx: Tensor) -> list[Tensor]:
    batch_size, k = kept_idx.shape
    out = []
    for x in tensors:
        first = torch.arange(0, batch_size * x.shape[1], x.shape[1], device=x.device)[:, None]
        rows = (kept_idx + first).flatten()
        out.append(x.flatten(0, 1).index_select(0, rows).unflatten(0, (batch_size, k)))
    return out


def fancy(tensors: list[Tensor], kept_idx: Tensor) -> list[Tensor]:
    batch = torch.arange(kept_idx.shape[0], device=kept_idx.device)[:, None]
    return [x[batch, kept_idx] for x in tensors]


def gather(tensors: list[Tensor], kept_idx: Tensor) -> list[Tensor]:
    return [x.gather(2, kept_idx[..., None].expand(-1, -1, -1, x.shape[3])) for x in tensors]


def kept_lists(shape: tuple[int, ...], num_tokens: int, k: int, random: torch.Generator) -> Tensor:
    scores = torch.rand(*shape, num_tokens, generator=random, device=random.device)
    return scores.topk(k).indices.sort().values


def make_layer(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int
) -> tuple[list[Tensor], Tensor]:
    random = generator(device, i)
    x = torch.randn(*shape, generator=random, device=device).to(dtype)
    positions = torch.arange(shape[1], device=device).expand(shape[0], -1).contiguous()
    return [x, positions, positions > 7], kept_lists(shape[:1], shape[1], k, random)


def make_cache(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int
) -> tuple[list[Tensor], Tensor]:
    random = generator(device, i)
    kv = [torch.randn(1, *shape, generator=random, device=device).to(dtype) for _ in range(2)]
    return kv, kept_lists((1, shape[0]), shape[1], k, random)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    cuda = device == "cuda"
    # LLaVA-NeXT's layer; on a GPU a batch whose rows are far beyond the L2 cache, too
    layers = [((1, 2880, 4096), 320), *([((8, 16384, 1024), 8192)] if cuda else [])]
    caches = [((8, 32768, 128), 4096), *([((256, 32768, 128), 4096)] if cuda else [])]  # a layer; 32 layers
    if smoke:
        layers, caches = [((1, 40, 64), 10)], [((2, 60, 16), 10)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, k in layers:
            yield Case(
                op="gather_tokens",
                name=f"hidden, positions, mask: {shape[0]} x {shape[1]} -> {k} x {shape[2]}",
                dtype=dtype_word(dtype),
                make=partial(make_layer, device=device, dtype=dtype, shape=shape, k=k),
                run={"tokred": tokred.gather_tokens, "index_select": index_select, "x[idx]": fancy},
                peers=("numpy", "cupy"),
                tolerance=(0, 0),
                core=cuda and dtype == torch.bfloat16 and (shape, k) == layers[0],  # a call's latency
            )
        for shape, k in caches:
            yield Case(
                op="gather_tokens",
                name=f"K, V per head: {shape[0]} x {shape[1]} -> {k} x {shape[2]}",
                dtype=dtype_word(dtype),
                make=partial(make_cache, device=device, dtype=dtype, shape=shape, k=k),
                run={"tokred": tokred.gather_tokens, "gather": gather},
                peers=("numpy",),
                tolerance=(0, 0),
                core=cuda and dtype == torch.bfloat16 and (shape, k) == caches[-1],  # bandwidth
            )
