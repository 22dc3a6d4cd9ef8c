# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pair_topk against the product of all pairs in torch, followed by topk or max, and against that product alone.

The aim is set against that product: nearest of 2880 x 2880 x 1024 at 0.95 times its speed with a tenth of its memory.
CUDA has not been measured. Expected, bfloat16: nearest of 2880 x 2880 x 1024 does 17 GFLOP, 45 blocks of rows in 12
shares; at the 400 TFLOP/s that mma.sync reaches, 42 us, and two launches. 64 rows against a bank of 1,000,000 x 256 read
512 MB once, 110 us at 4.8 TB/s, and merge 264 lists per row.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

Found = tuple[Tensor, Tensor]


def units(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)


def product_and_topk(x: Tensor, y: Tensor, k: int) -> Found:
    x, y = units(x, y)
    value, idx = (x @ y.transpose(-1, -2)).topk(k, dim=-1)
    return value.float(), idx


def product_and_max(x: Tensor, y: Tensor, k: int) -> Found:
    x, y = units(x, y)
    value, idx = (x @ y.transpose(-1, -2)).max(dim=-1, keepdim=True)
    return value.float(), idx


def product(x: Tensor, y: Tensor, k: int) -> Tensor:
    return x @ y.transpose(-1, -2)


def similarity_of(out: Found, x: Tensor, y: Tensor, k: int) -> Tensor:
    """In float64, of what was found: rows that differ by less than rounding may be found in another order."""
    unit_x, unit_y = units(x.double(), y.double())
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    found = unit_y[out[1]] if y.dim() == 2 else unit_y[batch, out[1]]
    return torch.einsum("bnd,bnkd->bnk", unit_x, found)


def make(i: int, device: str, dtype: torch.dtype, x: tuple[int, int, int], y: tuple[int, ...], k: int) -> Any:
    random = generator(device, i)
    return (*(torch.randn(*shape, generator=random, device=device).to(dtype) for shape in (x, y)), k)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: x, y, k, reach."""
    # LLaVA-NeXT's patches; a bank of embeddings; PruMerge's centres; PiToMe's pairs
    sizes: list[tuple[tuple[int, int, int], tuple[int, ...], int, float | None]] = [
        ((1, 2880, 1024), (1, 2880, 1024), 1, 1.0),
        ((1, 64, 256), (200_000, 256), 5, 1.0),
        ((1, 64, 1024), (1, 576, 1024), 32, 1.0),
        ((16, 98, 64), (16, 98, 64), 1, 1.0),
    ]
    if device == "cuda":
        sizes = [
            ((1, 2880, 1024), (1, 2880, 1024), 1, None),
            ((1, 64, 256), (1_000_000, 256), 5, None),
            ((32, 64, 1024), (32, 576, 1024), 32, None),
        ]
    if smoke:
        sizes = [((1, 20, 32), (1, 30, 32), 1, None), ((1, 20, 32), (50, 32), 3, None)]
    for dtype in (torch.float32, torch.bfloat16):
        for x, y, k, reach in sizes:
            formula = {"product, max": product_and_max} if k == 1 else {"product, topk": product_and_topk}
            yield Case(
                op="pair_topk",
                name=f"({', '.join(map(str, x))}) in {' x '.join(map(str, y[-2:]))}, {k}",
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, x=x, y=y, k=k),
                run={"tokred": tokred.pair_topk, **formula, "matrix product alone": product},
                compare=similarity_of,
                # bfloat16: the formulas round unit vectors and similarities, and so pick slightly worse rows.
                tolerance=(1e-5, 1e-5) if dtype == torch.float32 else (3e-2, 2e-2),
                unlike={"matrix product alone": "no selection at all: similarities of vectors that are not normalised"},
                reach=reach if dtype == torch.float32 else None,
                core=device == "cuda" and dtype == torch.bfloat16 and (k == 1 or y[0] == 1_000_000),
            )
