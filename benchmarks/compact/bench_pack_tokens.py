# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pack_tokens against ATen without a sync (cumsum, scatter of row numbers, index_select) and with one (boolean index)."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def pack(x: Tensor, mask: Tensor, max_total: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    return tokred.pack_tokens([x], mask, max_total=max_total)


def cumsum(x: Tensor, mask: Tensor, max_total: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    flat = mask.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, max_total).clamp(max=max_total)
    rows = torch.full((max_total + 1,), -1, device=mask.device)
    rows = rows.scatter_(0, slot, torch.arange(len(flat), device=mask.device))[:max_total]
    packed = x.flatten(0, 1).index_select(0, rows.clamp(min=0)).masked_fill_((rows < 0)[:, None], 0)
    num_kept = mask.sum(1, dtype=torch.int32)
    bounds = torch.nn.functional.pad(num_kept.cumsum(0, dtype=torch.int32), (1, 0)).clamp(max=max_total)
    return [packed], rows, bounds, num_kept


def boolean_index(x: Tensor, mask: Tensor, max_total: int) -> Tensor:
    return x[mask]


def make(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], share: float
) -> tuple[Tensor, Tensor, int]:
    random = generator(device, i)
    x = torch.randn(*shape, generator=random, device=device).to(dtype)
    mask = torch.rand(shape[:2], generator=random, device=device) < share
    return x, mask, int(shape[0] * shape[1] * share)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: crops of LLaVA-NeXT, a screenshot, the frames of a long video."""
    cuda = device == "cuda"
    shapes = [((5, 576, 4096), 0.2), ((1, 6400, 3584), 0.35), ((1, 36864, 3584), 0.25)]
    if smoke:
        shapes = [((2, 40, 64), 0.3)]
    run = {"tokred": pack, "cumsum+scatter+index_select": cumsum, **({} if cuda else {"x[mask]": boolean_index})}
    for dtype in (torch.float32, torch.bfloat16):
        for shape, share in shapes:
            yield Case(
                op="pack_tokens",
                name=f"{shape[0]} x {shape[1]} x {shape[2]}, keep about {share:.0%}",
                dtype=dtype_word(dtype),
                make=partial(make, device=device, dtype=dtype, shape=shape, share=share),
                call=lambda x, mask, max_total: (([x], mask), {"max_total": max_total}),
                run=run,
                unlike={"x[mask]": "returns the tokens alone; on a GPU it waits for the device"},
                tolerance=(0, 0),
                min_copies=1 if cuda else 64,  # branches of a CPU could learn fewer
                core=cuda and dtype == torch.bfloat16 and shape[1] == 36864,
                note="on CUDA two small launches come before the copy",
            )
