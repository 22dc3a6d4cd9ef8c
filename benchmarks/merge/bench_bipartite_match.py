# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""bipartite_match against ToMe's formulas in torch, and against the bare matrix product that both contain."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tokred
from tokred.testing.bench import Case, dtype_word, generator

Maps = tuple[Tensor, Tensor | None, Tensor | None]


def formulas(metric: Tensor, r: int) -> Maps:
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
    return dst_idx, None, None


def product(metric: Tensor, r: int) -> Tensor:
    return metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)


def options(metric: Tensor, r: int) -> tuple[tuple[Tensor, int], dict[str, object]]:
    return (metric, r), {"order": "grouped", "return_score": True}


def ours(metric: Tensor, r: int) -> Maps:
    return tokred.bipartite_match(metric, r, order="grouped", return_score=True)


def merged_similarity(out: Maps, metric: Tensor, r: int) -> Tensor:
    """The similarities of the merged pairs, sorted: pairs that differ by less than rounding may be chosen otherwise."""
    dst_idx = out[0]
    batch_size, num_tokens = dst_idx.shape
    odd = torch.arange(1, num_tokens, 2, device=dst_idx.device).expand(batch_size, -1)
    odd_of_row = torch.full((batch_size, num_tokens - r), -1, device=dst_idx.device).scatter_(1, dst_idx[:, 1::2], odd)
    partner = odd_of_row.gather(1, dst_idx[:, ::2])
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    other = unit.gather(1, partner.clamp(min=0)[..., None].expand(-1, -1, metric.shape[2]))
    similarity = (unit[:, ::2] * other).sum(-1).masked_fill(partner < 0, -torch.inf)
    return similarity.sort(1, descending=True).values


def cell_formulas(metric: Tensor, r: int, sources: Tensor, destinations: Tensor) -> Maps:
    """ToMeSD's matching in eager torch: normalise, gather both sets, product, max, argsort, scatter."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, match = (unit[:, sources] @ unit[:, destinations].transpose(-1, -2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    num_src, rows = sources.shape[0], torch.arange(metric.shape[1] - r, device=metric.device)
    dst_idx = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    dst_idx[:, destinations] = rows[num_src - r :]
    dst_idx.scatter_(1, sources[order[:, r:]], rows[: num_src - r].expand(len(metric), -1))
    dst_idx.scatter_(1, sources[order[:, :r]], num_src - r + match.gather(-1, order[:, :r]))
    return dst_idx, None, None


def cell_options(
    metric: Tensor, r: int, sources: Tensor, destinations: Tensor
) -> tuple[tuple[Tensor, int], dict[str, object]]:
    return (metric, r), {"sources": sources, "destinations": destinations, "return_score": True}


def ours_in_cells(metric: Tensor, r: int, sources: Tensor, destinations: Tensor) -> Maps:
    return tokred.bipartite_match(metric, r, sources=sources, destinations=destinations, return_score=True)


def similarity_in_cells(out: Maps, metric: Tensor, r: int, sources: Tensor, destinations: Tensor) -> Tensor:
    """As merged_similarity, of listed sets."""
    dst_idx = out[0]
    token_of_row = torch.full_like(dst_idx, -1)
    token_of_row.scatter_(1, dst_idx[:, destinations], destinations.expand(len(metric), -1))
    partner = token_of_row.gather(1, dst_idx[:, sources])
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    other = unit.gather(1, partner.clamp(min=0)[..., None].expand(-1, -1, metric.shape[2]))
    similarity = (unit[:, sources] * other).sum(-1).masked_fill(partner < 0, -torch.inf)
    return similarity.sort(1, descending=True).values


def make_inputs(i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], r: int) -> tuple[Tensor, int]:
    return torch.randn(*shape, generator=generator(device, i), device=device).to(dtype), r


def make_cells(
    i: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int], r: int
) -> tuple[Tensor, int, Tensor, Tensor]:
    """ToMeSD's sets on a square grid: the first token of each 2 x 2 cell is a destination."""
    side = int(shape[1] ** 0.5)
    return *make_inputs(i, device, dtype, shape, r), *tokred.grid_cells(side, side, device=device)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark: shape of the metric, r, reach."""
    # ViT-B at 224 (head mean); Stable Diffusion at 512; ViT-L at 336: head mean, whole width
    sizes = [
        ((32, 197, 64), 16, 2.0),
        ((2, 4096, 320), 2048, 0.91),
        ((1, 577, 64), 16, 2.0),
        ((8, 577, 1024), 16, None),
    ]
    if device == "cuda":
        sizes = [((32, 197, 64), 16, None), ((32, 577, 64), 16, None), ((32, 577, 1024), 16, None)]
        sizes += [((2, 4096, 640), 2048, None)]
    if smoke:
        sizes = [((1, 40, 32), 8, None)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, r, reach in sizes:
            yield Case(
                op="bipartite_match",
                name=f"({', '.join(map(str, shape))}) merge {r}",
                dtype=dtype_word(dtype),
                make=partial(make_inputs, device=device, dtype=dtype, shape=shape, r=r),
                run={"tokred": ours, "ToMe's formulas": formulas, "matrix product alone": product},
                call=options,
                peers=("tomesd",),
                compiled=("ToMe's formulas",) if shape[1] == 197 else (),
                compare=merged_similarity,
                # bfloat16: the formulas and tomesd round unit vectors and similarities, and so pick slightly worse pairs.
                tolerance=(1e-5, 1e-5) if dtype == torch.float32 else (3e-2, 1e-2),
                unlike={"matrix product alone": "no matching at all: similarities of vectors that are not normalised"},
                # The larger problem is all product: within 1.1 times one that float32 can be compared with.
                reach=None if shape[1] == 4096 and dtype != torch.float32 else reach,
                against="matrix product alone" if shape[1] == 4096 else "ToMe's formulas",
                core=device == "cuda" and dtype == torch.bfloat16,
            )
        yield Case(
            op="bipartite_match",
            name="2 x 2 cells of (2, 4096, 320) merge 2048" if not smoke else "2 x 2 cells of (1, 64, 32) merge 32",
            dtype=dtype_word(dtype),
            make=partial(
                make_cells,
                device=device,
                dtype=dtype,
                shape=(1, 64, 32) if smoke else (2, 4096, 320),
                r=32 if smoke else 2048,
            ),
            run={"tokred": ours_in_cells, "ToMeSD's formulas": cell_formulas},
            call=cell_options,
            compare=similarity_in_cells,
            tolerance=(1e-5, 1e-5) if dtype == torch.float32 else (3e-2, 1e-2),
        )
