# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""bipartite_match: which tokens merge into which, by ToMe's bipartite soft matching."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    num_protected: int = 0,
    protect: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
    return_score: bool = False,
) -> Any:
    """Match every other token with its most similar neighbour and merge the ``r`` most similar pairs away.

    Bipartite soft matching of "Token Merging: Your ViT But Faster", section 3: tokens at even positions are sources, those
    at odd positions are destinations. Each source finds the destination most similar to it; the ``r`` sources with the
    highest such similarity merge into theirs, all other tokens stay. The result is a map, which
    ``tokred.segment_merge`` applies and ``tokred.segment_expand`` undoes.

    Args:
        metric: What tokens are compared by, ``[batch_size, num_tokens, dim]``, float32, float16 or bfloat16, any strides
            but contiguous in ``dim``. ToMe takes the attention keys, averaged over heads.
        r: How many tokens to merge away: in ``[0, s]`` with ``s`` the number of unprotected sources, and 0 when no
            destination is unprotected.
        num_protected: The first tokens (class token, distillation token) that neither merge nor receive.
        protect: Bool ``[batch_size, num_tokens]``, contiguous: more tokens that should neither merge nor receive. It is
            data, so it cannot be checked: each row must leave ``r`` sources and one destination. Where it does not, all
            shapes hold and no token is lost: protected sources merge after the others, lowest index first, and
            protected destinations are taken where no other is left.
        normalize: Compare directions: similarity is the dot product of ``v / max(|v|, eps)``. Else the plain dot product.
        eps: Smallest norm that is divided by, at least 0. ToMe has no such bound: 0 makes a zero vector NaN.
        order: How the ``num_tokens - r`` output rows are laid out. ``"index"``: surviving tokens in their original order.
            ``"grouped"``: unmerged sources in their original order, then all destinations (ToMe's layout with a class
            token). ``"score"``: unmerged sources by descending similarity, protected ones after the others and the first
            ``num_protected`` tokens after those, then all destinations (ToMe's layout without a class token).
        return_score: Return ``match_idx`` and ``score``, too.

    Returns:
        ``dst_idx``, or ``(dst_idx, match_idx, score)``, each ``[batch_size, num_tokens]``.

        - ``dst_idx``: int64, the output row that each token goes to; a merged source has the row of its destination.
        - ``match_idx``: int64, the position of each source's best destination, merged or not; -1 for destinations, the
          first ``num_protected`` tokens, and where there is no destination.
        - ``score``: float32, the similarity to it; -inf where ``match_idx`` is -1 and for protected sources.

    Ties go to the lowest index, in the choice of destinations and of merged sources. NaN ranks below every number: a
    source whose similarities are all NaN matches the first unprotected destination, has score NaN and merges last.

    Similarities are computed in float32 (for float32 inputs to float32 accuracy on every device, by three TF32 products
    on CUDA) and differ between devices by rounding, about 1e-6 of ``|a| |b|``; the indices always equal the selection from
    the returned ``score``. Inputs are finite with squared norms below 3e38: a token with an infinity has NaN
    similarities. Deterministic: the same bits for any number of threads and whatever else is in the batch. No
    similarity matrix is stored: beside the outputs, CUDA takes at most 64 bytes per source and the CPU a tile per thread.
    Shapes depend on shapes and ``r`` alone. Not differentiable (``metric`` may require grad); no autocast rule: metric is
    taken as it comes.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2], [0.7, 0.7]]])
        >>> tokred.bipartite_match(metric, 2).tolist()
        [[1, 0, 0, 1, 2]]

    The first token pairs with the one at position 3 (0.98), the third with the one at 1 (0.995); these two merge.
    """
    dst_idx, match_idx, score = torch.ops.tokred.bipartite_match.default(
        metric, r, protect, num_protected, normalize, eps, order
    )
    return (dst_idx, match_idx, score) if return_score else dst_idx


def _best_destination(similarity: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's best value and its lowest column, of the allowed ones that are not NaN; else NaN and the first."""
    columns = torch.arange(similarity.shape[-1], device=similarity.device)
    number = allowed[:, None, :] & ~similarity.isnan()
    best = similarity.masked_fill(~number, -torch.inf).amax(-1)
    column = columns.where(number & (similarity == best[..., None]), torch.iinfo(torch.int64).max).amin(-1)
    first = columns.where(allowed, torch.iinfo(torch.int64).max).amin(-1)
    none = ~number.any(-1)
    return best.masked_fill(none, torch.nan), torch.where(none, first[:, None], column)


def _rank(score: Tensor, protect: Tensor, num_first: int) -> Tensor:
    """Return the order of sources, best first: ``[batch_size, num_sources]``; the num_first first ones come last."""
    batch_size, num_src = score.shape
    order = torch.arange(num_src, device=score.device).expand(batch_size, -1)
    candidate = (order >= num_first) & ~protect
    # Least significant first: each stable sort keeps the order of the ones before it.
    keys = (score.nan_to_num(-torch.inf, torch.inf, -torch.inf), ~score.isnan())
    for key in (*(k.masked_fill(~candidate, 0) for k in keys), candidate, order >= num_first):
        order = order.gather(1, key.gather(1, order).double().argsort(dim=1, descending=True, stable=True))
    return order


def reference(
    metric: Tensor,
    r: int,
    *,
    num_protected: int = 0,
    protect: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
    return_score: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Define bipartite_match in plain PyTorch; tests and benchmarks measure against this. float64 is computed as such."""
    batch_size, num_tokens, _ = metric.shape
    value = metric if metric.dtype == torch.float64 else metric.float()
    if normalize:
        value = value / value.norm(dim=-1, keepdim=True).clamp_min(eps)
    src, dst = value[:, ::2], value[:, 1::2]
    num_src, num_dst = src.shape[1], dst.shape[1]
    first_src, first_dst = (num_protected + 1) // 2, num_protected // 2
    marked = (
        torch.zeros((batch_size, num_tokens), dtype=torch.bool, device=metric.device) if protect is None else protect
    )

    match_idx = torch.full((batch_size, num_tokens), -1, dtype=torch.int64, device=metric.device)
    score = value.new_full((batch_size, num_tokens), -torch.inf)
    if batch_size > 0 and first_dst < num_dst and first_src < num_src:
        within = torch.arange(num_dst, device=metric.device) >= first_dst
        allowed = within & ~marked[:, 1::2]
        allowed = torch.where(allowed.any(1, keepdim=True), allowed, within)
        best, column = _best_destination(src[:, first_src:] @ dst.transpose(1, 2), allowed)
        score[:, 2 * first_src :: 2] = best.masked_fill(marked[:, 2 * first_src :: 2], -torch.inf)
        match_idx[:, 2 * first_src :: 2] = 2 * column + 1

    ranked = _rank(score[:, ::2], marked[:, ::2], first_src)
    merged_src, unmerged_src = ranked[:, :r], ranked[:, r:]
    merged = torch.zeros_like(marked)
    merged.scatter_(1, 2 * merged_src, True)
    if order == "index":
        dst_idx = (~merged).cumsum(1) - 1
    else:
        unmerged = unmerged_src if order == "score" else unmerged_src.sort(1).values
        dst_idx = torch.zeros_like(match_idx)
        dst_idx.scatter_(1, 2 * unmerged, torch.arange(num_src - r, device=metric.device).expand_as(unmerged))
        dst_idx[:, 1::2] = num_src - r + torch.arange(num_dst, device=metric.device)
    dst_idx = torch.where(merged, dst_idx.gather(1, match_idx.clamp_min(0)), dst_idx)
    return (dst_idx, match_idx, score) if return_score else dst_idx


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


_op.no_gradient("bipartite_match", "merge by its dst_idx with segment_merge, which is differentiable")
_op.fold_vmap("bipartite_match")


def floor(
    metric: Tensor,
    r: int,
    *,
    num_protected: int = 0,
    protect: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    order: str = "index",
    return_score: bool = False,
) -> _op.Floor:
    """The metric read once, the three outputs (20 bytes a token) written; the product of all sources and destinations."""
    batch_size, num_tokens, dim = metric.shape
    num_src = (num_tokens + 1) // 2 - (num_protected + 1) // 2
    num_dst = num_tokens // 2 - num_protected // 2
    read = metric.nbytes + (0 if protect is None else protect.nbytes)
    return read + 20 * batch_size * num_tokens, 2 * batch_size * num_src * num_dst * dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    metric: Any = randn(2, 13, 24, dtype=dtype)
    protect = (torch.arange(26, device=device) % 5 == 0).reshape(2, 13)
    return [
        ((metric, 4), {}),
        ((metric, 3), {"num_protected": 1, "order": "grouped", "return_score": True}),
        ((metric, 3), {"protect": protect, "order": "score", "return_score": True}),
        ((metric, 0), {"normalize": False}),
    ]
