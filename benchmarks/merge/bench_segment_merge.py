# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_merge against what users write: ToMe's gathers, scatter_reduce and cat, scatter_reduce("mean"), index_add."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case

Inputs = tuple["Problem"]


class Problem(NamedTuple):
    """One merge, said in the ways of all candidates."""

    x: Tensor  # [batch_size, num_tokens, dim]
    dst_idx: Tensor
    num_out: int
    size: Tensor  # [batch_size, num_tokens]
    unmerged_idx: Tensor | None = None  # ToMe's lists: even tokens that stay, that go, and the odd ones they go to
    source_idx: Tensor | None = None
    target_idx: Tensor | None = None


def tome_problem(
    batch_size: int, num_tokens: int, dim: int, r: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Even tokens are sources, odd ones targets; r sources merge. Output order: sources that stay, targets."""
    generator = torch.Generator().manual_seed(seed)
    num_even, num_odd = (num_tokens + 1) // 2, num_tokens // 2
    order = torch.rand(batch_size, num_even, generator=generator).argsort()
    source, stay = order[:, :r], order[:, r:].sort().values
    target = torch.randint(0, num_odd, (batch_size, r), generator=generator)
    of_even = torch.empty(batch_size, num_even, dtype=torch.int64)
    of_even.scatter_(1, stay, torch.arange(num_even - r).expand_as(stay)).scatter_(1, source, target + num_even - r)
    dst_idx = torch.empty(batch_size, num_tokens, dtype=torch.int64)
    dst_idx[:, ::2], dst_idx[:, 1::2] = of_even, torch.arange(num_odd) + num_even - r
    size = torch.randint(1, 4, (batch_size, num_tokens), generator=generator).float()
    x = torch.randn(batch_size, num_tokens, dim, generator=generator).to(device, dtype)
    lists = [t.to(device) for t in (stay, source, target)]
    return (Problem(x, dst_idx.to(device), num_tokens - r, size.to(device), *lists),)


def random_problem(
    batch_size: int, num_tokens: int, num_out: int, dim: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Destinations are uniform."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, num_tokens, dim, generator=generator).to(device, dtype)
    dst_idx = torch.randint(0, num_out, (batch_size, num_tokens), generator=generator).to(device)
    return (Problem(x, dst_idx, num_out, torch.ones(batch_size, num_tokens, device=device)),)


def tome(p: Problem) -> tuple[Tensor, Tensor]:
    """ToMe's weighted average, by its formulas: the merge runs over x * size and over size."""

    def merge(t: Tensor) -> Tensor:
        even, odd = t[:, ::2], t[:, 1::2]
        stay = even.gather(1, p.unmerged_idx[..., None].expand(-1, -1, t.shape[2]))
        source = even.gather(1, p.source_idx[..., None].expand(-1, -1, t.shape[2]))
        odd = odd.scatter_reduce(1, p.target_idx[..., None].expand(-1, -1, t.shape[2]), source, "sum")
        return torch.cat([stay, odd], dim=1)

    size = p.size[..., None].to(p.x.dtype)
    total = merge(size)
    return merge(p.x * size) / total, total[..., 0].float()


def scatter_reduce(p: Problem) -> tuple[Tensor, None]:
    out = p.x.new_zeros(p.x.shape[0], p.num_out, p.x.shape[2])
    return out.scatter_reduce(1, p.dst_idx[..., None].expand_as(p.x), p.x, "mean", include_self=False), None


def index_add(p: Problem) -> tuple[Tensor, None]:
    batch_size, _, dim = p.x.shape
    rows = (p.dst_idx + torch.arange(batch_size, device=p.x.device)[:, None] * p.num_out).flatten()
    out = p.x.new_zeros(batch_size * p.num_out, dim).index_add_(0, rows, p.x.flatten(0, 1))
    count = p.x.new_zeros(batch_size * p.num_out).index_add_(0, rows, torch.ones_like(rows, dtype=p.x.dtype))
    return (out / count.clamp(min=1)[:, None]).unflatten(0, (batch_size, p.num_out)), None


def ours(p: Problem) -> tuple[Tensor, Tensor]:
    return tokred.segment_merge(p.x, p.dst_idx, p.num_out)


def ours_sized(p: Problem) -> tuple[Tensor, Tensor]:
    return tokred.segment_merge(p.x, p.dst_idx, p.num_out, size=p.size)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        # Peers add in x's dtype, tokred in float32: bfloat16 sums of about ten terms differ by a few of its roundings.
        tolerance = (1e-5, 1e-5) if dtype == torch.float32 else (5e-2, 5e-2)
        for batch_size, num_tokens, dim, r in [(2, 17, 16, 3)] if smoke else [(32, 197, 768, 16), (32, 577, 1024, 16)]:
            yield Case(
                op="segment_merge",
                name=f"ToMe with sizes: {batch_size} x {num_tokens} x {dim}, r {r}",
                dtype=word,
                make=lambda i, a=(batch_size, num_tokens, dim, r, dtype): tome_problem(*a, device, i),
                run={"tokred": ours_sized, "tome": tome},
                bytes=batch_size * (2 * num_tokens - r) * dim * dtype.itemsize,
                tolerance=tolerance,
                reach=6.0 if device == "cpu" and dtype == torch.float32 else None,
            )
        shapes = [(1, 2880, 320, 4096), (32, 4096, 2048, 640), (1, 131072, 65536, 640)]
        for batch_size, num_tokens, num_out, dim in (
            [(1, 40, 5, 16)] if smoke else shapes[: 1 if device == "cpu" else None]
        ):
            yield Case(
                op="segment_merge",
                name=f"mean: {batch_size} x {num_tokens} -> {num_out} x {dim}",
                dtype=word,
                make=lambda i, a=(batch_size, num_tokens, num_out, dim, dtype): random_problem(*a, device, i),
                run={"tokred": ours, "scatter_reduce": scatter_reduce, "index_add": index_add},
                bytes=batch_size * (num_tokens + num_out) * dim * dtype.itemsize,
                compare=lambda out: out[0],
                tolerance=tolerance,
                reach=2.4 if device == "cpu" and dtype == torch.float32 else None,
            )
