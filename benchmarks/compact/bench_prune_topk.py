# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""prune_topk against the strongest ATen composition: topk, sort, and index_select on flattened rows."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

PEERS = ("numpy", "flashinfer", "cub", "cupy")


def aten(x: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch_size, num_tokens, dim = x.shape
    kept_idx = score.topk(k, sorted=False).indices.sort().values
    rows = (kept_idx + torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device)[:, None]).flatten()
    return x.view(-1, dim).index_select(0, rows).view(batch_size, k, dim), kept_idx


def draw_scores(kind: str, shape: tuple[int, int], random: torch.Generator, device: str) -> Tensor:
    score = torch.randn(*shape, generator=random, device=device)
    if kind == "softmax":
        return (4 * score).softmax(-1)  # peaked, as attention is: most share their leading bits
    if kind == "quantised":
        return (score.relu() * 8).round() / 8  # ReLU scores of an indexer: half are zero, the others tie
    return torch.ones_like(score) if kind == "equal" else score


def make_tokens(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int
) -> tuple[Tensor, Tensor, int]:
    random = generator(device, i)
    x = torch.randn(*shape, generator=random, device=device).to(dtype)
    return x, draw_scores("normal", shape[:2], random, device), k


def make_scores(i: int, device: str, kind: str, shape: tuple[int, int], k: int) -> tuple[Tensor, Tensor, int]:
    score = draw_scores(kind, shape, generator(device, i), device)
    return score[..., None], score, k


def kept_values(out: tuple[Tensor, Tensor], *inputs: object) -> Tensor:
    """The selected scores, which are the rows of x here: with ties, peers may keep other indices, but not other values."""
    return out[0].sort(1).values


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: whole tokens, then the selection alone."""
    cuda = device == "cuda"
    # CLIP-L tower; LLaVA-NeXT; LLaVA-OneVision, 32 frames
    tokens = [((8, 576, 1024), 192, 1.6), ((1, 2880, 4096), 320, None), ((1, 6272, 3584), 627, None)]
    scores = [
        ("normal", (1, 131072), 2048, 15.0),
        ("softmax", (1, 131072), 2048, None),
        ("normal", (512, 576), 64, None),
    ]
    if cuda:
        scores += [
            ("normal", (1, 2880), 320, None),
            ("normal", (32, 32768), 2048, None),
            ("normal", (256, 131072), 2048, None),
            ("quantised", (32, 32768), 2048, None),
            ("equal", (32, 32768), 2048, None),
        ]
    if smoke:
        tokens, scores = [((1, 40, 32), 10, None)], [(kind, (1, 300), 20, None) for kind in ("quantised", "softmax")]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, k, reach in tokens:
            yield Case(
                op="prune_topk",
                name=f"({', '.join(map(str, shape))}) keep {k}",
                dtype=dtype_word(dtype),
                make=partial(make_tokens, device=device, dtype=dtype, shape=shape, k=k),
                run={"tokred": tokred.prune_topk, "topk+sort+index_select": aten},
                peers=PEERS,
                compiled=("topk+sort+index_select",) if reach and not cuda else (),
                tolerance=(0, 0),
                min_copies=1 if cuda else 64,  # branches of a CPU could learn fewer
                reach=None if cuda else reach,
                against="topk+sort+index_select",
                core=cuda and dtype == torch.bfloat16,
                note="float32 scores without ties, so that all select the same tokens",
            )
    for kind, shape, k, reach in scores:
        yield Case(
            op="prune_topk",
            name=f"selection ({shape[0]}, {shape[1]}) keep {k}, {kind}",
            dtype="float32",
            make=partial(make_scores, device=device, kind=kind, shape=shape, k=k),
            run={"tokred": tokred.prune_topk, "topk+sort+index_select": aten},
            peers=PEERS,
            compare=kept_values,
            tolerance=(0, 0),
            min_copies=1 if cuda else 64,
            reach=None if cuda else reach,
            against="topk+sort+index_select",
            core=cuda and kind == "equal",  # the others are those of select_topk
            note="x is the score itself, one value a token",
        )
