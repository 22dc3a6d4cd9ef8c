# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pair_reduce against the product of all pairs in torch, followed by the formula, and against that product alone.

CUDA has not been measured. Expected, bfloat16, PiToMe's energy of 32 x 576 x 576 x 64: 1.4 GFLOP in 288 blocks of one
share, some 10 us, of which the exponentials of 10.6 million pairs take 3.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return normalize(x, dim=-1) @ normalize(y, dim=-1).transpose(-1, -2)


def formula(x: Tensor, y: Tensor, fn: str, param: float) -> Tensor:
    """The method's steps in eager torch, in the dtype of x."""
    s = cosines(x, y)
    if fn == "elu_margin":
        return elu(s - param).mean(-1).float()
    if fn == "softmax_mean":
        return (s * (s / param).softmax(-1)).sum(-1).float()
    return (s > param).sum(-1).float()


def product(x: Tensor, y: Tensor, fn: str, param: float) -> Tensor:
    return x @ y.transpose(-1, -2)


def make(i: int, device: str, dtype: torch.dtype, x: tuple[int, ...], y: tuple[int, ...], fn: str, param: float) -> Any:
    random = generator(device, i)
    return (*(torch.randn(*shape, generator=random, device=device).to(dtype) for shape in (x, y)), fn, param)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: x, y, function, param, reach."""
    # PiToMe on ViT-B at 384; FlashVLM's patches and words; TokenCorrCompressor's keys of a sub-image
    sizes: list[tuple[tuple[int, ...], tuple[int, ...], str, float, float | None]] = [
        ((8, 576, 64), (8, 576, 64), "elu_margin", 0.5, 1.0),
        ((1, 576, 4096), (1, 64, 4096), "softmax_mean", 0.05, 1.0),
        ((4, 1025, 1024), (4, 1025, 1024), "count_above", 0.05, 1.0),
    ]
    if device == "cuda":
        sizes[0] = ((32, 576, 64), (32, 576, 64), "elu_margin", 0.5, None)
        sizes = [(*size[:4], None) for size in sizes]
    if smoke:
        sizes = [((1, 20, 32), (1, 30, 32), "elu_margin", 0.5, None)]
    for dtype in (torch.float32, torch.bfloat16):
        for x, y, fn, param, reach in sizes:
            yield Case(
                op="pair_reduce",
                name=f"({', '.join(map(str, x))}) with {y[-2]}, {fn}",
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, x=x, y=y, fn=fn, param=param),
                run={"tokred": tokred.pair_reduce, "product, formula": formula, "matrix product alone": product},
                # Similarities within rounding of a threshold fall on either side, so that counts agree on average;
                # bfloat16 formulas round everything.
                compare=(lambda out, *inputs: out.mean(-1) / 1025) if fn == "count_above" else lambda out, *inputs: out,
                tolerance=(1e-3, 2e-3) if dtype == torch.float32 else (5e-2, 3e-2),
                unlike={"matrix product alone": "nothing is reduced: similarities of vectors that are not normalised"},
                reach=reach if dtype == torch.float32 else None,
                core=device == "cuda" and dtype == torch.bfloat16 and fn == "elu_margin",
            )
