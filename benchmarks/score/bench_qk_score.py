# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""qk_score against the matrix product that eager code makes, of grouped queries and of repeated keys."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def grouped_matmul(q: Tensor, k: Tensor) -> Tensor:
    """One product per kv head; the scores come in the dtype of the inputs."""
    return (q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.transpose(2, 3)).view(*q.shape[:3], k.shape[2])


def gemfilter(q: Tensor, k: Tensor) -> Tensor:
    """The released scoring: keys repeated to all query heads, one product, the sum over heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.transpose(2, 3)).sum(1)


def indexer(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    return (weight @ grouped_matmul(q, k)[:, :, 0].relu().float()) * q.shape[-1] ** -0.5


PEERS = {
    "": ("matmul", grouped_matmul),
    "summed": ("repeat+matmul+sum", gemfilter),
    "indexer": ("matmul+relu+sum", indexer),
}


def arguments(kind: str, q: Tensor, k: Tensor, *weight: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kind == "indexer":
        return (q, k), {"relu": True, "head_weight": weight[0], "sum_heads": True, "scale": q.shape[-1] ** -0.5}
    return (q, k), {"sum_heads": kind == "summed"}


def ours(kind: str, *inputs: Tensor) -> Tensor:
    args, kwargs = arguments(kind, *inputs)
    return tokred.qk_score(*args, **kwargs)


def make(
    i: int, device: str, dtype: torch.dtype, heads: tuple[int, int], kv_len: int, weighted: bool
) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"generator": generator(device, i), "device": device}
    q = torch.randn(1, heads[0], 1, 128, **options).to(dtype)
    k = torch.randn(1, heads[1], kv_len, 128, **options).to(dtype)
    return (q, k, torch.randn(1, 1, heads[0], **options)) if weighted else (q, k)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: one query of MHA, GQA and DSA's indexer; heads apart and summed."""
    cuda = device == "cuda"
    long = 131072 if cuda else 32768
    sizes = [("", (8, 8), 32768), ("", (32, 8), long), ("summed", (32, 8), long), ("indexer", (64, 1), long)]
    if smoke:
        sizes = [("", (4, 2), 70), ("summed", (4, 2), 70), ("indexer", (4, 1), 70)]
    for dtype in (torch.bfloat16, torch.float32):
        for kind, heads, kv_len in sizes:
            name, peer = PEERS[kind]
            weighted = kind == "indexer"
            yield Case(
                op="qk_score",
                name=f"{kind} {heads[0]}/{heads[1]} d128 x {kv_len}".strip(),
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, heads=heads, kv_len=kv_len, weighted=weighted),
                call=partial(arguments, kind),
                run={"tokred": partial(ours, kind), name: peer},
                # bfloat16: the peers round logits of 11 or so (2^-9 of each), and their sums over heads.
                tolerance=(1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 2.0 if kind else 1e-2),
                core=cuda and dtype == torch.bfloat16 and heads == (32, 8) and not kind,
            )
