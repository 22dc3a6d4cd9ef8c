# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_budget against Ada-KV's and kvpress's steps in torch: one flat top-k over heads, lists padded without a wait."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator


def padded(score: Tensor, num_kept: Tensor, max_k: int) -> tuple[Tensor, Tensor]:
    """List the best ``num_kept`` tokens of each head, ascending."""
    num_tokens = score.shape[-1]
    order = score.topk(max_k).indices
    order = order.masked_fill(torch.arange(max_k, device=score.device) >= num_kept[..., None], num_tokens)
    kept_idx = order.sort().values
    return kept_idx.masked_fill(kept_idx == num_tokens, -1), num_kept.int()


def exact(score: Tensor, budget: int, alpha: float, max_k: int) -> tuple[Tensor, Tensor]:
    """Floors get the largest value, then all heads compete."""
    if alpha > 0:
        safe = score.topk(int(budget * alpha)).indices
        score = score.scatter(-1, safe, score.gather(-1, safe) + 1e6)
    heads, num_tokens = score.shape[1:]
    won = score.flatten(1).topk(heads * budget, sorted=False).indices // num_tokens
    num_kept = torch.zeros_like(score[..., 0]).scatter_add_(1, won, torch.ones_like(won, dtype=score.dtype))
    return padded(score, num_kept, max_k)


def rounded(score: Tensor, budget: int, alpha: float, max_k: int) -> tuple[Tensor, Tensor]:
    """The counts of a flat top-k, blended with the floor."""
    heads, num_tokens = score.shape[1:]
    won = score.flatten(1).topk(heads * budget, sorted=False).indices // num_tokens
    num_kept = torch.zeros_like(score[..., 0]).scatter_add_(1, won, torch.ones_like(won, dtype=score.dtype))
    return padded(score, (num_kept * (1 - alpha) + int(budget * alpha)).round().clamp(max=max_k), max_k)


@dataclass
class Problem:
    """Scores without ties, heads of different strength."""

    shape: tuple[int, int, int]
    budget: int
    alpha: float
    rule: str
    max_k: int
    core: bool = False

    def make(self, i: int, device: str) -> tuple[Tensor]:
        """Draw one copy of the scores."""
        order = torch.rand(self.shape[0], self.shape[1] * self.shape[2], generator=generator(device, i), device=device)
        score = order.argsort(-1).reshape(self.shape).float()  # whole numbers below 2^24, none twice
        return (score,)


def problems() -> Iterator[Problem]:
    """Yield the layer of an 8B model at 16K and a longer one, as kvpress and as Ada-KV cut it."""
    yield Problem((1, 8, 16384), 1024, 0.2, "exact", 4096, core=True)
    yield Problem((1, 8, 16384), 1024, 0.2, "rounded", 4096)
    yield Problem((1, 8, 131072), 2048, 0.0, "exact", 8192)
    yield Problem((4, 8, 4096), 512, 0.2, "exact", 2048)


def smoke_problems() -> Iterator[Problem]:
    """Yield one of each, tiny."""
    yield Problem((2, 3, 50), 9, 0.3, "exact", 27)
    yield Problem((2, 3, 50), 9, 0.3, "rounded", 27)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    for p in smoke_problems() if smoke else problems():
        options = {"alpha": p.alpha, "rule": p.rule, "max_k": p.max_k}
        steps = exact if p.rule == "exact" else rounded
        yield Case(
            op="select_budget",
            name=f"{p.shape} budget {p.budget}, alpha {p.alpha:g}, {p.rule}",
            dtype="float32",
            make=lambda i, p=p: p.make(i, device),
            call=lambda score, p=p, options=options: ((score, p.budget), options),
            run={
                "tokred": lambda score, p=p, options=options: tokred.select_budget(score, p.budget, **options),
                "flat topk": lambda score, p=p, steps=steps: steps(score, p.budget, p.alpha, p.max_k),
            },
            tolerance=(0, 0),
            min_copies=4,
            core=device == "cuda" and p.core,
        )
