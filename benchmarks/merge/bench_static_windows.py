# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""static_windows against the dynamic programme in Python: as its formula reads, and with as few torch ops as there can be."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator

TAU = 0.8


def loop(similarity: Tensor, *rest: Any) -> Tensor:
    """The saving of the best division, a gain at a time."""
    saved = []
    for video in similarity > TAU:
        best = [0, 0]
        for last in range(1, video.shape[0] + 1):
            gains = (int(video[s:last].all(0).sum()) * (last - s) for s in range(last))
            best.append(max(best[last], *(best[s] + gain for s, gain in enumerate(gains))))
        saved.append(best[-1])
    return torch.tensor(saved, device=similarity.device).clone()


def by_runs(similarity: Tensor, *rest: Any) -> Tensor:
    """The same with all gains of a first frame at once; the programme itself on the host's numbers."""
    saved = []
    for video in similarity > TAU:
        best = [0, 0]
        gains = []
        for start in range(video.shape[0]):
            runs = video[start:].cumprod(0).sum(1)
            gains.append((runs * torch.arange(1, runs.shape[0] + 1, device=runs.device)).tolist())
        for last in range(1, video.shape[0] + 1):
            best.append(max(best[last], *(best[s] + gains[s][last - 1 - s] for s in range(last))))
        saved.append(best[-1])
    return torch.tensor(saved, device=similarity.device).clone()


def num_saved(out: Any, *inputs: Any) -> Tensor:
    return out[2] if isinstance(out, tuple) else out


def make(i: int, device: str, shape: tuple[int, int, int]) -> tuple[Tensor, float]:
    """Positions stay similar for about ten frames, and now and then the scene changes."""
    random = generator(device, i)
    moves = torch.rand(shape, generator=random, device=device) < 0.1
    cuts = torch.rand((*shape[:2], 1), generator=random, device=device) < 0.1
    return (moves | cuts).logical_not().float(), TAU


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: LLaVA-OneVision's 32 frames of 14 x 14, alone and in a batch; a long video."""
    for shape in [(2, 5, 9)] if smoke else [(1, 31, 196), (8, 31, 196), (1, 255, 196)]:
        yield Case(
            op="static_windows",
            name=f"{shape[0]} x {shape[1] + 1} frames x {shape[2]}",
            dtype="float32",
            make=partial(make, device=device, shape=shape),
            run={
                "tokred": tokred.static_windows,
                "runs by torch, loop": by_runs,
                **({"Python loop": loop} if shape[1] < 100 else {}),
            },
            compare=num_saved,
            reach=50.0 if device == "cpu" and shape[1] == 31 else None,
            against="Python loop" if shape[1] < 100 else "",
            core=device == "cuda" and shape[0] == 1 and shape[1] == 31,
            note="the loops find the saving alone, neither windows nor masks",
        )
