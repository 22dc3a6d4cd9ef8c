# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""cluster_kmeans against the same iterations in torch, from the same starts. CUDA has not been measured."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def loop(x: Tensor, codes: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Nearest by one product, means by index_add, as often as asked; without a test of convergence, which would sync."""
    batch_size, num_tokens, dim = x.shape
    centroids, ones = codes, x.new_ones(batch_size, num_tokens)
    for _ in range(max_iter):
        nearest = (centroids.square().sum(-1)[:, None] - 2 * x @ centroids.transpose(1, 2)).argmin(-1)
        sums = torch.zeros_like(codes).scatter_add_(1, nearest[..., None].expand(-1, -1, dim), x)
        count = ones.new_zeros(codes.shape[:2]).scatter_add_(1, nearest, ones)[..., None]
        centroids = torch.where(count > 0, sums / count.clamp_min(1), centroids)
    return centroids, (centroids.square().sum(-1)[:, None] - 2 * x @ centroids.transpose(1, 2)).argmin(-1)


def ours(x: Tensor, codes: Tensor, max_iter: int) -> Any:
    return tokred.cluster_kmeans(x, codes.shape[1], init=codes, max_iter=max_iter)


def call(x: Tensor, codes: Tensor, max_iter: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, codes.shape[1]), {"init": codes, "max_iter": max_iter}


def spread_of(out: tuple[Tensor, ...], x: Tensor, *rest: Any) -> Tensor:
    """Mean squared distance of a token to its centroid: near ties may fall otherwise."""
    mine = out[0].double().gather(1, out[1][..., None].expand(-1, -1, x.shape[2]))
    return (x.double() - mine).square().mean((1, 2))


def make_inputs(i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], codes: int, max_iter: int) -> Any:
    random = generator(device, i)
    groups = torch.randn(shape[0], codes, shape[2], generator=random, device=device)
    group = torch.randint(codes, (*shape[:2], 1), generator=random, device=device).expand(-1, -1, shape[2])
    x = (torch.randn(*shape, generator=random, device=device) + groups.gather(1, group)).to(dtype)
    return x, x[:, :codes].contiguous(), max_iter


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: shape of the tokens, centroids, iterations."""
    # three frames of CLIP B/16 (CenterCLIP); a video of 32 frames (VQToken); nearest codes
    sizes = [((1, 588, 768), 49, 10), ((1, 6272, 1152), 32, 10), ((1, 2880, 1024), 256, 0)]
    if smoke:
        sizes = [((1, 60, 32), 5, 2)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, codes, max_iter in sizes:
            yield Case(
                op="cluster_kmeans",
                name=f"({', '.join(map(str, shape))}) {codes} centroids, {max_iter} iterations",
                dtype=dtype_word(dtype),
                make=partial(make_inputs, device=device, dtype=dtype, shape=shape, codes=codes, max_iter=max_iter),
                run={"tokred": ours, "loop in torch": loop},
                call=call,
                compare=spread_of,
                # bfloat16: the loop adds up in bfloat16, and its means are poor.
                tolerance=(1e-3, 1e-3) if dtype == torch.float32 else (1.0, 1e-1),
                core=device == "cuda" and dtype == torch.bfloat16 and shape[1] != 588,
            )
