# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""cluster_dpc_knn: clusters around density peaks, density by k nearest neighbours."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op


def cluster_dpc_knn(
    x: Tensor,
    num_clusters: int,
    *,
    k: int = 5,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    order: str = "index",
    return_num_centres: bool = False,
    return_score: bool = False,
) -> Any:
    """Cluster the tokens of each sequence around its ``num_clusters`` highest density peaks.

    Density peaks with k nearest neighbours, as in TCFormer ("Not All Tokens Are Equal", section 3.2) and the video
    methods that took it over (Chat-UniVi, PruneVid, HoliTom, FastVID, PPE). With ``D(i, j) = |x[i] - x[j]| / sqrt(dim)``:

    - density: ``rho[i] = exp(-mean of D(i, j) ** 2)`` over the ``k`` nearest tokens ``j``, the token itself among them;
    - distance: ``delta[i]``, to the nearest token of higher density (of equal density and lower index); of the densest
      token, the largest distance of any two tokens of the sequence;
    - the ``num_clusters`` tokens of highest ``rho * delta`` are centres, and each token goes to the nearest centre, a
      centre to itself.

    ``tokred.segment_merge`` merges by the map, ``tokred.segment_expand`` undoes it.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]`` with ``cu_seqlens``; float32, float16
            or bfloat16, contiguous in ``dim``.
        num_clusters: How many centres. Dense: in ``[0, num_tokens]``. Packed: a sequence with fewer tokens has as many
            centres as tokens.
        k: How many nearest tokens make the density, in ``[1, 16]``; all of them where there are fewer.
        drop_mask: Bool, ``[batch_size, num_tokens]`` or ``[total_tokens]``, contiguous; these tokens are nobody's
            neighbour, belong to no cluster and are no centre.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.
        max_seqlen: The longest sequence of a packed input (the default, ``total_tokens``, is always right and slower on
            CUDA); tokens of a sequence beyond it are not looked at and belong to no cluster.
        noise: Adds ``noise * u`` to each density, with ``u`` in ``[0, 1)`` a function of ``seed`` and the token's position
            in its sequence alone. The authors add ``1e-6`` times random numbers to break ties; here ties go to the lowest
            index and the default is none.
        seed: Of the noise.
        order: Of ``centre_idx``, and so the numbers of the clusters: ``"index"``, increasing, or ``"score"``, by falling
            ``rho * delta`` (the authors'). The clusters are the same.
        return_num_centres: Return ``num_centres`` for a dense input, too.
        return_score: Return ``score`` and ``log_density``, too.

    Returns:
        ``(centre_idx, dst_idx)``, then ``num_centres`` when the input is packed or ``return_num_centres`` is set, then
        ``score`` and ``log_density`` when asked for.

        - ``centre_idx``: ``[batch_size, num_clusters]`` int64, positions within the sequence, then -1 where there are
          fewer tokens.
        - ``dst_idx``: ``[batch_size, num_tokens]`` or ``[total_tokens]`` int64, the cluster of each token, a place in
          ``centre_idx``; -1 where it is dropped.
        - ``num_centres``: ``[batch_size]`` int32.
        - ``score``: like ``dst_idx``, float32, ``log(rho * delta)``; -inf where dropped.
        - ``log_density``: likewise, ``log(rho)``.

    Logarithms rank as the values do, but far tokens, whose densities underflow, still differ. Ties go to the lowest index
    everywhere, in any ``order``. NaN ranks below every number: a token with a NaN or an infinity has no distance to
    anything, becomes a centre last, and else goes to the centre of lowest index; the others' results are as if it were
    not there. Inputs are finite with squared norms below 8e37.

    Distances are made of float32 products (for float32 inputs to float32 accuracy on every device, by three TF32 products
    on CUDA): squares are off by about 1e-6 of the squared norms, and differ between devices by as much; equal tokens have
    distance exactly 0. Deterministic: the same bits for any number of threads and whatever else is in the batch. No
    matrix of distances is stored: beside the outputs, CUDA takes at most 1.1 KB per token and the CPU 24 bytes per token
    and a tile per thread. Shapes depend on shapes and ``num_clusters`` alone, and nothing waits for the host. Not
    differentiable (``x`` may require grad): merge by ``dst_idx``. No autocast rule: ``x`` is taken as it comes.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [50.0], [3.0], [52.0], [90.0]]])
        >>> centre_idx, dst_idx = tokred.cluster_dpc_knn(x, 2, k=2)
        >>> centre_idx.tolist(), dst_idx.tolist()
        ([[0, 2]], [[0, 0, 1, 0, 1, 1]])
    """
    rules = (drop_mask, k, noise, seed, order)
    if cu_seqlens is None:
        out = torch.ops.tokred.cluster_dpc_knn.default(x, num_clusters, *rules)
    else:
        max_seqlen = x.shape[0] if max_seqlen is None else max_seqlen
        out = torch.ops.tokred.cluster_dpc_knn.packed(x, num_clusters, cu_seqlens, max_seqlen, *rules)
    return _wanted(out, cu_seqlens is not None or return_num_centres, return_score)


def _wanted(out: Any, counts: bool, scores: bool) -> Any:
    """Drop what the caller has not asked for."""
    return (*out[:2], *(out[2:3] if counts else ()), *(out[3:] if scores else ()))


def _noise(seed: int, count: int, device: torch.device) -> Tensor:
    """Return the noise of each position, in [0, 1), float32."""
    bits = _op.noise_bits(seed, 0, count, device)
    return ((bits >> 40) & (2**24 - 1)).float() * 2.0**-24


def _reference_row(x: Tensor, num_clusters: int, k: int, noise: float, seed: int, by_score: bool, drop: Any) -> Any:
    """Define the clusters of one sequence, ``[num_tokens, dim]``: centres, clusters, scores and log densities."""
    num_tokens, dim = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    drop = torch.zeros(num_tokens, dtype=torch.bool, device=x.device) if drop is None else drop
    score, log_density = (wide.new_full((num_tokens,), -torch.inf) for _ in range(2))
    dst_idx = torch.full((num_tokens,), -1, dtype=torch.int64, device=x.device)
    squares = wide.square().sum(-1)
    bad = ~squares.isfinite()
    distance = (squares[:, None] + squares - 2 * (wide @ wide.T)).clamp_min(0)
    distance.fill_diagonal_(0)
    good = (~bad & ~drop).nonzero()[:, 0]
    near = distance[good][:, good]
    if len(good):
        log_density[good] = 0 - near.sort(1).values[:, :k].mean(1) / max(dim, 1)
        if noise:
            moved = log_density.exp() + noise * _noise(seed, num_tokens, x.device)
            log_density[good] = moved.log()[good]
        rank = good[log_density[good].argsort(descending=True, stable=True)]
        denser = distance[rank][:, rank].masked_fill(
            torch.ones(len(rank), len(rank), dtype=torch.bool, device=x.device).triu(), torch.inf
        )
        delta = denser.amin(1)
        delta[0] = near.max()
        score[rank] = log_density[rank] + 0.5 * (delta / max(dim, 1)).log()
    score[bad & ~drop] = log_density[bad & ~drop] = torch.nan
    ranked = score.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(descending=True, stable=True)
    for worse in (score.isnan(), drop):  # numbers, NaN, dropped; stable: ties keep their order
        ranked = ranked[worse[ranked].to(torch.uint8).argsort(stable=True)]
    centre = ranked[: min(num_clusters, int((~drop).sum()))]
    if len(centre):
        places = centre.sort().values
        to_centres = distance[:, places].nan_to_num(torch.inf, torch.inf)
        nearest = places[(to_centres == to_centres.amin(1, keepdim=True)).to(torch.uint8).argmax(1)]
        nearest[places] = places
        centre = centre if by_score else places
        dst_idx = (nearest[:, None] == centre).to(torch.uint8).argmax(1).masked_fill(drop, -1)
    return centre, dst_idx, score, log_density


def reference(
    x: Tensor,
    num_clusters: int,
    *,
    k: int = 5,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    order: str = "index",
    return_num_centres: bool = False,
    return_score: bool = False,
) -> Any:
    """Define cluster_dpc_knn in plain PyTorch (in float64 for float64 input); tests and benchmarks measure against this."""
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    batch_size = x.shape[0] if ends is None else len(ends) - 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centre_idx = torch.full((batch_size, num_clusters), -1, dtype=torch.int64, device=x.device)
    dst_idx = torch.full(x.shape[:-1], -1, dtype=torch.int64, device=x.device)
    score, log_density = (torch.full(x.shape[:-1], -torch.inf, dtype=wide, device=x.device) for _ in range(2))
    num_centres = torch.zeros(batch_size, dtype=torch.int32, device=x.device)
    for b in range(batch_size):
        part: Any = b
        if ends is not None:
            length = ends[b + 1] - ends[b] if max_seqlen is None else min(ends[b + 1] - ends[b], max_seqlen)
            part = slice(ends[b], ends[b] + length)
        drop = None if drop_mask is None else drop_mask[part]
        found = _reference_row(x[part], num_clusters, k, noise, seed, order == "score", drop)
        num_centres[b] = len(found[0])
        centre_idx[b, : len(found[0])] = found[0]
        dst_idx[part], score[part], log_density[part] = found[1:]
    out = (centre_idx, dst_idx, num_centres, score, log_density)
    return _wanted(out, ends is not None or return_num_centres, return_score)


def _empty(x: Tensor, batch_size: int, num_clusters: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[:-1]
    return (
        x.new_empty((batch_size, num_clusters), dtype=torch.int64),
        x.new_empty(tokens, dtype=torch.int64),
        x.new_empty((batch_size,), dtype=torch.int32),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.float32),
    )


@torch.library.register_fake("tokred::cluster_dpc_knn")
def _(x: Tensor, num_clusters: int, *rules: Any, **options: Any) -> tuple[Tensor, ...]:
    return _empty(x, x.shape[0], num_clusters)


@torch.library.register_fake("tokred::cluster_dpc_knn.packed")
def _(x: Tensor, num_clusters: int, cu_seqlens: Tensor, *rules: Any, **options: Any) -> tuple[Tensor, ...]:
    return _empty(x, cu_seqlens.shape[0] - 1, num_clusters)


for _name in ("cluster_dpc_knn", "cluster_dpc_knn.packed"):
    _op.no_gradient(_name, "merge by its dst_idx with segment_merge, which is differentiable")
_op.fold_vmap("cluster_dpc_knn")


def floor(
    x: Tensor,
    num_clusters: int,
    *,
    k: int = 5,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    order: str = "index",
    return_num_centres: bool = False,
    return_score: bool = False,
) -> _op.Floor:
    """Tokens read once, outputs written; the product of each pair of tokens, and of tokens and centres.

    Each pair of two tokens is counted twice: once for densities and, since it is not stored, once for distances to denser
    tokens. Packed: as if all sequences were equally long.
    """
    batch_size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, dim = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    num_tokens = tokens // max(batch_size, 1)
    read = sum(t.nbytes for t in (x, drop_mask, cu_seqlens) if t is not None)
    written = batch_size * (8 * num_clusters + 4) + tokens * (8 + 4 + 4)
    return read + written, 2 * tokens * (num_tokens + num_clusters) * dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    # Small whole numbers: distances are exact in every dtype and on every device.
    x = randn(2, 26, 6).mul(2).round().to(dtype)
    drop_mask = (torch.arange(52, device=device) % 7 == 0).reshape(2, 26)
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 52], dtype=torch.int32, device=device), "max_seqlen": 49}
    return [
        ((x, 5), {}),
        ((x, 6), {"k": 3, "order": "score", "return_score": True, "return_num_centres": True}),
        ((x, 26), {"drop_mask": drop_mask, "noise": 1e-3, "seed": 7, "return_num_centres": True}),
        ((x, 0), {}),
        ((x.flatten(0, 1), 4), {"order": "score", "return_score": True, **packed}),
    ]
