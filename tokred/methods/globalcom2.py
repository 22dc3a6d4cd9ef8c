# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""GlobalCom2: the thumbnail of an image decides how many tokens each of its crops keeps, and has a say in which."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.methods import Method, Reduced
from tokred.methods.fastervlm import cls_attention

METHOD = Method(
    name="globalcom2",
    paper="Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration",
    stage="projector",
    basis="authors' code",
    deviations=(
        "Tokens of the thumbnail stay in their original order; the released code emits them by falling score.",
        "Positions are those of the cells; the released code counts among cells that are no padding.",
        "Rows' newline tokens are the caller's.",
        "Batches of images with different grids of crops; the released code takes one image.",
        "Scores are float32, ratios float64; ties go to the lowest index.",
    ),
    compat={"released": "scores are the [CLS] row of the logits, averaged over heads, before any softmax"},
)


def view_score(q: Tensor, k: Tensor, *, scale: float | None = None, compat: str | None = None) -> Tensor:
    """Return the score of each patch of each view, ``[num_views, num_tokens]``, of the encoder's last layer.

    ``q`` and ``k`` as ``tokred.methods.fastervlm.cls_attention`` takes them; ``compat`` is None or "released".
    """
    if compat not in (None, "released"):
        raise ValueError(f"globalcom2: expected compat to be None or 'released', got {compat!r}")
    if compat is None:
        return cls_attention(q, k, scale=scale)
    return tokred.qk_score(q, k, scale=q.shape[-1] ** -0.5 if scale is None else scale).mean(1)[:, 0, 1:]


def unlike_mean(x: Tensor) -> Tensor:
    """Return the score for encoders without [CLS]: minus the cosine to the mean token, ``[num_views, num_tokens]``."""
    (cosine,) = tokred.row_similarity(x, x.mean(1, keepdim=True), ["cosine"])
    return -cosine


def guide(
    thumbnail: Tensor, grid: tuple[int, int], size: tuple[int, int], ratio: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share that each crop keeps, the thumbnail's scores at the crops' cells, and which cells are no padding."""
    (rows, cols), side = grid, thumbnail.shape[0]
    cells = thumbnail[: side // rows * rows, : side // cols * cols]
    mass = cells.reshape(rows, side // rows, cols, side // cols).sum((1, 3)).flatten().double()
    weight = (mass / tau).softmax(0)
    share = (ratio * (1 + weight - weight.mean())).clamp(max=1)
    up = functional.interpolate(thumbnail[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    above, left = (rows * side - size[0]) // 2, (cols * side - size[1]) // 2
    around = (left, cols * side - size[1] - left, above, rows * side - size[0] - above)
    crops = (functional.pad(t, around).view(rows, side, cols, side).transpose(1, 2).reshape(rows * cols, -1)
             for t in (up, torch.ones_like(up)))  # fmt: skip
    scores, inside = crops
    return share, scores, inside > 0


def globalcom2(
    x: Tensor,
    score: Tensor,
    *,
    ratio: float,
    grids: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]] | None = None,
    tau: float = 10.0,
) -> Reduced:
    """Keep ``ratio`` of the thumbnail and, on average, of the crops: more of those that the thumbnail finds important.

    Args:
        x: Projected tokens of all views, ``[num_views, num_tokens, dim]``: of each image its thumbnail, then its crops, row by
            row. ``num_tokens`` is a square number, 576 in LLaVA-NeXT.
        score: ``[num_views, num_tokens]``, see ``view_score`` and ``unlike_mean``.
        ratio: The share to keep.
        grids: Rows and columns of crops of each image.
        sizes: Height and width of each image in cells, when crops are padded around it, as the model removes padding: the
            image is in the middle. By default there is none.
        tau: Temperature of the softmax over crops.

    Returns:
        ``Reduced`` with ``x`` ``[num_images, capacity, dim]``, ``kept_idx`` (ascending positions in an image's views, one
        after the other), ``score`` (the fused one of each view) and ``num_kept``.

    Source: the paper's allocation to crops and its fusion of global and local scores; the authors' code for their norms.
    """
    num_tokens = x.shape[1]
    side, views = round(num_tokens**0.5), [1 + rows * cols for rows, cols in grids]
    if side * side != num_tokens or sum(views) != x.shape[0]:
        raise ValueError(f"globalcom2: expected x of shape [{sum(views)}, side * side, dim], got {list(x.shape)}")
    fused, counts, masks = [], [], []
    for i, own in enumerate(score.float().split(views)):
        size = (grids[i][0] * side, grids[i][1] * side) if sizes is None else sizes[i]
        share, guidance, inside = guide(own[0].view(side, side), grids[i], size, ratio, tau)
        local = functional.normalize(own[1:].masked_fill(~inside, 0), dim=-1)
        fused += [own[:1], local + functional.normalize(guidance, dim=-1)]
        counts += [share.new_full((1,), ratio * num_tokens), inside.sum(1) * share]
        masks += [torch.ones_like(inside[:1]), inside]
    score = torch.cat(fused)
    lists = tokred.select_topk(score, torch.cat(counts).floor().int(), max_k=num_tokens, drop_mask=~torch.cat(masks))[0]
    keep = tokred.list_to_mask(lists, num_tokens).flatten()
    capacity = max(min(n, int(ratio * n) + 1) for n in (num_tokens * count for count in views))
    ends = torch.tensor([0, *views]).cumsum(0).int() * num_tokens
    x_kept, kept_idx, num_kept = tokred.prune_topk(
        x.flatten(0, 1), score.flatten(), capacity, drop_mask=~keep, cu_seqlens=ends.to(x.device),
        max_seqlen=max(views) * num_tokens,
    )  # fmt: skip
    return Reduced(x_kept, kept_idx=kept_idx, score=score, num_kept=num_kept)
