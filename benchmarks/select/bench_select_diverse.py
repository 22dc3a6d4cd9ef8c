# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_diverse against greedy loops in torch, and against the bare matrix product that they begin with.

The aim is set against that product in float32: at most 1.15 times its time for everything, and the picks, which are what
tokred takes beyond its first pick alone, at most 5% of it.

CUDA has not been measured. Expected for 576 x 1024 keep 64 (aim: 90 us): three launches, about 5 us for norms and tiles
(29 blocks, 16 steps of 64 x 128 x 64 each), and 64 picks of about 0.4 us, a row of 2.3 KiB from L2 and one barrier: some
40 us.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def distances(x: Tensor) -> Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    return 1 - unit @ unit.T


def released(x: Tensor, k: int) -> Tensor:
    """DivPrune's steps as published: the minimum over the rows of all picks so far, gathered anew for each pick."""
    d = distances(x[0])
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    picks[0] = d.topk(2, dim=0, largest=False).values[1].argmax()
    for i in range(1, k):
        picks[i] = d.index_select(0, picks[:i]).amin(0).argmax()
    return picks.sort().values[None]


def incremental(x: Tensor, k: int) -> Tensor:
    """The same with a running minimum, and picked tokens masked."""
    d = distances(x[0])
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    picks[0] = d.topk(2, dim=0, largest=False).values[1].argmax()
    state = torch.full_like(d[0], torch.inf)
    for i in range(1, k):
        torch.minimum(state, d.index_select(0, picks[i - 1 : i])[0], out=state)
        state.index_fill_(0, picks[i - 1 : i], -1)
        picks[i] = state.argmax()
    return picks.sort().values[None]


def incremental_mmr(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """IDPruner's steps: importance minus the largest similarity to a pick."""
    s = 1 - distances(x[0])
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    picks[0] = weight[0].argmax()
    state = torch.full_like(s[0], -torch.inf)
    for i in range(1, k):
        torch.maximum(state, s.index_select(0, picks[i - 1 : i])[0], out=state)
        state.index_fill_(0, picks[i - 1 : i], torch.inf)
        picks[i] = (0.5 * weight[0] - 0.5 * state).argmax()
    return picks.sort().values[None]


def gram(x: Tensor, *rest: Any) -> Tensor:
    """The bare product. Its time does not depend on the values, so they are not normalised first."""
    x = x.float()
    return x @ x.transpose(1, 2)


def first_pick(x: Tensor, *rest: Any) -> Tensor:
    return tokred.select_diverse(x, 1)


def ours_mmr(x: Tensor, weight: Tensor, k: int) -> Tensor:
    return tokred.select_diverse(x, k, rule="mmr", weight=weight)


def call_mmr(x: Tensor, weight: Tensor, k: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, k), {"rule": "mmr", "weight": weight}


def spread_of(kept_idx: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Mean distance of a kept token to its nearest kept one: near ties may be picked in another order."""
    kept = torch.nn.functional.normalize(x.double(), dim=-1)
    kept = kept.gather(1, kept_idx[..., None].expand(-1, -1, x.shape[2]))
    similar = kept @ kept.transpose(1, 2)
    similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return 1 - similar.amax(2).mean(1)


def make(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int, weighted: bool
) -> tuple[Any, ...]:
    random = generator(device, i)
    # Tokens of an image share much of their direction and come in groups.
    centres = torch.randn(shape[0], 24, shape[2], generator=random, device=device)
    group = torch.randint(24, (shape[0], shape[1], 1), generator=random, device=device).expand(-1, -1, shape[2])
    x = torch.randn(*shape, generator=random, device=device) + centres.gather(1, group) + 1
    weight = torch.rand(*shape[:2], generator=random, device=device)
    return (x.to(dtype), weight, k) if weighted else (x.to(dtype), k)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: shape, how many are picked, by which rule."""
    # CLIP-L (encoder width), LLaVA-1.5 (projector), LLaVA-NeXT
    sizes = [((1, 576, 1024), 64), ((1, 576, 4096), 58), ((1, 2880, 4096), 288)]
    if device == "cuda":
        sizes += [((32, 576, 1024), 64), ((1, 6272, 3584), 627)]
    if smoke:
        sizes = [((1, 60, 32), 9)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, k in sizes:
            for rule in ("max_min", "mmr"):
                aimed = device == "cpu" and rule == "max_min"
                if shape[0] > 1:
                    loops: dict[str, Any] = {}  # the loops are written for one image
                elif rule == "mmr":
                    loops = {"running maximum": incremental_mmr}
                else:
                    loops = {"DivPrune's loop": released, "running minimum": incremental}
                yield Case(
                    op="select_diverse",
                    name=f"({', '.join(map(str, shape))}) keep {k}, {rule}",
                    dtype=dtype_word(dtype),
                    make=partial(make, device=device, dtype=dtype, shape=shape, k=k, weighted=rule == "mmr"),
                    run={
                        "tokred": tokred.select_diverse if rule == "max_min" else ours_mmr,
                        **loops,
                        "Gram alone": gram,
                        **({"first pick alone": first_pick} if aimed else {}),
                    },
                    **({"call": call_mmr} if rule == "mmr" else {}),
                    compare=spread_of,
                    # bfloat16 loops round similarities to 8 bits and so pick worse.
                    tolerance=(1e-3, 1e-3) if dtype == torch.float32 else (3e-1, 1e-1),
                    unlike={
                        "Gram alone": "no picks at all: products of all pairs in float32, not normalised",
                        **({"first pick alone": "tokred itself, one pick"} if aimed else {}),
                    },
                    against="Gram alone",
                    reach=0.87 if aimed else None,
                    core=device == "cuda" and dtype == torch.bfloat16 and rule == "max_min" and shape[1] != 6272,
                )
