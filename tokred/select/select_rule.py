# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""select_rule: which tokens to keep where the scores decide how many."""

import math
from typing import Any

import torch
from torch import Tensor

from tokred import _op, _topk


def select_rule(
    score: Tensor,
    rule: str,
    value: float | Tensor | None = None,
    *,
    max_k: int | None = None,
    min_k: int = 0,
    strict: bool = False,
    temperature: float | None = None,
    rounding: str = "floor",
    weight: Tensor | None = None,
    other: Tensor | None = None,
    other_value: float | Tensor | None = None,
    offset: int = 0,
    seed: int = 0,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """List the tokens of each row that a rule keeps: a count that depends on the scores, in lists of a fixed length.

    A row is a sequence or, with a score per head, one head of it. Of the tokens that are not excluded (*n* of them), and
    with ``value`` = *v*, the rules keep

    - ``"threshold"``: scores >= *v* (``strict``: > *v*). With ``other`` a dual threshold: or ``other >= other_value``.
    - ``"top_p"``: of the tokens in falling order the fewest whose weight exceeds the share *v* of the row's;
      ``"coverage"``: the fewest that reach it. Weights are the scores, those below 0 as 0, or ``softmax(score /
      temperature)``.
    - ``"quantile"``: scores at or above (``strict``: above) the *v*-quantile, linearly interpolated; with ``weight``, of the
      row in which each score stands ``weight`` times.
    - ``"iqr"``: Tukey's outliers, scores above Q3 + *v* (Q3 - Q1); *v* is 1.5 by default.
    - ``"ratio"``: the best *v* *n* tokens, rounded by ``rounding``.
    - ``"stride"``: tokens ``offset``, ``offset`` + *v*, ``offset`` + 2 *v*, ...; the scores matter for ``min_k`` and ``max_k``.
    - ``"multinomial"``: as many as ``"ratio"`` (*v* is 1 by default: give ``max_k``), drawn without replacement with
      probabilities in proportion to the weights of ``"top_p"``; only tokens that weigh anything are drawn.

    Then ``min_k`` adds the best-scored tokens left, or the next ones drawn, and ``max_k`` takes the worst ones away.

    Args:
        score: ``[batch_size, num_tokens]`` or ``[batch_size, num_heads, num_tokens]``; packed, with ``cu_seqlens``,
            ``[total_tokens]`` or ``[num_heads, total_tokens]``. float32, float16 or bfloat16; any strides with a contiguous
            last dimension.
        rule: One of the above.
        value: A float; or, but for ``"stride"``, a float32 tensor with a value per row, ``[batch_size]`` or ``[batch_size,
            num_heads]``, which is not read back: shares are clamped to [0, 1], a NaN threshold keeps nothing.
        max_k: The length of the lists: dense at most ``num_tokens``, which is the default; packed ``max_seqlen``.
        min_k: At least so many are kept, while there are so many.
        strict: ``"threshold"`` and ``"quantile"``: leave out what is equal to the bound.
        temperature: ``"top_p"``, ``"coverage"``, ``"multinomial"``: weights are ``softmax(score / temperature)``; None: the
            scores.
        rounding: ``"ratio"``, ``"multinomial"``: ``"floor"``, ``"round"`` (half to even) or ``"ceil"``, of a float64 product.
        weight: ``"quantile"``: int32 or int64 of the shape of ``score``, contiguous; clamped to [0, 2^31 - 1].
        other: ``"threshold"``: a second score, of the dtype and shape of ``score``.
        other_value: Its threshold, as ``value``.
        offset: ``"stride"``: the first token kept.
        seed: ``"multinomial"``: the draw depends on it, on the number of the row (row of the batch times heads plus head)
            and on positions, and on nothing else.
        keep_mask: Bool, of the shape of ``score``, contiguous in its last dimension; these tokens are kept and count towards
            every count and share. When more than ``max_k`` are forced, the best-scored of them are kept. What ``other`` or
            ``"stride"`` keeps is forced in this sense, too.
        drop_mask: Bool, likewise; these tokens are never kept and no rule sees them.
        keep_first: So many tokens at the start of each row are forced.
        keep_last: So many at the end of each row.
        order: ``"index"``, lists ascend; or ``"score"``, they descend by score, equal scores by ascending index.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: the input is packed.
        max_seqlen: The longest sequence of a packed input (default ``total_tokens``).

    Returns:
        ``(kept_idx, num_kept)``: ``[batch_size, max_k]`` or ``[batch_size, num_heads, max_k]`` int64, positions within the
        sequence, then -1; and ``[batch_size]`` or ``[batch_size, num_heads]`` int32. No rule waits for the device.

    Ties go to the lowest index; NaN ranks below every number, weighs nothing, takes no part in a quantile and reaches no
    threshold; -0.0 equals 0.0. Deterministic, the same lists on every device for equal scores: weights are integers of 40
    bits (beyond 4M tokens fewer) and sums of them exact, the largest weight 2^40 under softmax, 2^39 to 2^40 else, smaller
    ones rounded down but never to 0; a quantile is compared with, not computed. A selection has no gradient. On CUDA rows
    beyond 8,192 tokens take a workspace of 75 KB and 32 bytes per 8,192 tokens each, and sorting lists that no block holds
    by score 16 bytes per slot.

    Who needs which: threshold: SparseVLM's raters (``strict``, the row's mean), LRS-VQA, AdaToken-3D; dual: MustDrop.
    top_p: SliME, nucleus sampling. coverage: Token Sparse Attention, FlexPrefill. quantile: AOT; weighted and ``strict``:
    LLMLingua-2. iqr: PruMerge, TokenCorrCompressor's global branch. ratio: FocusUI, PyramidDrop (floor), FastV, HiPrune
    (round), EViT, MustDrop's key set, EchoingPixels (ceil). stride: ADSC, PruMerge+, VisionZip's targets, Extensible
    Tokenization (``offset = v - 1``, ``keep_last=1``). multinomial: TokenCorrCompressor's local branch.

    Example:
        >>> score = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
        >>> kept_idx, num_kept = tokred.select_rule(score, "coverage", 0.65)
        >>> kept_idx.tolist(), num_kept.tolist()
        ([[1, 2, -1, -1], [0, 1, 2, -1]], [2, 3])
        >>> tokred.select_rule(score, "threshold", 0.2, max_k=2)[0].tolist()
        [[1, 2], [0, 1]]
        >>> tokred.select_rule(score, "stride", 2, offset=1, max_k=2)[0].tolist()
        [[1, 3], [1, 3]]
    """
    value = _value(rule, value)
    stride = 0
    if rule == "stride":
        if isinstance(value, Tensor) or value != int(value):
            raise RuntimeError(f"select_rule: expected an int as value of 'stride', got {value}")
        stride, value = int(value), 0.0
    if (other is None) != (other_value is None):
        given = "other_value" if other is None else "other"
        raise RuntimeError(f"select_rule: expected other and other_value together, got {given} alone")
    if temperature is not None and not temperature > 0:
        raise RuntimeError(f"select_rule: expected temperature > 0, got {temperature}")
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    number, row_value = _split(value)
    other_number, row_other_value = _split(0.0 if other_value is None else other_value)
    return torch.ops.tokred.select_rule.default(
        score,
        rule,
        number,
        row_value,
        other,
        other_number,
        row_other_value,
        weight,
        keep_mask,
        drop_mask,
        cu_seqlens,
        longest if cu_seqlens is not None else 0,
        min_k,
        longest if max_k is None else max_k,
        keep_first,
        keep_last,
        stride,
        offset,
        temperature or 0.0,
        rounding,
        strict,
        seed,
        order,
    )


def _value(rule: str, value: float | Tensor | None) -> float | Tensor:
    if value is None:
        value = {"iqr": 1.5, "multinomial": 1.0}.get(rule)
    if value is None:
        raise RuntimeError(f"select_rule: expected a value for rule {rule!r}, got None")
    return value


def _split(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


# ---- The definition. Weights are int64 in fixed point; what follows from them is exact.

_TAYLOR = [round(2**30 * (-math.log(2)) ** i / math.factorial(i)) for i in range(11)]


def _weights(score: Tensor, eligible: Tensor, temperature: float | None) -> Tensor:
    """Return what each token of a row weighs: softmax in 40 bits by a polynomial, or the score in units of 2^-39."""
    shift = 0
    while (len(score) >> shift) > 1 << 22:
        shift += 1
    best = score.masked_fill(~eligible | score.isnan(), -torch.inf).amax() if len(score) else score.sum()
    if temperature is not None:
        scale = 1.4426950408889634 / temperature * 2**30
        y = ((best.double() - score.double()) * scale).nan_to_num(0.0, 2.0**36).clamp(0, 2.0**36).long()
        fraction, whole = y & (2**30 - 1), y >> 30
        power = torch.full_like(y, _TAYLOR[10])
        for c in _TAYLOR[9::-1]:
            power = c + ((power * fraction) >> 30)
        weight = ((power << 10) >> whole.clamp(max=62)).where(score != best, 2**40) >> shift
        return weight.clamp(min=1).where(score > -torch.inf, 0)
    if not best > 0:
        return torch.zeros_like(score, dtype=torch.int64)
    exact = score.double().nan_to_num(0.0, 2.0**128).clamp(min=0)
    top = max(math.frexp(min(best.item(), 2.0**128))[1], -125)
    weight = torch.ldexp(exact, torch.tensor(40 - top - shift, device=score.device)).floor().long()
    return weight.clamp(min=1).where(score > 0, 0)


def _lottery(weight: Tensor, seed: int, row: int) -> Tensor:
    """Return weight / E for exponential noise E of seed, row and position, float32; NaN where nothing can be drawn."""
    odd = ((_op.noise_bits(seed, row, len(weight), weight.device) >> 32) & (2**32 - 1)) * 2 + 1
    log2 = sum(((odd >> i) > 0).long() for i in range(1, 33)) + torch.zeros_like(odd)
    x = torch.where(log2 <= 30, odd << (30 - log2).clamp(min=0), odd >> (log2 - 30).clamp(min=0))
    for _ in range(28):
        x = x * x
        bit = x >> 61
        x = x >> (30 + bit)
        log2 = 2 * log2 + bit
    noise = ((33 << 28) - log2).clamp(min=1)
    return (weight.float() / noise.float()).masked_fill(weight == 0, torch.nan)


def _count(rule: str, value: float, score: Tensor, eligible: Tensor, forced: Tensor, options: dict[str, Any]) -> int:
    """How many tokens of a row the rule keeps, forced ones among them, before min_k and max_k."""
    competes, number = eligible & ~forced, eligible & ~score.isnan()
    num_forced, exact = int(forced.sum()), score.double()
    share = min(max(value, 0.0), 1.0) if value == value else 0.0
    if rule == "stride":
        return num_forced
    if rule == "threshold":
        reached = exact > value if options["strict"] else exact >= value
        return num_forced + int((reached & competes).sum())
    if rule in ("top_p", "coverage"):
        weight = _weights(score, eligible, options["temperature"])
        wanted = share * float(weight[eligible].sum())
        left = (math.floor(wanted) + 1 if rule == "top_p" else math.ceil(wanted)) - int(weight[forced].sum())
        if left <= 0:
            return num_forced
        order = _topk.rank(score)
        mass = weight[order[competes[order]]].cumsum(0)
        few = int((mass < left).sum()) + 1
        return num_forced + (few if few <= len(mass) else int(competes.sum()))
    if rule == "quantile":
        values, at = exact[number].sort()
        weight = torch.ones_like(at) if options["weight"] is None else options["weight"][number][at].clamp(0, 2**31 - 1)
        ends = weight.long().cumsum(0)
        if not len(ends) or not ends[-1] > 0:
            return num_forced
        place = share * float(ends[-1] - 1)
        rank = torch.tensor(math.floor(place) if options["strict"] else math.ceil(place), device=ends.device)
        bound = values[torch.searchsorted(ends, rank, right=True)]
        return num_forced + int(((exact > bound if options["strict"] else exact >= bound) & competes).sum())
    if rule == "iqr":
        ordered: list[float] = exact[number].sort().values.tolist()
        if not ordered:
            return num_forced

        def four_times(quarter: int) -> float:
            at, rest = divmod(quarter * (len(ordered) - 1), 4)
            return (4 - rest) * ordered[at] + rest * ordered[at + 1] if rest else 4 * ordered[at]

        first, third = four_times(1), four_times(3)
        return num_forced + int(((exact > (value * (third - first) + third) / 4) & competes).sum())
    product = share * float(eligible.sum())
    rounded = {"floor": math.floor(product), "round": round(product), "ceil": math.ceil(product)}
    return max(rounded[options["rounding"]], num_forced)


def reference(
    score: Tensor,
    rule: str,
    value: float | Tensor | None = None,
    *,
    max_k: int | None = None,
    min_k: int = 0,
    strict: bool = False,
    temperature: float | None = None,
    rounding: str = "floor",
    weight: Tensor | None = None,
    other: Tensor | None = None,
    other_value: float | Tensor | None = None,
    offset: int = 0,
    seed: int = 0,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Define select_rule in plain PyTorch; tests and benchmarks measure against this."""
    rows, lead = _topk.rows(score, cu_seqlens, max_seqlen)
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    length = longest if max_k is None else max_k

    def like(x: Tensor | None) -> list[Any]:
        return [None] * len(rows) if x is None else _topk.rows(x, cu_seqlens, max_seqlen)[0]

    def numbers(x: Any) -> list[float]:
        return x.flatten().tolist() if isinstance(x, Tensor) else [x] * len(rows)

    values, other_values = numbers(_value(rule, value)), numbers(other_value)
    kept = []
    for i, (row, keep, drop, second, weights) in enumerate(
        zip(rows, like(keep_mask), like(drop_mask), like(other), like(weight))
    ):
        row = row.float()
        place = torch.arange(row.shape[0], device=row.device)
        eligible = torch.ones_like(place, dtype=torch.bool) if drop is None else ~drop
        forced = (place < keep_first) | (place >= row.shape[0] - keep_last)
        if keep is not None:
            forced = forced | keep
        if second is not None:
            second = second.double()
            forced = forced | (second > other_values[i] if strict else second >= other_values[i])
        if rule == "stride":
            forced = forced | ((place >= offset) & ((place - offset) % int(values[i]) == 0))
        forced = forced & eligible
        options = {"strict": strict, "temperature": temperature, "rounding": rounding, "weight": weights}
        count, ranked = _count(rule, values[i], row, eligible, forced, options), row
        if rule == "multinomial" and int(forced.sum()) <= length:
            ranked = _lottery(_weights(row, eligible, temperature), seed, i)
            count = min(count, int((forced | (eligible & ~ranked.isnan())).sum()))
        picked = _topk.select_reference(ranked, min(max(count, min_k), length), forced, ~eligible)
        picked = picked[picked >= 0]
        kept.append(_topk.pad(picked[_topk.rank(row[picked])] if order == "score" else picked, length))
    kept_idx = _topk.stacked(kept, lead, length, score.device)
    return kept_idx, (kept_idx >= 0).sum(-1, dtype=torch.int32)


@torch.library.register_fake("tokred::select_rule")
def _(
    score: Tensor,
    rule: str,
    value: float = 0.0,
    row_value: Any = None,
    other: Any = None,
    other_value: float = 0.0,
    row_other_value: Any = None,
    weight: Any = None,
    keep_mask: Any = None,
    drop_mask: Any = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    min_k: int = 0,
    max_k: int = 0,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    lead = (cu_seqlens.shape[0] - 1, *score.shape[:-1]) if cu_seqlens is not None else score.shape[:-1]
    return score.new_empty((*lead, max_k), dtype=torch.int64), score.new_empty(lead, dtype=torch.int32)


_op.fold_vmap("select_rule", absent=(10,))


def floor(
    score: Tensor,
    rule: str,
    value: float | Tensor | None = None,
    *,
    max_k: int | None = None,
    min_k: int = 0,
    strict: bool = False,
    temperature: float | None = None,
    rounding: str = "floor",
    weight: Tensor | None = None,
    other: Tensor | None = None,
    other_value: float | Tensor | None = None,
    offset: int = 0,
    seed: int = 0,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    order: str = "index",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> _op.Floor:
    """Scores, masks, weights and values read once, lists and counts written."""
    rows = score.numel() // max(score.shape[-1], 1) * (cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 1)
    longest = score.shape[-1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    given = (score, value, weight, other, other_value, keep_mask, drop_mask, cu_seqlens)
    read = sum(t.nbytes for t in given if isinstance(t, Tensor))
    return read + rows * (8 * (longest if max_k is None else max_k) + 4), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    score, heads = randn(3, 13, dtype=dtype), randn(2, 3, 40, dtype=dtype)
    mask = score > 1
    bounds = torch.tensor([0.0, 0.5, -0.5], device=device)
    repeats = torch.arange(39, device=device).reshape(3, 13) % 4
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 39], dtype=torch.int32, device=device), "max_seqlen": 36}
    return [
        ((score, "threshold", bounds), {"other": -score, "other_value": 1.0, "max_k": 9}),
        ((score, "top_p", 0.8), {"temperature": 1.0, "keep_mask": mask, "drop_mask": score < -1}),
        ((heads, "coverage", 0.6), {"min_k": 2, "max_k": 12, "order": "score"}),
        ((score, "quantile", 0.7), {"weight": repeats, "strict": True}),
        ((heads, "iqr"), {"keep_first": 1, "keep_last": 2}),
        ((score, "ratio", 0.3), {"rounding": "round", "max_k": 5}),
        ((score, "stride", 4), {"offset": 1}),
        ((score.flatten(), "multinomial"), {**packed, "temperature": 0.5, "max_k": 4, "seed": 3}),
    ]
