# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""block_summary against mean and aminmax of unflattened keys."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def unflattened(k: Tensor, block_size: int, reduce: str) -> Any:
    blocks = k.unflatten(2, (-1, block_size))
    if reduce == "mean":
        return blocks.mean(3)
    return blocks.amin(3), blocks.amax(3)


def make(i: int, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor]:
    return (torch.randn(*shape, generator=generator(device, i), device=device).to(dtype),)


def ours(block_size: int, reduce: str, k: Tensor) -> Any:
    return tokred.block_summary(k, block_size, reduce=reduce)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: means of 64 (NSA), bounds of 16 (Quest) of 8 heads of a long K."""
    cuda = device == "cuda"
    length = 64 if smoke else 131072 if cuda else 32768
    for dtype in (torch.bfloat16, torch.float32):
        for block_size, reduce in ((64, "mean"), (16, "minmax")):
            yield Case(
                op="block_summary",
                name=f"{reduce} of {block_size}: 1 x 8 x {length} x 128",
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, shape=(1, 8, length, 128)),
                call=lambda k, block_size=block_size, reduce=reduce: ((k, block_size), {"reduce": reduce}),
                run={
                    "tokred": partial(ours, block_size, reduce),
                    "unflatten": partial(unflattened, block_size=block_size, reduce=reduce),
                },
                core=cuda and dtype == torch.bfloat16 and reduce == "minmax",
            )
