# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""row_similarity against torch's cosine_similarity and norms."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

TRANSITION = ("norm_ratio", "cosine")


def pair(i: int, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, *shape, generator=generator(device, i), device=device).to(dtype)
    return x, y


def frames(i: int, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    video = torch.randn(*shape, generator=generator(device, i), device=device).to(dtype)
    return video[1:], video[:-1]


def eager_cosine(x: Tensor, y: Tensor) -> Any:
    return F.cosine_similarity(x, y, dim=-1).float()


def eager_transition(x: Tensor, y: Tensor) -> Any:
    return (x.norm(dim=-1) / y.norm(dim=-1)).float(), eager_cosine(x, y)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: frames against those before (EVS), outputs against inputs (TransPrune)."""
    cuda = device == "cuda"
    video = (3, 16, 64) if smoke else (64, 1024, 3584) if cuda else (16, 256, 3584)
    prefill = (1, 50, 64) if smoke else (1, 32768, 4096) if cuda else (1, 2975, 4096)
    for dtype in (torch.bfloat16, torch.float32):
        for name, make, shape, measure, eager in (
            ("cosine of frames", frames, video, "cosine", eager_cosine),
            ("transition", pair, prefill, TRANSITION, eager_transition),
        ):
            core = cuda and dtype == torch.bfloat16 and measure == TRANSITION
            yield Case(
                op="row_similarity",
                name=f"{name}: {' x '.join(map(str, shape))}",
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, shape=shape),
                call=lambda x, y, measure=measure: ((x, y, measure), {}),
                run={"tokred": partial(tokred.row_similarity, measure=measure), "eager": eager},
                compiled=() if core else ("eager",),
                # In bfloat16 torch rounds norms, quotients and products.
                tolerance=(3e-2, 3e-2) if dtype == torch.bfloat16 else (1e-4, 1e-4),
                core=core,
            )
