# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""run_markers against the same three lines of eager PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator


def aten(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    marker = ~keep & torch.nn.functional.pad(keep[:, 1:], (0, 1), value=True)
    return keep | marker, marker, marker.sum(1, dtype=torch.int32)


def make(i: int, device: str, shape: tuple[int, int], share: float) -> tuple[Tensor]:
    return (torch.rand(shape, generator=generator(device, i), device=device) < share,)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: a 4K screenshot, alone and in a batch."""
    for shape in [(2, 40)] if smoke else [(1, 6400), (64, 6400)]:
        yield Case(
            op="run_markers",
            name=f"{shape[0]} x {shape[1]}, keep 30%",
            dtype="bool",
            make=partial(make, device=device, shape=shape, share=0.3),
            run={"tokred": tokred.run_markers, "eager": aten},
            core=device == "cuda" and shape[0] == 1,
            note="on CUDA what a launch costs",
        )
