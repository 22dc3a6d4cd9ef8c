# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_diverse: pick tokens that differ from each other, one after the other."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op

EPS = 1e-12  # the smallest norm that is divided by


def select_diverse(
    x: Tensor,
    k: int,
    *,
    rule: str = "max_min",
    metric: str = "cosine",
    start: str | Tensor | None = None,
    weight: Tensor | None = None,
    lam: float = 0.5,
    positions: Tensor | None = None,
    position_weight: float = 0.5,
    picks_per_step: int = 1,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    order: str = "index",
    return_num_kept: bool = False,
    return_value: bool = False,
) -> Any:
    """Pick ``k`` tokens of each sequence greedily, each for how little it resembles the picks before it.

    With ``s(i, p)`` the similarity of token ``i`` and pick ``p``, and ``d = 1 - s`` (cosine) or ``d = -s`` (L2), the next
    pick is the token with the largest value:

    ======================  ====================================================================================
    ``"max_min"``           ``min over p of d(i, p)``: farthest point, k-centre (DivPrune, ToDRE version 1); with
                            ``weight``, ``weight[i]`` times that (ZOO-Prune)
    ``"max_sum"``           ``-(sum over p of s(i, p))`` (ToDRE); ``weight`` only serves ``start="weight"``
    ``"mmr"``               ``lam * weight[i] - (1 - lam) * max over p of s(i, p)`` (IDPruner); needs ``weight``
    ======================  ====================================================================================

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]`` with ``cu_seqlens``; float32, float16
            or bfloat16, contiguous in ``dim``.
        k: How many to pick. Dense: in ``[0, num_tokens]``. Packed: a sequence with fewer tokens keeps all of them.
        rule: ``"max_min"``, ``"max_sum"`` or ``"mmr"``.
        metric: ``"cosine"``: similarity of directions, ``v / max(|v|, 1e-12)``. ``"l2"``: minus the squared distance.
        start: The first pick. ``"farthest"``: the token whose nearest other token is farthest by its features
            (DivPrune). ``"weight"``: the highest weight. ``"first"``: the lowest index. Or one index for each sequence,
            ``[batch_size]`` int64 or int32, contiguous; one that is outside of its sequence or dropped acts as
            ``"first"``. None: ``"weight"`` where ``weight`` is given, else ``"farthest"``.
        weight: How important each token is, ``[batch_size, num_tokens]`` or ``[total_tokens]``; float32, float16 or
            bfloat16, contiguous in its last dimension.
        lam: Share of the weight in ``"mmr"``, in ``[0, 1]``.
        positions: Coordinates of each token, ``[batch_size, num_tokens, 3]`` or ``[total_tokens, 3]`` float32, contiguous:
            similarity becomes ``(1 - w) * s - w * |distance| / dx`` and ``d = (1 - w) - that`` for cosine, with ``w =
            position_weight`` and ``dx`` the largest distance from the first pick (SeGPruner).
        position_weight: Share of the positions, in ``[0, 1]``.
        picks_per_step: So many tokens are taken by one ranking, before what they have in common counts (IDPruner's
            parallel picks). The first step takes as many with ``start="weight"``, else one.
        drop_mask: Bool, as ``weight``, contiguous; these tokens are never picked and nobody's nearest token.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.
        max_seqlen: The longest sequence of a packed input (the default, ``total_tokens``, is always right and slower on
            CUDA, where it decides how much memory is taken); tokens of a sequence beyond it are not looked at.
        order: Of ``kept_idx``: ``"index"``, increasing, or ``"score"``, as picked.
        return_num_kept: Return ``num_kept`` for a dense input, too.
        return_value: Return ``value``, too.

    Returns:
        ``kept_idx``, or a tuple of it, ``num_kept`` when the input is packed or ``return_num_kept`` is set, and ``value``
        when asked for.

        - ``kept_idx``: ``[batch_size, k]`` int64, positions within the sequence, then -1 in slots that no token fills
          (fewer than ``k`` may be picked). No token is picked twice.
        - ``num_kept``: ``[batch_size]`` int32.
        - ``value``: ``[batch_size, k]`` float32, what each was picked for: the distance to the nearest other token or
          the weight in the first step (infinity where the start is an index), then the rule's value; -inf past
          ``num_kept``.

    The first picks do not depend on ``k``, bit for bit. Ties go to the lowest index. NaN ranks below every number: a token
    with a NaN or an infinity in ``x`` or ``positions`` resembles nothing, is picked last, and leaves the others' values
    as they are. A zero vector has cosine 0 to everything. Inputs are finite with squared norms below 3e38.

    Similarities are computed in float32 (for float32 inputs to float32 accuracy on every device, by three TF32 products
    on CUDA) and differ between devices by rounding, about 1e-6 of ``|a| |b|``; L2 distances of close tokens lose as
    much, since they are made of products. Deterministic: the same bits for any number of threads and whatever else is
    in the batch. Shapes depend on shapes and ``k`` alone; nothing waits for the host. Not differentiable (``x`` and
    ``weight`` may require grad): gather by ``kept_idx``.

    Memory: float32 similarities, ``4 * num_tokens ** 2`` bytes for each sequence up to 4,096 tokens: on CUDA for as many
    sequences at a time as 1 GiB holds, on CPU for one per thread. Longer sequences take O(num_tokens) on CUDA, where one
    block computes a row per pick (slow: cut such sequences first), and 64 MiB of rows per thread on CPU.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2], [0.1, 1.0]]])
        >>> tokred.select_diverse(x, 3, order="score").tolist()
        [[3, 0, 4]]
    """
    start_idx = start if isinstance(start, Tensor) else None
    name = start if isinstance(start, str) else "farthest" if weight is None else "weight"
    rules = (weight, positions, drop_mask, start_idx, rule, metric, name, lam, position_weight, picks_per_step, order)
    if cu_seqlens is None:
        kept_idx, num_kept, value = torch.ops.tokred.select_diverse.default(x, k, *rules)
    else:
        max_seqlen = x.shape[0] if max_seqlen is None else max_seqlen
        kept_idx, num_kept, value = torch.ops.tokred.select_diverse.packed(x, k, cu_seqlens, max_seqlen, *rules)
    if not (cu_seqlens is not None or return_num_kept or return_value):
        return kept_idx
    counts = (num_kept,) if cu_seqlens is not None or return_num_kept else ()
    return (kept_idx, *counts, *((value,) if return_value else ()))


def _best(value: Tensor, free: Tensor) -> int:
    """Return the lowest index of the largest value among free tokens; of NaN values only where there is no other."""
    number = free & ~value.isnan()
    if number.any():
        free = number & (value == value[number].max())
    return int(free.nonzero()[0])


def _reference_row(x: Tensor, k: int, weight: Any, positions: Any, drop: Any, start: Any, o: dict[str, Any]) -> Any:
    """Define the picks of one sequence, ``[num_tokens, dim]``: indices as picked, and their values."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    v, w = x.to(wide), None if weight is None else weight.to(wide)
    num_tokens, cosine = x.shape[0], o["metric"] == "cosine"
    squares = v.square().sum(-1)
    bad = ~squares.isfinite()
    share = 1.0
    if positions is not None:
        bad |= ~positions.isfinite().all(-1)
        positions, share = positions.to(wide), 1.0 - o["position_weight"]
    unit = v / squares.sqrt().clamp_min(EPS)[:, None] if cosine else v
    products = (unit @ unit.T).triu()
    products = products + products.triu(1).T  # two tokens have one similarity, however a product rounds
    similar = products if cosine else (2 * products - (squares[:, None] + squares)).clamp_max(0)
    similar = similar.masked_fill(bad | bad[:, None], torch.nan)
    free = ~drop if drop is not None else torch.ones_like(bad)

    if isinstance(start, str) and start == "farthest":
        counts = (free & ~bad) & ~torch.eye(num_tokens, dtype=torch.bool, device=x.device)
        nearest = similar.masked_fill(~counts, -torch.inf).amax(1) if num_tokens else squares
        value = (1.0 if cosine else 0.0) - nearest
        value = value.masked_fill(bad, torch.nan)
    elif isinstance(start, str) and start == "weight":
        value = w.masked_fill(bad, torch.nan)  # type: ignore[union-attr]
    else:
        value = torch.full_like(squares, torch.inf).masked_fill(bad, torch.nan)
    given = int(start) if isinstance(start, Tensor) else -1
    if not (0 <= given < num_tokens and free[given]):
        given = -1

    rule, lam, base = o["rule"], o["lam"], share if cosine else 0.0
    state = torch.full_like(squares, 0.0 if rule == "max_sum" else -torch.inf).masked_fill(bad, torch.nan)
    folded, per_distance = state.clone(), 0.0
    left = o["picks_per_step"] if isinstance(start, str) and start == "weight" else 1
    picks: list[int] = []
    values: list[float] = []
    while len(picks) < k and free.any():
        pick = given if given >= 0 else _best(value, free)
        given = -1
        picks.append(pick)
        values.append(float(value[pick]))
        s = similar[pick]
        if positions is not None:
            distance = (positions - positions[pick]).square().sum(-1).sqrt()
            if len(picks) == 1:
                largest = distance[free & ~bad].nan_to_num(0.0).max() if (free & ~bad).any() else distance.new_zeros(())
                per_distance = o["position_weight"] / float(largest) if largest > 0 else 0.0
            s = share * s - per_distance * distance
        free[pick] = False
        new = folded + s if rule == "max_sum" else torch.maximum(folded, s)
        folded = torch.where(s.isnan(), folded, new)
        left -= 1
        if left == 0:
            left, state = o["picks_per_step"], folded.clone()
            if rule == "max_sum":
                value = -state
            elif rule == "mmr":
                value = lam * w - (1 - lam) * state
            else:
                value = base - state if w is None else w * (base - state)
    return picks, values


def reference(
    x: Tensor,
    k: int,
    *,
    rule: str = "max_min",
    metric: str = "cosine",
    start: str | Tensor | None = None,
    weight: Tensor | None = None,
    lam: float = 0.5,
    positions: Tensor | None = None,
    position_weight: float = 0.5,
    picks_per_step: int = 1,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    order: str = "index",
    return_num_kept: bool = False,
    return_value: bool = False,
) -> Any:
    """Define select_diverse in plain PyTorch (in float64 for float64 input); tests and benchmarks measure against this."""
    start = ("farthest" if weight is None else "weight") if start is None else start
    options = {"rule": rule, "metric": metric, "lam": lam, "position_weight": position_weight}
    options["picks_per_step"] = picks_per_step
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    batch_size = x.shape[0] if ends is None else len(ends) - 1
    kept_idx = torch.full((batch_size, k), -1, dtype=torch.int64)
    value = torch.full((batch_size, k), -torch.inf, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    num_kept = torch.zeros(batch_size, dtype=torch.int32)
    for b in range(batch_size):
        part = b if ends is None else slice(ends[b], ends[b + 1])
        w, xyz, drop = (None if t is None else t[part] for t in (weight, positions, drop_mask))
        first = start if isinstance(start, str) else start[b]
        picks, values = _reference_row(x[part], k, w, xyz, drop, first, options)
        at = sorted(range(len(picks)), key=lambda i: picks[i]) if order == "index" else range(len(picks))
        kept_idx[b, : len(picks)] = torch.tensor([picks[i] for i in at], dtype=torch.int64)
        value[b, : len(picks)] = torch.tensor([values[i] for i in at], dtype=value.dtype)
        num_kept[b] = len(picks)
    outputs = [
        kept_idx,
        *([num_kept] if ends is not None or return_num_kept else []),
        *([value] if return_value else []),
    ]
    moved = tuple(t.to(x.device) for t in outputs)
    return moved if len(moved) > 1 else moved[0]


def _empty(x: Tensor, batch_size: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((batch_size, k), dtype=torch.int64),
        x.new_empty((batch_size,), dtype=torch.int32),
        x.new_empty((batch_size, k), dtype=torch.float32),
    )


@torch.library.register_fake("tokred::select_diverse")
def _(x: Tensor, k: int, *rules: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, x.shape[0], k)


@torch.library.register_fake("tokred::select_diverse.packed")
def _(x: Tensor, k: int, cu_seqlens: Tensor, max_seqlen: int, *rules: Any, **options: Any) -> tuple[Tensor, ...]:
    return _empty(x, cu_seqlens.shape[0] - 1, k)


_op.no_gradient("select_diverse", "gather by its kept_idx with gather_tokens, which is differentiable")
_op.no_gradient("select_diverse.packed", "gather by its kept_idx with gather_tokens, which is differentiable")
_op.fold_vmap("select_diverse")


def floor(
    x: Tensor,
    k: int,
    *,
    rule: str = "max_min",
    metric: str = "cosine",
    start: str | Tensor | None = None,
    weight: Tensor | None = None,
    lam: float = 0.5,
    positions: Tensor | None = None,
    position_weight: float = 0.5,
    picks_per_step: int = 1,
    drop_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    order: str = "index",
    return_num_kept: bool = False,
    return_value: bool = False,
) -> _op.Floor:
    """Inputs read once; the product of each pair of tokens, or of each token with the picks where that is less.

    Packed: as if all sequences were equally long.
    """
    batch_size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, dim = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    num_tokens = tokens // max(batch_size, 1)
    farthest = start == "farthest" if isinstance(start, str) else start is None and weight is None
    partners = num_tokens if farthest else min(2 * k, num_tokens)  # two flops a product, one of which symmetry saves
    read = sum(t.nbytes for t in (x, weight, positions, drop_mask, cu_seqlens) if t is not None)
    return read + batch_size * (12 * k + 4), tokens * partners * dim


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, weight, positions = randn(2, 13, 24, dtype=dtype), randn(2, 13, dtype=dtype).abs(), randn(2, 13, 3)
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 26], dtype=torch.int32, device=device), "max_seqlen": 23}
    given = {"start": torch.tensor([4, 2], device=device), "drop_mask": weight > 1.5, "return_num_kept": True}
    return [
        ((x, 5), {}),
        ((x, 6), {"rule": "mmr", "weight": weight, "picks_per_step": 2, "order": "score", "return_value": True}),
        ((x, 13), {"metric": "l2", "positions": positions, "rule": "max_sum", **given}),
        ((x, 0), {"weight": weight}),
        ((x.flatten(0, 1), 7), {"order": "score", "return_value": True, **packed}),
    ]
