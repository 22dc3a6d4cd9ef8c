# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""list_union against a sort with repeats moved to the end, and against a mask over all positions."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator


def by_sort(lists: Tensor, num_kv_heads: int, kv_len: int) -> tuple[Tensor, Tensor]:
    order = lists.view(lists.shape[0], num_kv_heads, -1).sort().values
    again = torch.zeros_like(order, dtype=torch.bool)
    again[..., 1:] = order[..., 1:] == order[..., :-1]
    order = order.masked_fill(again, kv_len).sort().values
    return order.masked_fill(order == kv_len, -1), (~again).sum(-1, dtype=torch.int32)


def by_mask(lists: Tensor, num_kv_heads: int, kv_len: int) -> tuple[Tensor, Tensor]:
    groups = lists.view(lists.shape[0], num_kv_heads, -1)
    mask = torch.zeros(*groups.shape[:2], kv_len, dtype=torch.bool, device=lists.device).scatter_(2, groups, True)
    place = torch.arange(kv_len, device=lists.device)
    order = torch.where(mask, place, kv_len).topk(groups.shape[2], largest=False).values
    return order.masked_fill(order == kv_len, -1), mask.sum(-1, dtype=torch.int32)


def make(i: int, device: str, shape: tuple[int, int, int], num_kv_heads: int, kv_len: int) -> tuple[Tensor, int, int]:
    random = generator(device, i)
    shared = torch.randn(shape[0], num_kv_heads, 1, kv_len, generator=random, device=device)
    own = torch.randn(shape[0], num_kv_heads, shape[1] // num_kv_heads, kv_len, generator=random, device=device)
    return tokred.select_topk((shared + own).flatten(1, 2), shape[2]), num_kv_heads, kv_len  # heads agree in part


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: 32 query heads on 8 kv heads."""
    sizes = [((1, 32, 2048), 8, 32768), ((8, 32, 1024), 8, 8192)]
    for shape, num_kv_heads, kv_len in [((1, 4, 9), 2, 64)] if smoke else sizes:
        yield Case(
            op="list_union",
            name=f"{shape} on {num_kv_heads} of {kv_len}",
            dtype="int64",
            make=partial(make, device=device, shape=shape, num_kv_heads=num_kv_heads, kv_len=kv_len),
            call=lambda lists, num_kv_heads, kv_len: ((lists, num_kv_heads), {"kv_len": kv_len}),
            run={
                "tokred": lambda lists, num_kv_heads, kv_len: tokred.list_union(lists, num_kv_heads, kv_len=kv_len),
                "sort": by_sort,
                "mask+topk": by_mask,
            },
            core=device == "cuda" and shape[0] == 1,
        )
