# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_rule against sorts, sums and masks of torch, with lists padded without a wait for the device.

Draws are left out: torch.multinomial draws anew in each call, so that no result could be checked.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator


def listed(keep: Tensor, max_k: int) -> tuple[Tensor, Tensor]:
    """Turn a mask into ascending lists and counts: ``nonzero`` would wait for the count on CUDA."""
    num_tokens = keep.shape[-1]
    tokens = torch.arange(num_tokens, device=keep.device).expand_as(keep)
    slot = torch.where(keep, keep.cumsum(-1) - 1, max_k).clamp(max=max_k)
    lists = tokens.new_full((*keep.shape[:-1], max_k + 1), -1).scatter_(-1, slot, tokens)
    return lists[..., :max_k], keep.sum(-1, dtype=torch.int32)


def best(score: Tensor, count: Callable[[Tensor], Tensor], max_k: int) -> tuple[Tensor, Tensor]:
    """List the best ``count(sorted scores)`` tokens of each row."""
    value, order = score.sort(dim=-1, descending=True)
    num_kept = count(value).clamp(max=max_k).int()
    place = torch.arange(max_k, device=score.device)
    lists = order[..., :max_k].masked_fill(place >= num_kept[..., None], score.shape[-1]).sort().values
    return lists.masked_fill(lists == score.shape[-1], -1), num_kept


def top_p(score: Tensor, share: float, max_k: int) -> tuple[Tensor, Tensor]:
    return best(score, lambda value: (value.softmax(-1).cumsum(-1) <= share).sum(-1) + 1, max_k)


def coverage(score: Tensor, share: float, max_k: int) -> tuple[Tensor, Tensor]:
    return best(score, lambda v: (v.cumsum(-1) < share * v.sum(-1, keepdim=True)).sum(-1) + 1, max_k)


def at_share(value: Tensor, share: float) -> Tensor:
    """Interpolate a quantile of sorted scores."""
    place = share * (value.shape[-1] - 1)
    low, high = value[..., math.floor(place)], value[..., math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def iqr(score: Tensor, factor: float, max_k: int) -> tuple[Tensor, Tensor]:
    value = score.sort(dim=-1).values
    first, third = at_share(value, 0.25), at_share(value, 0.75)
    return listed(score > (third + factor * (third - first))[..., None], max_k)


def quantile(score: Tensor, share: float, max_k: int) -> tuple[Tensor, Tensor]:
    return listed(score >= at_share(score.sort(dim=-1).values, share)[..., None], max_k)


def threshold(score: Tensor, bound: float, max_k: int) -> tuple[Tensor, Tensor]:
    return listed(score >= bound, max_k)


@dataclass
class Problem:
    """Softmax scores and a rule."""

    shape: tuple[int, ...]
    rule: str
    value: float
    aten: Callable[..., Any]
    max_k: int | None = None
    temperature: float | None = None
    core: bool = False

    def make(self, i: int, device: str) -> tuple[Tensor]:
        """Draw one copy of the scores; logits where the rule takes their softmax."""
        logits = 2 * torch.randn(self.shape, generator=generator(device, i), device=device)
        return (logits if self.temperature is not None else logits.softmax(-1),)

    def name(self) -> str:
        """Say what it is in a few words."""
        return f"{self.shape} {self.rule} {self.value:g}" + (f" at most {self.max_k}" if self.max_k else "")


def problems(cuda: bool) -> Iterator[Problem]:
    """Yield PruMerge's count on CLIP-L; SliME's top-p of four crops; a cache of 128K by coverage; the other rules."""
    yield Problem((8, 576), "iqr", 1.5, iqr)
    yield Problem((8, 2304), "top_p", 0.95, top_p, temperature=1.0)
    yield Problem((1, 131072), "coverage", 0.9, coverage, max_k=65536, core=True)
    if cuda:
        yield Problem((64, 32768), "coverage", 0.9, coverage, max_k=16384)
    yield Problem((8, 576), "threshold", 1 / 576, threshold)
    yield Problem((32, 577), "quantile", 0.9, quantile)


def smoke_problems() -> Iterator[Problem]:
    """Yield one of each, tiny."""
    yield Problem((2, 50), "iqr", 1.5, iqr)
    yield Problem((2, 50), "top_p", 0.9, top_p, temperature=1.0)
    yield Problem((2, 50), "coverage", 0.9, coverage)
    yield Problem((2, 50), "threshold", 0.02, threshold)
    yield Problem((2, 50), "quantile", 0.9, quantile)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    for p in smoke_problems() if smoke else problems(device == "cuda"):
        length = p.shape[-1] if p.max_k is None else p.max_k
        options = {"max_k": length, "temperature": p.temperature}
        # torch adds in float32: where a sum comes to stand at the share, the count may differ.
        summed = p.rule in ("top_p", "coverage")
        yield Case(
            op="select_rule",
            name=p.name(),
            dtype="float32",
            make=lambda i, p=p: p.make(i, device),
            call=lambda score, p=p, options=options: ((score, p.rule, p.value), options),
            run={
                "tokred": lambda score, p=p, options=options: tokred.select_rule(score, p.rule, p.value, **options),
                f"{p.rule} by torch": lambda score, p=p, length=length: p.aten(score, p.value, length),
            },
            compare=(lambda out, score: out[1].float()) if summed else (lambda out, score: out),
            tolerance=(1e-3, 1.0) if summed else (0, 0),
            min_copies=64 if p.shape[-1] < 4096 else 4,
            core=device == "cuda" and p.core,
        )
