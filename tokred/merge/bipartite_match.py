# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""bipartite_match: which tokens merge into which, by bipartite soft matching."""

import math
from typing import Any

import torch
from torch import Tensor

from tokred import _op


def bipartite_match(
    metric: Tensor,
    r: int | None = None,
    *,
    num_protected: int = 0,
    protect: Tensor | None = None,
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
    weight: Tensor | None = None,
    offset: float = 0.0,
    group: Tensor | None = None,
    threshold: float | Tensor | None = None,
    seq_lens: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
    return_score: bool = False,
) -> Any:
    """Match each source token with its most similar destination and merge the most similar pairs.

    Bipartite soft matching of "Token Merging: Your ViT But Faster", section 3: tokens at even positions are sources, those
    at odd positions are destinations. Each source finds the destination most similar to it; the ``r`` sources with the
    highest such similarity merge into theirs, all other tokens stay. The result is a map, which
    ``tokred.segment_merge`` applies and ``tokred.segment_expand`` undoes.

    Args:
        metric: What tokens are compared by, ``[batch_size, num_tokens, dim]``, float32, float16 or bfloat16, any strides
            but contiguous in ``dim``. ToMe takes the attention keys, averaged over heads.
        r: How many tokens to merge away: in ``[0, s]`` with ``s`` the number of unprotected sources, and 0 when no
            destination is unprotected. With ``threshold`` or ``seq_lens`` the most that merge, and None is all.
        num_protected: The first tokens (class token, distillation token) that neither merge nor receive. Not with lists.
        protect: Bool ``[batch_size, num_tokens]``, contiguous: more tokens that should neither merge nor receive. It is
            data, so it cannot be checked: each row must leave ``r`` sources and one destination. Where it does not, all
            shapes hold and no token is lost: protected sources merge after the others, lowest index first, and
            protected destinations are taken where no other is left.
        sources: Instead of the even tokens: their positions, ``[batch_size, s]`` or ``[s]`` for all rows, int64 or int32. What
            is not in ``[0, num_tokens)``, -1 by convention, is an empty slot; each row must have ``r`` that are not. No
            token may be listed twice; those in neither list stay as they are.
        destinations: Instead of the odd tokens, likewise; together with ``sources``.
        weight: ``[batch_size, num_tokens]`` float32, contiguous, finite and at least 0: the similarity of source i and
            destination j is ``(v_i v_j + offset) w_j``, and the score of a source its best similarity times ``w_i``.
        offset: Added to the product before it is weighed.
        group: ``[batch_size, num_tokens]`` or ``[num_tokens]`` int32: only tokens of one group match. A source without a
            number in its group counts as protected.
        threshold: Only sources with a score above it merge: a float, or float32 of one value or ``[batch_size]``, which is
            not read back. NaN merges none.
        seq_lens: ``[batch_size]`` int32: each row has so many tokens and the rest of it is padding, which is not looked at.
        normalize: Compare directions: the product is that of ``v / max(|v|, eps)``. Else the plain dot product.
        eps: Smallest norm that is divided by, at least 0. ToMe has no such bound: 0 makes a zero vector NaN.
        order: How the output rows are laid out. ``"index"``: surviving tokens in their original order. ``"grouped"``: all
            but destinations in their original order, then all destinations in theirs (ToMe's layout with a class token).
            ``"score"``: unmerged sources by descending score, protected ones after the others; then other tokens in their
            order (the first ``num_protected`` ones); then all destinations (ToMe's layout without a class token).
        return_score: Return ``match_idx`` and ``score``, too.

    Returns:
        ``dst_idx``, or ``(dst_idx, match_idx, score)``, each ``[batch_size, num_tokens]``; with ``threshold`` or ``seq_lens``
        also ``num_kept``, at the end.

        - ``dst_idx``: int64, the output row that each token goes to; a merged source has the row of its destination,
          padding has -1. There are ``num_tokens - r`` output rows, or ``num_kept`` of at most ``num_tokens``.
        - ``match_idx``: int64, the position of each source's best destination, merged or not; -1 for other tokens, and
          where there is no destination.
        - ``score``: float32, its score; -inf where ``match_idx`` is -1 and for protected sources.
        - ``num_kept``: ``[batch_size]`` int32, output rows of each row. Then protected tokens never merge nor receive, and
          scores of NaN or -inf do not merge: ``segment_merge(x, dst_idx, num_tokens)`` has zeros past ``num_kept``.

    Ties go to the lowest index (with lists, the earliest slot), in the choice of destinations and of merged sources. NaN
    ranks below every number: a source whose similarities are all NaN matches the first unprotected destination, has score
    NaN and merges last.

    Similarities are computed in float32 (for float32 inputs to float32 accuracy on every device, by three TF32 products
    on CUDA) and differ between devices by rounding, about 1e-6 of ``|a| |b|``; the indices always equal the selection from
    the returned ``score``. Inputs are finite with squared norms below 3e38: a token with an infinity has NaN
    similarities. Deterministic: the same bits for any number of threads and whatever else is in the batch. No
    similarity matrix is stored: beside the outputs, CUDA takes at most 64 bytes per source and the CPU 8, and a tile per
    thread. Shapes depend on shapes and ``r`` alone. Not differentiable (``metric`` may require grad); no autocast rule:
    metric is taken as it comes.

    Who needs which: ToMe, TempMe: parity and ``num_protected``. ToMeSD: lists, see ``tokred.grid_cells``. PiToMe, and
    DUET-VLM's contextual tokens: lists. MCTF: ``offset=1`` and ``weight``, since maxima do not change by a power of all
    factors; biases of logarithms are ``weight = (bias - bias.amax()).exp()``; both directions, see
    ``tokred.match_both_ways``. DyMU: ``threshold`` and ``seq_lens``.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2], [0.7, 0.7]]])
        >>> tokred.bipartite_match(metric, 2).tolist()
        [[1, 0, 0, 1, 2]]
        >>> dst_idx, num_kept = tokred.bipartite_match(metric, threshold=0.99)
        >>> dst_idx.tolist(), num_kept.tolist()
        ([[0, 1, 1, 2, 3]], [4])
        >>> tokred.bipartite_match(metric, 1, sources=torch.tensor([1, 3]), destinations=torch.tensor([0, 2])).tolist()
        [[0, 1, 1, 2, 3]]

    The first token pairs with the one at position 3 (0.98), the third with the one at 1 (0.995); these two merge.
    """
    batch_size = metric.shape[0]
    ragged = threshold is not None or seq_lens is not None
    if r is None:
        if not ragged:
            raise RuntimeError("bipartite_match: expected r, or threshold or seq_lens, got none of them")
        slots = _slots(metric, num_protected, sources, destinations)
        r = slots[0] if slots[1] > 0 else 0
    if not ragged and offset == 0 and all(t is None for t in (sources, destinations, weight, group)):
        out = torch.ops.tokred.bipartite_match.default(metric, r, protect, num_protected, normalize, eps, order)
        return out if return_score else out[0]
    row_threshold = threshold.float().expand(batch_size).contiguous() if isinstance(threshold, Tensor) else None
    dst_idx, match_idx, score, num_kept = torch.ops.tokred.bipartite_match.full(
        metric,
        r,
        protect,
        num_protected,
        normalize,
        eps,
        order,
        _per_row(sources, batch_size),
        _per_row(destinations, batch_size),
        weight,
        offset,
        None if group is None else group.expand(batch_size, -1).contiguous(),
        ragged,
        -math.inf if threshold is None or row_threshold is not None else threshold,
        row_threshold,
        seq_lens,
    )
    if ragged:
        return (dst_idx, match_idx, score, num_kept) if return_score else (dst_idx, num_kept)
    return (dst_idx, match_idx, score) if return_score else dst_idx


def _per_row(tokens: Tensor | None, batch_size: int) -> Tensor | None:
    return tokens.contiguous().expand(batch_size, -1) if tokens is not None and tokens.dim() == 1 else tokens


def _slots(metric: Tensor, num_protected: int, sources: Tensor | None, destinations: Tensor | None) -> tuple[int, int]:
    """Return how many sources and destinations a row has."""
    if sources is not None and destinations is not None:
        return sources.shape[-1], destinations.shape[-1]
    num_tokens = metric.shape[1]
    return (num_tokens + 1) // 2 - (num_protected + 1) // 2, num_tokens // 2 - num_protected // 2


def _row(
    value: Tensor,
    r: int,
    source: Tensor,
    destination: Tensor,
    apart: Tensor,
    protect: Tensor,
    weight: Tensor,
    offset: float,
    group: Tensor | None,
    limit: float | None,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Define one batch row; limit is None where r sources merge whatever happens, apart are laid out as destinations."""
    device = value.device
    dst_idx = torch.full((len(value),), -1, dtype=torch.int64, device=device)
    match_idx, score = dst_idx.clone(), value.new_full((len(value),), -torch.inf)
    free = ~protect[destination]
    allowed = free if free.any() or limit is not None else torch.ones_like(free)
    blocked = protect[source]
    if allowed.any():
        similarity = (value[source] @ value[destination].T + offset) * weight[destination]
        number = allowed & ~similarity.isnan()
        if group is not None:
            number &= group[source][:, None] == group[destination]
            blocked = blocked | ~number.any(1)
        best = similarity.masked_fill(~number, -torch.inf).amax(1)
        columns = torch.arange(len(destination), device=device)
        column = columns.where(number & (similarity == best[:, None]), len(destination)).amin(1)
        column = torch.where(number.any(1), column, columns[allowed][0])
        best = torch.where(number.any(1), best, torch.nan) * weight[source]
        match_idx[source], score[source] = destination[column], best.masked_fill(blocked, -torch.inf)
        r = min(r, len(source)) if limit is None else min(r, int(((score[source] > limit) & ~blocked).sum()))
    else:
        r = 0

    # Best first: scores, then NaN, then blocked ones. Least significant first, each stable sort keeps the one before it.
    rank = torch.arange(len(source), device=device)
    for key in (score[source].nan_to_num(-torch.inf, torch.inf, -torch.inf), ~score[source].isnan(), ~blocked):
        rank = rank[key[rank].double().argsort(descending=True, stable=True)]
    merged, unmerged = source[rank[:r]], source[rank[r:]]
    stays = torch.ones(len(value), dtype=torch.bool, device=device)
    stays[merged] = False
    if order != "index":
        stays[apart] = False
        if order == "score":
            stays[unmerged] = False
    rows = stays.nonzero().flatten()
    if order != "index":
        rows = torch.cat([unmerged if order == "score" else rows[:0], rows, apart.sort().values])
    dst_idx[rows] = torch.arange(len(rows), device=device)
    dst_idx[merged] = dst_idx[match_idx[merged]]
    return dst_idx, match_idx, score, len(rows)


def reference(
    metric: Tensor,
    r: int | None = None,
    *,
    num_protected: int = 0,
    protect: Tensor | None = None,
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
    weight: Tensor | None = None,
    offset: float = 0.0,
    group: Tensor | None = None,
    threshold: float | Tensor | None = None,
    seq_lens: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
    return_score: bool = False,
) -> Any:
    """Define bipartite_match in plain PyTorch; tests and benchmarks measure against this. float64 is computed as such."""
    batch_size, num_tokens, _ = metric.shape
    device = metric.device
    ragged = threshold is not None or seq_lens is not None
    value = metric if metric.dtype == torch.float64 else metric.float()
    if normalize:
        value = value / value.norm(dim=-1, keepdim=True).clamp_min(eps)
    dst_idx = torch.full((batch_size, num_tokens), -1, dtype=torch.int64, device=device)
    match_idx, score = dst_idx.clone(), value.new_full((batch_size, num_tokens), -torch.inf)
    num_kept = torch.zeros(batch_size, dtype=torch.int32, device=device)
    for b in range(batch_size):
        count = num_tokens if seq_lens is None else min(max(int(seq_lens[b]), 0), num_tokens)
        tokens = torch.arange(count, device=device)
        if sources is not None and destinations is not None:
            lists = [t[b] if t.dim() == 2 else t for t in (sources.long(), destinations.long())]
            source, destination = (t[(t >= 0) & (t < count)] for t in lists)
            apart = destination
        else:
            source, destination = (tokens[i::2][tokens[i::2] >= num_protected] for i in (0, 1))
            apart = tokens[1::2]
        limit = None
        if ragged:
            limit = -torch.inf
            if threshold is not None:
                limit = float(torch.as_tensor(threshold).expand(batch_size)[b])
        row = _row(
            value[b, :count],
            num_tokens if r is None else r,
            source,
            destination,
            apart,
            torch.zeros(count, dtype=torch.bool, device=device) if protect is None else protect[b, :count],
            value.new_ones(count) if weight is None else weight[b, :count].to(value.dtype),
            offset,
            None if group is None else group.expand(batch_size, -1)[b, :count],
            limit,
            order,
        )
        dst_idx[b, :count], match_idx[b, :count], score[b, :count], num_kept[b] = row
    out = (dst_idx, match_idx, score, num_kept) if return_score else (dst_idx, num_kept)
    if ragged:
        return out
    return out[:-1] if return_score else dst_idx


@torch.library.register_fake("tokred::bipartite_match")
def _(
    metric: Tensor,
    r: int,
    protect: Tensor | None = None,
    num_protected: int = 0,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
) -> tuple[Tensor, Tensor, Tensor]:
    shape = metric.shape[:2]
    dst_idx, match_idx = (metric.new_empty(shape, dtype=torch.int64) for _ in range(2))
    return dst_idx, match_idx, metric.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("tokred::bipartite_match.full")
def _(metric: Tensor, r: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = metric.shape[:2]
    dst_idx, match_idx = (metric.new_empty(shape, dtype=torch.int64) for _ in range(2))
    score = metric.new_empty(shape, dtype=torch.float32)
    return dst_idx, match_idx, score, metric.new_empty(shape[:1], dtype=torch.int32)


for _overload in ("bipartite_match", "bipartite_match.full"):
    _op.no_gradient(_overload, "merge by its dst_idx with segment_merge, which is differentiable")
    _op.fold_vmap(_overload)


def floor(
    metric: Tensor,
    r: int | None = None,
    *,
    num_protected: int = 0,
    protect: Tensor | None = None,
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
    weight: Tensor | None = None,
    offset: float = 0.0,
    group: Tensor | None = None,
    threshold: float | Tensor | None = None,
    seq_lens: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
    return_score: bool = False,
) -> _op.Floor:
    """All inputs read once, the outputs (20 bytes a token, 4 a row) written; the product of sources and destinations."""
    batch_size, num_tokens, dim = metric.shape
    num_src, num_dst = _slots(metric, num_protected, sources, destinations)
    given = (metric, protect, sources, destinations, weight, group, threshold, seq_lens)
    moved = sum(t.nbytes for t in given if isinstance(t, Tensor)) + 20 * batch_size * num_tokens
    if threshold is not None or seq_lens is not None:
        moved += 4 * batch_size
    return moved, 2 * batch_size * num_src * num_dst * dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    metric: Any = randn(2, 13, 24, dtype=dtype)
    protect = (torch.arange(26, device=device) % 5 == 0).reshape(2, 13)
    weight = randn(2, 13).abs() + 0.5
    sources = torch.tensor([[0, 1, 4, 7, 12], [11, 3, 2, -1, 5]], device=device)
    destinations = torch.tensor([6, 8, 9, 10], device=device)
    seq_lens = torch.tensor([13, 6], dtype=torch.int32, device=device)
    group = (torch.arange(13, device=device) // 5).int()
    return [
        ((metric, 4), {}),
        ((metric, 3), {"num_protected": 1, "order": "grouped", "return_score": True}),
        ((metric, 3), {"protect": protect, "order": "score", "return_score": True}),
        ((metric, 0), {"normalize": False}),
        ((metric, 3), {"sources": sources, "destinations": destinations, "order": "score"}),
        ((metric, 3), {"weight": weight, "offset": 1.0, "group": group, "return_score": True}),
        ((metric,), {"threshold": 0.1, "seq_lens": seq_lens, "num_protected": 1, "return_score": True}),
        ((metric, 2), {"threshold": torch.tensor([0.0, 0.2], device=device), "order": "grouped"}),
    ]
