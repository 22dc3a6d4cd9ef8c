# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_merge against what users write: ToMe's gathers, scatter_reduce and cat, scatter_reduce("mean"), index_add."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

Lists = tuple[Tensor, Tensor, Tensor]  # ToMe's: even tokens that stay, even tokens that go, the odd ones they go to


def make_tome(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], r: int
) -> tuple[Tensor, Tensor, int, Tensor, Lists]:
    """Even tokens are sources, odd ones targets; r sources merge. Output order: sources that stay, targets."""
    batch_size, num_tokens = shape[:2]
    random = generator(device, i)
    options = {"generator": random, "device": device}
    num_even, num_odd = (num_tokens + 1) // 2, num_tokens // 2
    order = torch.rand(batch_size, num_even, **options).argsort()
    source, stay = order[:, :r], order[:, r:].sort().values
    target = torch.randint(0, num_odd, (batch_size, r), **options)
    of_even = torch.empty(batch_size, num_even, dtype=torch.int64, device=device)
    of_even.scatter_(1, stay, torch.arange(num_even - r, device=device).expand_as(stay))
    of_even.scatter_(1, source, target + num_even - r)
    dst_idx = torch.empty(batch_size, num_tokens, dtype=torch.int64, device=device)
    dst_idx[:, ::2], dst_idx[:, 1::2] = of_even, torch.arange(num_odd, device=device) + num_even - r
    size = torch.randint(1, 4, (batch_size, num_tokens), **options).float()
    x = torch.randn(*shape, **options).to(dtype)
    return x, dst_idx, num_tokens - r, size, (stay, source, target)


def tome(x: Tensor, dst_idx: Tensor, num_out: int, size: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    """ToMe's weighted average, by its formulas: the merge runs over x * size and over size."""
    stay, source, target = (index[..., None] for index in lists)

    def merge(t: Tensor) -> Tensor:
        even, odd = t[:, ::2], t[:, 1::2]
        left = even.gather(1, stay.expand(-1, -1, t.shape[2]))
        merged = even.gather(1, source.expand(-1, -1, t.shape[2]))
        return torch.cat([left, odd.scatter_reduce(1, target.expand(-1, -1, t.shape[2]), merged, "sum")], dim=1)

    weight = size[..., None].to(x.dtype)
    total = merge(weight)
    return merge(x * weight) / total, total[..., 0].float()


def sized(x: Tensor, dst_idx: Tensor, num_out: int, size: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    return tokred.segment_merge(x, dst_idx, num_out, size=size)


def sized_call(
    x: Tensor, dst_idx: Tensor, num_out: int, size: Tensor, lists: Lists
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, dst_idx, num_out), {"size": size}


def make_random(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, int]:
    """Destinations are uniform."""
    batch_size, num_tokens, num_out, dim = shape
    options = {"generator": generator(device, i), "device": device}
    x = torch.randn(batch_size, num_tokens, dim, **options).to(dtype)
    return x, torch.randint(0, num_out, (batch_size, num_tokens), **options), num_out


def scatter_reduce(x: Tensor, dst_idx: Tensor, num_out: int) -> tuple[Tensor, None]:
    out = x.new_zeros(x.shape[0], num_out, x.shape[2])
    return out.scatter_reduce(1, dst_idx[..., None].expand_as(x), x, "mean", include_self=False), None


def index_add(x: Tensor, dst_idx: Tensor, num_out: int) -> tuple[Tensor, None]:
    batch_size, _, dim = x.shape
    rows = (dst_idx + torch.arange(batch_size, device=x.device)[:, None] * num_out).flatten()
    out = x.new_zeros(batch_size * num_out, dim).index_add_(0, rows, x.flatten(0, 1))
    count = x.new_zeros(batch_size * num_out).index_add_(0, rows, torch.ones_like(rows, dtype=x.dtype))
    return (out / count.clamp(min=1)[:, None]).unflatten(0, (batch_size, num_out)), None


def make_entries(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    """Every row takes so many tokens anywhere, with weights."""
    batch_size, num_tokens, num_out, per_row, dim = shape
    options = {"generator": generator(device, i), "device": device}
    x = torch.randn(batch_size, num_tokens, dim, **options).to(dtype)
    rows = torch.arange(num_out, device=device).repeat_interleave(per_row).expand(batch_size, -1).contiguous()
    tokens = torch.rand(batch_size, num_out, num_tokens, **options).topk(per_row).indices.flatten(1)
    return x, rows, num_out, tokens, torch.rand(batch_size, num_out * per_row, **options)


def entries(x: Tensor, rows: Tensor, num_out: int, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return tokred.segment_merge(x, rows, num_out, src_idx=tokens, weight=weight, mode="sum")


def gathered(x: Tensor, rows: Tensor, num_out: int, tokens: Tensor, weight: Tensor) -> tuple[Tensor, None]:
    """The rows are equally long, which gather and sum need and tokred does not."""
    taken = x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2])) * weight[..., None].to(x.dtype)
    return taken.unflatten(1, (num_out, -1)).sum(2), None


def product(x: Tensor, rows: Tensor, num_out: int, tokens: Tensor, weight: Tensor) -> tuple[Tensor, None]:
    w = weight.new_zeros(x.shape[0], num_out * x.shape[1])
    w.scatter_add_(1, rows * x.shape[1] + tokens, weight)
    return torch.bmm(w.unflatten(1, (num_out, -1)).to(x.dtype), x), None


def entries_call(
    x: Tensor, rows: Tensor, num_out: int, tokens: Tensor, weight: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, rows, num_out), {"src_idx": tokens, "weight": weight, "mode": "sum"}


def merged_rows(out: tuple[Tensor, Any], *inputs: object) -> Tensor:
    return out[0]


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    # ViT-B at 224 and ViT-L at 336 with ToMe; LLaVA-NeXT; Stable Diffusion, a batch of 32; a long sequence
    tome_sizes = [(2, 17, 16, 3)] if smoke else [(32, 197, 768, 16), (32, 577, 1024, 16)]
    shapes = [(1, 2880, 320, 4096)]
    if device == "cuda":
        shapes += [(32, 4096, 2048, 640), (1, 131072, 65536, 640)]
    if smoke:
        shapes = [(1, 40, 5, 16)]
    for dtype in (torch.float32, torch.bfloat16):
        options = {"device": device, "dtype": dtype}
        # Peers add in x's dtype, tokred in float32: bfloat16 sums of about ten terms differ by a few of its roundings.
        tolerance = (1e-5, 1e-5) if dtype == torch.float32 else (5e-2, 5e-2)
        aimed = device == "cpu" and dtype == torch.float32 and not smoke
        core = device == "cuda" and dtype == torch.bfloat16
        for *shape, r in tome_sizes:
            yield Case(
                op="segment_merge",
                name=f"ToMe with sizes: {' x '.join(map(str, shape))}, r {r}",
                dtype=dtype_word(dtype),
                make=partial(make_tome, shape=tuple(shape), r=r, **options),
                run={"tokred": sized, "ToMe's formulas": tome},
                call=sized_call,
                compiled=("ToMe's formulas",) if shape[1] == 197 else (),
                tolerance=tolerance,
                reach=6.0 if aimed else None,
                against="ToMe's formulas",
                core=core,
            )
        # PruMerge: each of 64 kept tokens of 576 takes 32 neighbours and itself
        several = (2, 20, 4, 3, 16) if smoke else (8, 576, 64, 33, 1024)
        yield Case(
            op="segment_merge",
            name=f"entries: {several[0]} x {several[1]} -> {several[2]} of {several[3]} each, x {several[4]}",
            dtype=dtype_word(dtype),
            make=partial(make_entries, shape=several, **options),
            run={"tokred": entries, "gather and sum": gathered, "dense product": product},
            call=entries_call,
            compare=merged_rows,
            tolerance=(1e-4, 1e-4) if dtype == torch.float32 else (5e-2, 2e-1),
        )
        for shape in shapes:
            yield Case(
                op="segment_merge",
                name=f"mean: {shape[0]} x {shape[1]} -> {shape[2]} x {shape[3]}",
                dtype=dtype_word(dtype),
                make=partial(make_random, shape=shape, **options),
                run={"tokred": tokred.segment_merge, "scatter_reduce": scatter_reduce, "index_add": index_add},
                compare=merged_rows,
                tolerance=tolerance,
                reach=2.4 if aimed else None,
                against="scatter_reduce",
                core=core,
            )
