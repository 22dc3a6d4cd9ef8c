# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""prune_attn against the eager code of the methods: product, softmax, mean, topk, sort, gather."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator


def eager(x: Tensor, q: Tensor, k: Tensor, num_keep: int, first_key: int) -> tuple[Tensor, Tensor]:
    """What released code does, with heads of a group side by side; scores come in the dtype of the model."""
    batch_size, num_tokens, dim = x.shape
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    p = ((grouped @ k.transpose(2, 3)) * q.shape[-1] ** -0.5).softmax(-1)
    score = p.flatten(1, 2).mean(1)[:, first_key : first_key + num_tokens]
    kept_idx = score.topk(num_keep, sorted=False).indices.sort().values
    rows = (kept_idx + torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device)[:, None]).flatten()
    return x.view(-1, dim).index_select(0, rows).view(batch_size, num_keep, dim), kept_idx


def two_ops(x: Tensor, q: Tensor, k: Tensor, num_keep: int, first_key: int) -> tuple[Tensor, Tensor]:
    received, _ = tokred.attn_received(q, k)
    score = received.mean(1)[:, first_key : first_key + x.shape[1]].contiguous()
    return tokred.prune_topk(x, score, num_keep)


def ours(x: Tensor, q: Tensor, k: Tensor, num_keep: int, first_key: int) -> tuple[Tensor, Tensor]:
    return tokred.prune_attn(x, q, k, num_keep, first_key=first_key)


def arguments(x: Tensor, q: Tensor, k: Tensor, num_keep: int, first_key: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, q, k, num_keep), {"first_key": first_key}


def make(
    i: int,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    heads: tuple[int, int],
    head_dim: int,
    num_keep: int,
    first_key: int,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    random = generator(device, i)
    batch_size, num_tokens, _ = shape
    x = torch.randn(*shape, generator=random, device=device).to(dtype)
    q = torch.randn(batch_size, heads[0], 1, head_dim, generator=random, device=device).to(dtype)
    k = torch.randn(batch_size, heads[1], first_key + num_tokens, head_dim, generator=random, device=device)
    return x, q, k.to(dtype), num_keep, first_key


def worst_score(out: tuple[Tensor, Tensor], x: Tensor, q: Tensor, k: Tensor, num_keep: int, first_key: int) -> Tensor:
    """The float64 scores of the kept tokens, sorted: rounding may swap tokens that are equal up to it, and no others."""
    logits = (q.double().unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.double().transpose(2, 3)) * q.shape[
        -1
    ] ** -0.5
    score = logits.softmax(-1).flatten(1, 2).mean(1)[:, first_key:]
    return score.gather(1, out[1]).sort(1).values.float()


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: a [CLS] row of CLIP-L, the last token of a prompt with MHA and with GQA."""
    cuda = device == "cuda"
    sizes = [
        ((8, 576, 1024), (16, 16), 64, 192, 1),  # FasterVLM, VisionZip
        ((1, 2975, 4096), (32, 32), 128, 735, 0),  # FastV on LLaVA-NeXT
        ((1, 6272, 3584), (28, 4), 128, 627, 0),  # LLaVA-OneVision, 32 frames
    ]
    if cuda:
        sizes.append(((128, 576, 1024), (16, 16), 64, 192, 1))  # one launch
    if smoke:
        sizes = [((2, 40, 32), (4, 2), 16, 10, 1)]
    for dtype in (torch.bfloat16, torch.float32):
        for shape, heads, head_dim, num_keep, first_key in sizes:
            yield Case(
                op="prune_attn",
                name=f"({', '.join(map(str, shape))}) {heads[0]}/{heads[1]} d{head_dim} keep {num_keep}",
                dtype=dtype_word(dtype),
                make=partial(
                    make,
                    device=device,
                    dtype=dtype,
                    shape=shape,
                    heads=heads,
                    head_dim=head_dim,
                    num_keep=num_keep,
                    first_key=first_key,
                ),
                call=arguments,
                run={
                    "tokred": ours,
                    "matmul+softmax+mean+topk+sort+index_select": eager,
                    "attn_received+prune_topk": two_ops,
                },
                compare=worst_score,
                # bfloat16 scores of the eager code tie and swap within their rounding, 2^-9 twice.
                tolerance=(1e-4, 1e-6) if dtype == torch.float32 else (1e-2, 1e-5),
                min_copies=1 if cuda else 8,
                core=cuda and dtype == torch.bfloat16 and shape[1] < 6272 and shape[0] < 128,
                note="one query a row; eager code has scores of the model's dtype",
            )
