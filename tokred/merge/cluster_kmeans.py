# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""cluster_kmeans: k-means, its medoid form, and the nearest code of a codebook."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op

EPS = 1e-12  # the smallest norm that is divided by


def cluster_kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    init: str | Tensor = "kkz",
    metric: str = "l2",
    update: str = "mean",
    max_iter: int = 20,
    tol: float = 0.0,
    seed: int = 0,
    drop_mask: Tensor | None = None,
    return_counts: bool = False,
) -> Any:
    """Cluster the tokens of each row by Lloyd's iterations, all of them in one call that never waits for the device.

    In each iteration every token goes to the nearest centroid, and every centroid moves to the mean of its tokens
    (VQToken's codebook, A2ATS) or to the token nearest to that mean (CenterCLIP's medoids). With ``max_iter=0`` and given
    centroids it is vector quantisation: the nearest code of each token.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, float32, float16 or bfloat16, contiguous in ``dim``.
        num_clusters: How many, at least 1.
        init: The first centroids. ``"kkz"``: the longest token, then again and again the one farthest from its nearest
            start. ``"kmeans++"``: drawn from ``seed``, the first with equal odds, then with odds in proportion to the
            squared distance to the nearest start (to 1 - cosine). Or ``[batch_size, num_clusters, dim]``, contiguous, of
            the dtype of ``x``. Where fewer tokens than ``num_clusters`` can be chosen, the others copy the first start.
        metric: What is nearest: ``"l2"``, or ``"cosine"`` of ``v / max(|v|, 1e-12)``. Means are means of ``x`` itself.
        update: ``"mean"``, or ``"medoid"``: the member nearest to the mean. Of squared distances that is the member with
            the smallest sum of distances to all members; CenterCLIP sums them unsquared.
        max_iter: How many iterations at most.
        tol: A row has converged when its centroids, all as one vector, move by no more than this.
        seed: For ``"kmeans++"``. Draws follow from it, the step and the token's position, alike for every row and device.
        drop_mask: Bool ``[batch_size, num_tokens]``, contiguous: these tokens take no part.
        return_counts: Return ``num_members`` and ``num_iter``, too.

    Returns:
        ``(centroids, dst_idx)``, then ``num_members`` and ``num_iter`` when asked for.

        - ``centroids``: ``[batch_size, num_clusters, dim]``, of the dtype of ``x``, in which they are rounded in every
          iteration. An empty cluster keeps its centroid.
        - ``dst_idx``: ``[batch_size, num_tokens]`` int64, the nearest of the returned centroids; -1 where a token is
          dropped or has a NaN or an infinity.
        - ``num_members``: ``[batch_size, num_clusters]`` int32, how many tokens are nearest to each.
        - ``num_iter``: ``[batch_size]`` int32, how often the centroids moved, the last step, of at most ``tol``, included.

    Ties go to the lowest index, of centroids and of tokens. A centroid with a NaN or an infinity is nobody's. Inputs are
    finite with squared norms below 8e37.

    Similarities of tokens and centroids are made of float32 products (for float32 inputs to float32 accuracy on every
    device, by three TF32 products on CUDA) and differ between devices by about 1e-6 of ``|a| |b|``; iterations can take
    another way from there. Deterministic: the same bits for any number of threads and whatever else is in the batch; means
    are those of ``segment_merge``. CUDA launches ``num_clusters`` kernels for starts that are not given and seven or eight
    an iteration; those after a row has converged return at once. Memory beside the outputs: 28 bytes per token and two rows
    per cluster. Shapes depend on shapes and ``num_clusters`` alone. Not differentiable (``x`` may require grad): merge by
    ``dst_idx``. No autocast rule: ``x`` is taken as it comes.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [10.0], [12.0], [2.0]]])
        >>> centroids, dst_idx = tokred.cluster_kmeans(x, 2)
        >>> centroids.flatten().tolist(), dst_idx.tolist()
        ([11.0, 1.0], [[1, 1, 0, 0, 1]])
    """
    starts, name = (init, "kkz") if isinstance(init, Tensor) else (None, init)
    out = torch.ops.tokred.cluster_kmeans.default(
        x, num_clusters, starts, drop_mask, name, metric, update, max_iter, tol, seed
    )
    return out if return_counts else out[:2]


def _lowest_argmax(value: Tensor) -> Tensor:
    """Return the lowest index of the largest value of each row that is not NaN; -1 where all are."""
    number = ~value.isnan()
    best = value.masked_fill(~number, -torch.inf).amax(-1, keepdim=True)
    return (number & (value == best)).to(torch.uint8).argmax(-1).masked_fill(~number.any(-1), -1)


def _exponential(seed: int, step: int, count: int, device: torch.device) -> Tensor:
    """Return the kernels' exponential noise of each position, float32."""
    odd = ((_op.noise_bits(seed, step, count, device) >> 32) & (2**32 - 1)) * 2 + 1
    return (33 - odd.double().log2()).clamp_min(2.0**-28)


def _reference_row(x: Tensor, num_clusters: int, starts: Any, drop: Any, o: dict[str, Any]) -> Any:
    """Define one row, ``[num_tokens, dim]``: centroids, clusters, members and iterations."""
    num_tokens = x.shape[0]
    wide = x.double()
    cosine = o["metric"] == "cosine"
    norm = wide.norm(dim=-1)
    bad = ~norm.isfinite() | (torch.zeros_like(norm, dtype=torch.bool) if drop is None else drop)

    def unit(v: Tensor) -> Tensor:
        return v / v.norm(dim=-1, keepdim=True).clamp_min(EPS)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        if cosine:
            return unit(a) @ unit(b).transpose(-1, -2)
        return -(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)

    if starts is None:
        picks: list[int] = []
        nearest = torch.full_like(norm, torch.inf)
        for step in range(num_clusters):
            value = nearest if step else norm
            if o["init"] == "kmeans++":
                value = (nearest if step else 1.0) / _exponential(o["seed"], step, num_tokens, x.device)
            taken = torch.zeros_like(bad).index_fill(0, torch.tensor(picks, dtype=torch.int64, device=x.device), True)
            pick = int(_lowest_argmax(value.masked_fill(bad | taken, torch.nan))) if num_tokens else -1
            picks.append(pick if pick >= 0 or not step else picks[0])
            if pick >= 0:
                nearest = torch.minimum(
                    nearest, (1.0 if cosine else 0.0) - similarity(wide, wide[pick : pick + 1])[:, 0]
                )
                nearest = nearest.clamp_min(0)
        at = torch.tensor(picks, device=x.device)
        starts = x[at.clamp_min(0)] * (at >= 0)[:, None] if num_tokens else x.new_zeros(num_clusters, x.shape[1])
        starts = starts.masked_fill((at < 0)[:, None], 0)
    centroids = starts.clone()

    def assign() -> Tensor:
        lost = ~centroids.double().norm(dim=-1).isfinite()
        value = similarity(wide, centroids.double()).masked_fill(bad[:, None] | lost, torch.nan)
        return _lowest_argmax(value)

    num_iter = 0
    while num_iter < o["max_iter"]:
        num_iter += 1
        cluster = assign()
        moved = 0.0
        for j in range(num_clusters):
            members = (cluster == j).nonzero()[:, 0]
            if len(members):
                to = wide[members].mean(0)
                if o["update"] == "medoid":
                    rounded = to.to(x.dtype)[None].double()
                    to = wide[members[int(_lowest_argmax(similarity(wide[members], rounded)[:, 0]))]]
                moved += float((to.to(x.dtype) - centroids[j]).double().square().sum())
                centroids[j] = to.to(x.dtype)
        if moved**0.5 <= o["tol"]:
            break
    cluster = assign()
    members = torch.bincount(cluster[cluster >= 0], minlength=num_clusters).int()
    return centroids, cluster, members, num_iter


def reference(
    x: Tensor,
    num_clusters: int,
    *,
    init: str | Tensor = "kkz",
    metric: str = "l2",
    update: str = "mean",
    max_iter: int = 20,
    tol: float = 0.0,
    seed: int = 0,
    drop_mask: Tensor | None = None,
    return_counts: bool = False,
) -> Any:
    """Define cluster_kmeans in plain PyTorch, in float64 but for the rounding of centroids to the dtype of x."""
    options = {"init": init, "metric": metric, "update": update, "max_iter": max_iter, "tol": tol, "seed": seed}
    batch_size, num_tokens, dim = x.shape
    centroids = x.new_zeros(batch_size, num_clusters, dim)
    dst_idx = torch.zeros(batch_size, num_tokens, dtype=torch.int64, device=x.device)
    num_members = torch.zeros(batch_size, num_clusters, dtype=torch.int32, device=x.device)
    num_iter = torch.zeros(batch_size, dtype=torch.int32, device=x.device)
    for b in range(batch_size):
        starts = init[b] if isinstance(init, Tensor) else None
        drop = None if drop_mask is None else drop_mask[b]
        centroids[b], dst_idx[b], num_members[b], num_iter[b] = _reference_row(
            x[b], num_clusters, starts, drop, options
        )
    out = (centroids, dst_idx, num_members, num_iter)
    return out if return_counts else out[:2]


@torch.library.register_fake("tokred::cluster_kmeans")
def _(x: Tensor, num_clusters: int, *rules: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_tokens, dim = x.shape
    return (
        x.new_empty((batch_size, num_clusters, dim)),
        x.new_empty((batch_size, num_tokens), dtype=torch.int64),
        x.new_empty((batch_size, num_clusters), dtype=torch.int32),
        x.new_empty((batch_size,), dtype=torch.int32),
    )


_op.no_gradient("cluster_kmeans", "merge by its dst_idx with segment_merge, which is differentiable")
_op.fold_vmap("cluster_kmeans")


def floor(
    x: Tensor,
    num_clusters: int,
    *,
    init: str | Tensor = "kkz",
    metric: str = "l2",
    update: str = "mean",
    max_iter: int = 20,
    tol: float = 0.0,
    seed: int = 0,
    drop_mask: Tensor | None = None,
    return_counts: bool = False,
) -> _op.Floor:
    """Tokens read once and outputs written; the products of one pass over tokens and centroids, and of ``max_iter`` more.

    As if no row converged before.
    """
    batch_size, num_tokens, dim = x.shape
    read = sum(t.nbytes for t in (x, drop_mask, init) if isinstance(t, Tensor))
    written = batch_size * (num_clusters * (dim * x.element_size() + 4) + 8 * num_tokens + 4)
    return read + written, 2 * batch_size * num_tokens * num_clusters * dim * (max_iter + 1)


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    # Groups that lie far apart and small whole numbers: no rounding decides.
    centres = 16 * torch.eye(4, 6, device=device).repeat(1, 1)
    group = torch.arange(26, device=device) % 4
    x = (centres[group] + randn(2, 26, 6).round()).to(dtype)
    drop_mask = (torch.arange(52, device=device) % 7 == 0).reshape(2, 26)
    codes = centres[None].expand(2, -1, -1).to(dtype).contiguous()
    return [
        ((x, 4), {"tol": 1.0}),
        ((x, 4), {"update": "medoid", "metric": "cosine", "max_iter": 2, "drop_mask": drop_mask}),
        ((x, 4), {"init": codes, "max_iter": 0, "return_counts": True}),
        ((x, 3), {"init": "kmeans++", "seed": 5, "max_iter": 0, "return_counts": True}),
    ]
