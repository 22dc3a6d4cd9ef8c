# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""list_to_slots against the same arithmetic in eager PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, generator

PAGE_SIZE = 16


def aten(lists: Tensor, table: Tensor) -> Tensor:
    page = lists.div(PAGE_SIZE, rounding_mode="floor")
    valid = (lists >= 0) & (page < table.shape[1])
    tables = table[:, None].expand(-1, lists.shape[1], -1)
    slot = tables.gather(2, torch.where(valid, page, 0)) * PAGE_SIZE + lists.remainder(PAGE_SIZE).int()
    return torch.where(valid, slot, -1)


def make(i: int, device: str, shape: tuple[int, int, int], kv_len: int) -> tuple[Tensor, Tensor]:
    random = generator(device, i)
    lists = torch.randint(0, kv_len, shape, generator=random, device=device).sort(-1).values
    pages = kv_len // PAGE_SIZE
    table = torch.randperm(shape[0] * pages, generator=random, device=device, dtype=torch.int32)
    return lists, table.view(shape[0], pages)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: 2048 of 32K or 128K positions for 8 kv heads."""
    sizes = [((1, 8, 2048), 131072), ((32, 8, 2048), 32768)]
    for shape, kv_len in [((1, 2, 9), 64)] if smoke else sizes:
        yield Case(
            op="list_to_slots",
            name=f"{shape} of {kv_len}, pages of {PAGE_SIZE}",
            dtype="int64",
            make=partial(make, device=device, shape=shape, kv_len=kv_len),
            call=lambda lists, table: ((lists, table), {"page_size": PAGE_SIZE}),
            run={"tokred": lambda lists, table: tokred.list_to_slots(lists, table, page_size=PAGE_SIZE), "eager": aten},
            compiled=("eager",) if device == "cuda" and shape[0] > 1 else (),
            core=device == "cuda" and shape[0] == 1,
        )
