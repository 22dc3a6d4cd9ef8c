# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""bipartite_match against ToMe's formulas in torch, and against the bare matrix product that both contain."""

from collections.abc import Iterator

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case


def formulas(metric: Tensor, r: int) -> Tensor:
    """ToMe's matching in eager torch, up to the same map: normalise, product, max, argsort, gather, scatter."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, match = (metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged_src, num_src = order[:, :r], best.shape[1]
    unmerged = order[:, r:].sort(dim=-1).values
    dst_idx = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    rows = torch.arange(metric.shape[1] - r, device=metric.device)
    dst_idx[:, 1::2] = rows[num_src - r :]
    dst_idx.scatter_(1, 2 * unmerged, rows[: num_src - r].expand_as(unmerged))
    dst_idx.scatter_(1, 2 * merged_src, num_src - r + match.gather(-1, merged_src))
    return dst_idx


def product(metric: Tensor, r: int) -> Tensor:
    """No matching at all: the similarities of vectors that are not normalised."""
    return metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)


def ours(metric: Tensor, r: int) -> Tensor:
    return tokred.bipartite_match(metric, r, order="grouped")


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    sizes = [(32, 197, 64, 16, 2.0), (2, 4096, 320, 2048, None), (1, 577, 64, 16, None), (8, 577, 1024, 16, None)]
    if device == "cuda":
        sizes = [
            (32, 197, 64, 16, None),
            (32, 577, 64, 16, None),
            (32, 577, 1024, 16, None),
            (2, 4096, 640, 2048, None),
        ]
    if smoke:
        sizes = [(2, 197, 64, 16, None)]
    for dtype in (torch.float32, torch.bfloat16):
        for batch_size, num_tokens, dim, r, reach in sizes:

            def make(i: int, shape=(batch_size, num_tokens, dim), r=r, dtype=dtype) -> tuple[Tensor, int]:
                generator = torch.Generator().manual_seed(i)
                return torch.randn(*shape, generator=generator).to(device, dtype), r

            num_src, num_dst = (num_tokens + 1) // 2, num_tokens // 2
            yield Case(
                op="bipartite_match",
                name=f"({batch_size}, {num_tokens}, {dim}) merge {r}",
                dtype=str(dtype).removeprefix("torch."),
                make=make,
                run={"tokred": ours, "ToMe's formulas": formulas, "matrix product alone": product},
                bytes=batch_size * num_tokens * (dim * dtype.itemsize + 20),
                flops=2 * batch_size * num_src * num_dst * dim,
                compare=None,
                reach=reach,
                note="outputs are not compared: the product alone returns something else; the formulas round unit vectors and "
                "similarities to bfloat16, so that they pick other pairs there",
            )
