# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""sinkhorn against plain-domain versions that start from reduced costs, batched and by problem, and against logarithms."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

ROUNDS = 50  # all of them in every candidate: to stop early, torch has to wait for the device


def make(i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[Tensor]:
    """1 - cosine of dropped and kept tokens of a frame, which share a direction, as those of encoders do; eps as in AOT."""
    batch_size = shape[0]
    options = {"generator": generator(device, i), "device": device}
    common = torch.randn(batch_size, 1, 64, **options)
    rows, cols = (
        torch.nn.functional.normalize(torch.randn(batch_size, n, 64, **options) + common, dim=2) for n in shape[1:]
    )
    return ((1 - rows @ cols.mT).to(dtype),)


def plain(cost: Tensor) -> tuple[Tensor, None]:
    """Rounds of two matrix-vector products each; the rows' least costs keep the kernel from underflow."""
    batch_size, num_rows, num_cols = cost.shape
    cost = cost.float()
    kernel = ((cost.amin(2, keepdim=True) - cost) / 0.1).exp()
    v = kernel.new_ones(batch_size, num_cols, 1)
    for _ in range(ROUNDS):
        u = 1 / num_rows / torch.bmm(kernel, v)
        v = 1 / num_cols / torch.bmm(kernel.mT, u)
    return u * kernel * v.mT, None


def plain_by_problem(cost: Tensor) -> tuple[Tensor, None]:
    """The same, one problem after the other: on a CPU a kernel that stays in the cache, and no batched product."""
    num_rows, num_cols = cost.shape[1:]
    plans = []
    for one in cost.float():
        kernel = ((one.amin(1, keepdim=True) - one) / 0.1).exp()
        v = kernel.new_ones(num_cols)
        for _ in range(ROUNDS):
            u = 1 / num_rows / torch.mv(kernel, v)
            v = 1 / num_cols / torch.mv(kernel.T, u)
        plans.append(u[:, None] * kernel * v)
    return torch.stack(plans), None


def logs(cost: Tensor) -> tuple[Tensor, None]:
    """Rounds of two logsumexps; what plain-domain code is exchanged for where eps is small."""
    batch_size, num_rows, num_cols = cost.shape
    logit = -cost.float() / 0.1
    a, b = -math.log(num_rows), -math.log(num_cols)
    g = logit.new_zeros(batch_size, 1, num_cols)
    for _ in range(ROUNDS):
        f = a - torch.logsumexp(logit + g, 2, keepdim=True)
        g = b - torch.logsumexp(logit + f, 1, keepdim=True)
    return (logit + f + g).exp(), None


OPTIONS: dict[str, Any] = {"eps": 0.1, "max_rounds": ROUNDS, "tol": 0.0}


def ours(cost: Tensor) -> tuple[Tensor, Tensor]:
    return tokred.sinkhorn(cost, **OPTIONS)


def call(cost: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (cost,), OPTIONS


def compared(out: tuple[Tensor, Any], *inputs: object) -> Tensor:
    return out[0]


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    # AOT within the frames of a clip, and one of its steps in time
    shapes = [(2, 5, 18), (2, 20, 40)] if smoke else [(32, 603, 126), (8, 34, 34)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16) if shape == shapes[0] else (torch.float32,):
            run = {"tokred": ours, "plain domain": plain}
            if device == "cpu":
                run["plain domain, by problem"] = plain_by_problem
            if shape != shapes[0]:  # takes seconds
                run["logarithms"] = logs
            yield Case(
                op="sinkhorn",
                name=f"{' x '.join(map(str, shape))}, {ROUNDS} rounds",
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, shape=shape),
                run=run,
                call=call,
                compare=compared,
                tolerance=(1e-3, 1e-4 / (shape[1] * shape[2])),
                reach=1.5 if device == "cpu" and dtype == torch.float32 and not smoke and shape == shapes[0] else None,
                core=device == "cuda" and dtype == torch.float32,
            )
