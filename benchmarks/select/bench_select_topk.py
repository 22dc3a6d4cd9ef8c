# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_topk against torch.topk and what makes its result the same: a sort of the indices, a cut at each row's count."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator

PEERS = ("numpy", "flashinfer", "cub", "cupy")


def aten(score: Tensor, k: int) -> Tensor:
    return score.topk(k, sorted=False).indices.sort().values


def aten_by_score(score: Tensor, k: int, **options: Any) -> Tensor:
    return score.topk(k).indices


def aten_complement(score: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """By a scatter to counted places: ``nonzero`` would wait for the count on CUDA."""
    kept_idx, num_tokens = aten(score, k), score.shape[-1]
    rest = torch.ones_like(score, dtype=torch.bool).scatter_(-1, kept_idx, False)
    slot = torch.where(rest, rest.cumsum(-1) - 1, num_tokens - k)  # the kept ones share a slot that is cut off
    tokens = torch.arange(num_tokens, device=score.device).expand_as(slot)
    places = tokens.new_empty((*slot.shape[:-1], num_tokens - k + 1)).scatter_(-1, slot, tokens)
    return kept_idx, places[..., : num_tokens - k]


def aten_window(score: Tensor, k: int, *, keep_first: int, keep_last: int) -> Tensor:
    """Both ends are kept, the rest of the budget goes to the best between them."""
    num_tokens = score.shape[-1]
    between = aten(score[..., keep_first : num_tokens - keep_last], k - keep_first - keep_last) + keep_first
    first = torch.arange(keep_first, device=score.device).expand(*score.shape[:-1], -1)
    last = torch.arange(num_tokens - keep_last, num_tokens, device=score.device).expand(*score.shape[:-1], -1)
    return torch.cat([first, between, last], -1)


def aten_ragged(score: Tensor, k: Tensor, *, max_k: int) -> tuple[Tensor, Tensor]:
    """Of the best max_k each row's own count, sorted with the empty slots last."""
    num_tokens = score.shape[-1]
    order = score.topk(max_k).indices
    kept_idx = order.masked_fill(torch.arange(max_k, device=score.device) >= k[..., None], num_tokens).sort().values
    return kept_idx.masked_fill(kept_idx == num_tokens, -1), k.int()


@dataclass
class Problem:
    """Scores without ties, so that all select the same tokens, and how tokens are picked from them."""

    shape: tuple[int, ...]
    k: int
    aten: Callable[..., Any] = aten
    options: dict[str, Any] = field(default_factory=dict)
    reach: float | None = None
    ragged: bool = False  # a count per row, from a quarter of k to k

    def make(self, i: int, device: str) -> tuple[Tensor, int | Tensor]:
        """Draw one copy of the inputs."""
        random = generator(device, i)
        score = torch.rand(self.shape, generator=random, device=device, dtype=torch.float64).argsort(-1)
        score = score / score.shape[-1]
        if not self.ragged:
            return score.float(), self.k
        return score.float(), torch.randint(self.k // 4, self.k + 1, self.shape[:-1], generator=random, device=device)

    def name(self) -> str:
        """Say what it is in a few words."""
        words = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([f"{self.shape} keep {self.k}", *words])


def problems(cuda: bool) -> Iterator[Problem]:
    """Yield ViT-B, half of the tokens; CLIP-L to 64; a cache of 128K; long rows of a batch; then the options."""
    yield Problem((64, 197), 98, reach=6.0)
    yield Problem((8, 576), 64, reach=6.0)
    yield Problem((1, 131072), 2048, reach=15.0)
    if cuda:
        for shape, k in (((512, 576), 64), ((1, 2880), 320), ((32, 32768), 2048), ((256, 131072), 2048)):
            yield Problem(shape, k)
    yield Problem((8, 576), 64, aten_by_score, {"order": "score"})
    yield Problem((1, 36864), 7372, aten_by_score, {"order": "score"})
    yield Problem((8, 576), 64, aten_complement, {"complement": True})
    yield Problem((1, 8, 16384), 1024, aten_window, {"keep_first": 4, "keep_last": 64})
    yield Problem((1, 8, 16384), 1024, aten_ragged, {"max_k": 1024}, ragged=True)


def smoke_problems() -> Iterator[Problem]:
    """Yield one of each, tiny."""
    yield Problem((2, 50), 9)
    yield Problem((2, 50), 9, aten_by_score, {"order": "score"})
    yield Problem((2, 50), 9, aten_complement, {"complement": True})
    yield Problem((1, 2, 50), 12, aten_window, {"keep_first": 1, "keep_last": 4})
    yield Problem((1, 2, 50), 12, aten_ragged, {"max_k": 12}, ragged=True)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    cuda = device == "cuda"
    for problem in smoke_problems() if smoke else problems(cuda):
        name = "topk+sort" if problem.aten is aten else problem.aten.__name__.removeprefix("aten_") + " by topk"
        yield Case(
            op="select_topk",
            name=problem.name(),
            dtype="float32",
            make=lambda i, problem=problem: problem.make(i, device),
            call=lambda score, k, options=problem.options: ((score, k), options),
            run={
                "tokred": lambda score, k, options=problem.options: tokred.select_topk(score, k, **options),
                name: lambda score, k, problem=problem: problem.aten(score, k, **problem.options),
            },
            peers=PEERS if problem.aten is aten else (),
            tolerance=(0, 0),
            min_copies=64,
            reach=None if cuda else problem.reach,
            against=name,
            core=cuda and problem.aten is aten and problem.shape[0] not in (8, 64),
        )
