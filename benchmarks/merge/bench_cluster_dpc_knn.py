# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""cluster_dpc_knn against the formula in torch, and against two bare matrix products of all pairs.

The aim on the CPU: at most 1.6 times those two products. CUDA has not been measured. Expected for 3136 x 64 into 784 in
bfloat16: nine launches; the products of all pairs, half of all, and a quarter, 2.2 Gflop in all, are a few microseconds and
so are the rankings (3136 keys against each other), some 40 us in all.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def formula(x: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """The published steps, without their random numbers: distances, k nearest, mask of denser tokens, top-k, nearest."""
    batch_size, num_tokens, dim = x.shape
    x = x.float()
    distance = torch.cdist(x, x) / dim**0.5
    density = (-distance.topk(5, dim=-1, largest=False).values.square().mean(-1)).exp()
    denser = density[:, None, :] > density[:, :, None]
    delta = torch.where(denser, distance, distance.flatten(1).amax(-1)[:, None, None]).amin(-1)
    centre_idx = (delta * density).topk(num_clusters, dim=-1).indices
    dst_idx = distance.gather(1, centre_idx[..., None].expand(-1, -1, num_tokens)).argmin(1)
    own = torch.arange(num_clusters, device=x.device).expand(batch_size, -1)
    return centre_idx, dst_idx.scatter(1, centre_idx, own)


def two_products(x: Tensor, num_clusters: int) -> Tensor:
    first = x @ x.transpose(1, 2)
    return torch.matmul(x, x.transpose(1, 2), out=torch.empty_like(first))


def spread_of(out: tuple[Tensor, ...], x: Tensor, num_clusters: int) -> Tensor:
    """Mean squared distance of a token to its centre: near ties may fall otherwise and change the clusters a little."""
    x = x.double()
    mine = out[0].gather(1, out[1])
    return (x - x.gather(1, mine[..., None].expand(-1, -1, x.shape[2]))).square().mean((1, 2))


def make_inputs(i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], num_clusters: int) -> Any:
    random = generator(device, i)
    # Tokens of an image come in groups.
    groups = torch.randn(shape[0], 2 * num_clusters, shape[2], generator=random, device=device)
    group = torch.randint(2 * num_clusters, (*shape[:2], 1), generator=random, device=device).expand(-1, -1, shape[2])
    x = 0.5 * torch.randn(*shape, generator=random, device=device) + groups.gather(1, group)
    return x.to(dtype), num_clusters


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: shape of the tokens, clusters."""
    # TCFormer's first stage; three frames of CLIP B/16; a LLaVA image
    sizes = [((1, 3136, 64), 784), ((1, 588, 768), 49), ((1, 576, 1024), 64)]
    if device == "cuda":
        sizes = [((8, 3136, 64), 784), ((32, 196, 3584), 49), ((1, 3136, 64), 784)]
    if smoke:
        sizes = [((1, 60, 32), 9)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, num_clusters in sizes:
            yield Case(
                op="cluster_dpc_knn",
                name=f"({', '.join(map(str, shape))}) into {num_clusters}",
                dtype=dtype_word(dtype),
                make=partial(make_inputs, device=device, dtype=dtype, shape=shape, num_clusters=num_clusters),
                run={"tokred": tokred.cluster_dpc_knn, "formula": formula, "two matrix products alone": two_products},
                compare=spread_of,
                tolerance=(2e-2, 2e-2),
                unlike={"two matrix products alone": "no clusters at all: the products of all pairs, twice"},
                core=device == "cuda" and dtype == torch.bfloat16 and shape[0] > 1,
            )
