# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.select.select_rule")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    meta = {"device": "meta"}  # floors look at shapes and dtypes alone
    score, mask = torch.empty(8, 576, **meta), torch.empty(8, 576, dtype=torch.bool, **meta)
    assert floor(score, "top_p", 0.9) == (8 * 576 * (4 + 8) + 8 * 4, 0)  # scores, lists, counts
    assert floor(score, "iqr", max_k=100, drop_mask=mask) == (8 * 576 * 5 + 8 * 100 * 8 + 8 * 4, 0)
    bounds = torch.empty(8, **meta)
    both = floor(score, "threshold", bounds, other=score, other_value=0.5, max_k=9)
    assert both == (2 * 8 * 576 * 4 + 8 * 4 + 8 * 9 * 8 + 8 * 4, 0)
    repeats = torch.empty(2, 3, 50, dtype=torch.int64, **meta)
    heads = torch.empty(2, 3, 50, dtype=torch.bfloat16, **meta)
    assert floor(heads, "quantile", 0.5, weight=repeats, max_k=7) == (300 * (2 + 8) + 6 * (7 * 8 + 4), 0)
    # Packed, 3 rows of 10 tokens together: bounds 4 * 4; lists of max_seqlen 4.
    cu_seqlens = torch.empty(4, dtype=torch.int32, **meta)
    packed = floor(torch.empty(10, **meta), "ratio", 0.5, cu_seqlens=cu_seqlens, max_seqlen=4)
    assert packed == (40 + 16 + 3 * 4 * 8 + 3 * 4, 0)


def check(score, rule, value=None, **options):
    """Everything exact."""
    actual = tokred.select_rule(score, rule, value, **options)
    assert_close(actual, reference(score, rule, value, **options), name=f"select_rule {rule}")
    return actual


def planted(*shape, device):
    """Scores with many ties, some infinite, some NaN, zeros of both signs."""
    score = torch.randn(*shape).mul(3).round() / 3
    score[torch.rand(*shape) < 0.02] = float("nan")
    score[torch.rand(*shape) < 0.01] = float("inf")
    score[torch.rand(*shape) < 0.02] = -float("inf")
    score[score == 0] *= torch.where(torch.rand(int((score == 0).sum())) < 0.5, -1.0, 1.0)
    return score.to(device)


# One call of each rule and of each of its options.
RULES = [
    ("threshold", 0.7, {}),
    ("threshold", 1 / 3, {"strict": True}),
    ("top_p", 0.8, {"temperature": 0.7}),
    ("top_p", 0.9, {}),
    ("coverage", 0.6, {}),
    ("coverage", 0.99, {"temperature": 2.0}),
    ("quantile", 0.75, {}),
    ("quantile", 0.9, {"strict": True}),
    ("iqr", None, {}),
    ("iqr", 0.25, {}),
    ("ratio", 0.3, {}),
    ("ratio", 0.5, {"rounding": "round"}),
    ("ratio", 0.01, {"rounding": "ceil"}),
    ("stride", 7, {"offset": 3}),
    ("multinomial", 0.2, {"seed": 5}),
    ("multinomial", 0.3, {"seed": -1, "temperature": 1.0, "rounding": "ceil"}),
]


def every_rule(score, **options):
    for rule, value, own in RULES:
        check(score, rule, value, **own, **options)


# One less, equal, one more than a warp and a block; a block's row (8192), two chunks and more.
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 255, 256, 257, 1025, 8192, 8193, 20_000])
def test_every_rule(device, num_tokens, simt):
    score = planted(1 if num_tokens > 1000 else 3, num_tokens, device=device)
    for rule, value, own in RULES[:: 5 if simt and num_tokens > 8000 else 1]:
        check(score, rule, value, **own)
        if not simt or num_tokens < 1000:
            check(score, rule, value, order="score", **own)
            check(score, rule, value, min_k=num_tokens // 3, max_k=num_tokens // 2, **own)


@pytest.mark.parametrize("num_tokens", [577, 9001])
@pytest.mark.parametrize("kind", ["constant", "few", "bf16 softmax", "nan", "inf", "negative", "wide", "denormal"])
def test_hard_scores(device, num_tokens, kind, simt):
    score = torch.randn(2, num_tokens)
    if kind == "constant":
        score[:] = 1.5
    elif kind == "few":
        score = score.round()
        score[score == 0] *= -1  # both zeros are there, and equal
        score[:, ::3] = 0.0
    elif kind == "bf16 softmax":
        score = (3 * score).softmax(-1).bfloat16()
    elif kind == "nan":
        score[:, ::2] = float("nan")
        score[0] = float("nan")
    elif kind == "inf":
        score[:, ::5] = float("inf")
        score[:, 1::5] = -float("inf")
        score[:, 2::7] = float("nan")
        score[1] = score[1].clamp(max=-1e38)
    elif kind == "negative":
        score = -score.abs() - 1
    elif kind == "wide":  # weights from the largest to below the smallest that is counted
        score = torch.sign(score) * torch.exp(20 * score)
    elif kind == "denormal":
        score = score * 1e-40
        score[1, 0] = 1e-37
    few = {"nan": RULES[7:8], "wide": RULES[3:4]}.get(kind, RULES[2:3])  # the emulator is slow on long rows
    for rule, value, own in few if simt and num_tokens > 9000 else RULES:
        check(score[: 1 if num_tokens > 9000 else 2].to(device), rule, value, **own)


@pytest.mark.parametrize("num_tokens", [1, 9, 290, 9001])
def test_forced_and_excluded(device, num_tokens, simt):
    rows = 1 if simt and num_tokens > 9000 else 4
    score = planted(rows, num_tokens, device=device)
    keep = torch.rand(rows, num_tokens).lt(0.2).to(device)
    drop = torch.rand(rows, num_tokens).lt(0.4).to(device)
    if rows > 1:
        keep[1], drop[2], keep[3], drop[3] = True, True, True, True
    everything = {"keep_mask": keep, "drop_mask": drop, "keep_first": 2, "keep_last": num_tokens // 8}
    for rule, value, own in (
        (RULES[2], RULES[6]) if simt and num_tokens > 9000 else RULES[:: 1 if num_tokens < 9000 else 3]
    ):
        check(score, rule, value, **own, **everything)
        if not simt or num_tokens < 300:
            check(score, rule, value, **own, drop_mask=drop, max_k=num_tokens // 2)
            check(score, rule, value, **own, keep_mask=keep, min_k=num_tokens // 2, order="score")
            check(score, rule, value, **own, **everything, max_k=num_tokens // 9)  # more are forced


@pytest.mark.parametrize("num_tokens", [50, 9001])
def test_values_per_row(device, num_tokens, simt):
    score = planted(2, 3, num_tokens, device=device)
    values = torch.tensor([[0.0, 0.3, 1.0], [float("nan"), -4.0, 7.0]], device=device)
    for rule in ("threshold", "iqr", "top_p", "coverage", "quantile", "ratio", "multinomial"):
        if simt and num_tokens > 9000 and rule != "top_p":
            continue
        check(score, rule, values)
        if num_tokens > 9000:
            continue
        check(score, rule, values, max_k=num_tokens // 3, min_k=2)
    other = score.flip(-1)
    check(score[..., :200], "threshold", values, other=other[..., :200], other_value=values.flip(0).contiguous())


def test_dual_threshold(device):
    """MustDrop's rule: dropped if both scores are below their bounds."""
    total, peak = torch.rand(2, 100, device=device), torch.rand(2, 100, device=device)
    peak[0, 3] = float("nan")
    kept_idx, num_kept = check(total, "threshold", 0.7, other=peak, other_value=0.9)
    for b in range(2):
        expected = ~((total[b] < 0.7) & ~(peak[b] >= 0.9))
        assert kept_idx[b, : num_kept[b]].tolist() == expected.nonzero()[:, 0].tolist()
    for strict in (False, True):
        check(total.bfloat16(), "threshold", 0.5, other=peak.bfloat16(), other_value=0.75, strict=strict, max_k=30)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [40, 9001])
def test_weighted_quantile(device, num_tokens, index_dtype, simt):
    """LLMLingua-2's percentile is that of the row in which each score stands as often as its weight says."""
    score = planted(2, num_tokens, device=device)
    weight = torch.randint(-1, 5, (2, num_tokens), device=device).to(index_dtype)
    weight[1] = -3
    for strict in (False, True):
        for q in (0.33,) if simt and num_tokens > 9000 else (0.0, 0.33, 0.5, 1.0):
            kept_idx, num_kept = check(score, "quantile", q, weight=weight, strict=strict)
            row, times = score[0].double(), weight[0].clamp(min=0)
            number = ~row.isnan()
            repeated = row[number].repeat_interleave(times[number]).sort().values
            place = q * (len(repeated) - 1)
            low, high = repeated[math.floor(place)], repeated[math.ceil(place)]
            bound = low + (place - math.floor(place)) * (high - low) if high > low else low
            expected = (row > bound) if strict else (row >= bound)
            assert kept_idx[0, : num_kept[0]].tolist() == expected.nonzero()[:, 0].tolist()
            assert num_kept[1] == 0
    many = weight.abs()[:, :300] * 400_000_000  # clamped, and a sum beyond 2^32
    check(score[:, :300], "quantile", 0.5, weight=many.contiguous())
    assert tokred.select_rule(score[:, :4].nan_to_num(0), "quantile", 0.5)[1].tolist()[0] >= 2


def test_quantile_is_numpys(device):
    score = torch.rand(5, 83, device=device)
    for q in (0.0, 0.1, 0.5, 0.77, 1.0):
        bound = torch.quantile(score.double(), q, dim=1, keepdim=True)
        kept, strictly = (tokred.select_rule(score, "quantile", q, strict=s)[1] for s in (False, True))
        assert kept.tolist() == (score >= bound).sum(1).tolist()
        assert strictly.tolist() == (score > bound).sum(1).tolist()


def test_iqr_is_tukeys(device):
    score = torch.randn(6, 577, device=device).exp()
    first, third = torch.quantile(score.double(), torch.tensor([0.25, 0.75], device=device).double(), dim=1)
    outlier = score > (third + 1.5 * (third - first))[:, None]
    kept_idx, num_kept = tokred.select_rule(score, "iqr")
    assert num_kept.tolist() == outlier.sum(1).tolist() and num_kept.min() > 0
    for b in range(6):
        assert kept_idx[b, : num_kept[b]].tolist() == outlier[b].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_top_p_is_that_of_softmax(device, temperature):
    """Against sums in float64 that are not close to the share: the smallest prefix beyond it."""
    score = torch.randn(4, 400, device=device)
    p = (score.double() / temperature).softmax(-1).sort(descending=True).values.cumsum(-1)
    for share in (0.1, 0.5, 0.9, 0.999):
        assert (p - share).abs().min() > 1e-8
        expected = ((p <= share).sum(-1) + 1).tolist()
        assert tokred.select_rule(score, "top_p", share, temperature=temperature)[1].tolist() == expected
        assert tokred.select_rule(score, "coverage", share, temperature=temperature)[1].tolist() == expected


def test_shares_at_their_ends(device):
    score = torch.tensor([[0.5, 0.25, 0.0, 0.25, -1.0, float("nan")]], device=device)
    assert tokred.select_rule(score, "coverage", 0.5)[1].tolist() == [1]  # reaches it exactly
    assert tokred.select_rule(score, "top_p", 0.5)[1].tolist() == [2]  # must exceed it
    assert tokred.select_rule(score, "coverage", 1.0)[1].tolist() == [3]  # what weighs anything
    assert tokred.select_rule(score, "top_p", 1.0)[1].tolist() == [6]  # nothing exceeds it
    assert tokred.select_rule(score, "coverage", 0.0)[1].tolist() == [0]
    assert tokred.select_rule(score, "top_p", 0.0)[1].tolist() == [1]
    assert tokred.select_rule(score, "quantile", 0.0)[1].tolist() == [5]  # NaN is no number
    assert tokred.select_rule(score, "threshold", -float("inf"))[1].tolist() == [5]
    assert tokred.select_rule(score, "threshold", float("inf"))[1].tolist() == [0]
    assert tokred.select_rule(score, "threshold", 1e300)[1].tolist() == [0]
    assert tokred.select_rule(score, "threshold", 0.0)[1].tolist() == [4]
    assert tokred.select_rule(-score, "threshold", -0.0, strict=True)[1].tolist() == [1]
    # A bound between two floats: 0.1 in float32 is above 0.1.
    tenth = torch.tensor([[0.1]], device=device)
    assert tokred.select_rule(tenth, "threshold", 0.1, strict=True)[1].tolist() == [1]
    assert tokred.select_rule(tenth.nextafter(torch.zeros_like(tenth)), "threshold", 0.1)[1].tolist() == [0]


def test_rounding(device):
    score = torch.rand(1, 10, device=device)
    for share, counts in ((0.25, (2, 2, 3)), (0.35, (3, 4, 4)), (1.0, (10, 10, 10)), (0.0, (0, 0, 0))):
        for rounding, count in zip(("floor", "round", "ceil"), counts):
            kept_idx, num_kept = check(score, "ratio", share, rounding=rounding)
            assert num_kept.tolist() == [count]
            best = score.topk(count).indices.sort().values
            assert kept_idx[0, :count].tolist() == best[0].tolist()
    drop = torch.arange(10, device=device)[None] < 4
    assert tokred.select_rule(score, "ratio", 0.5, drop_mask=drop)[1].tolist() == [3]  # of those that may be kept


def test_stride(device):
    score = torch.randn(2, 23, device=device)
    assert tokred.select_rule(score, "stride", 8, offset=4)[0][0, :4].tolist() == [4, 12, 20, -1]
    last = tokred.select_rule(score, "stride", 5, offset=4, keep_last=1)[
        0
    ]  # the last of each five, and of what is left
    assert last[1, :6].tolist() == [4, 9, 14, 19, 22, -1]
    first = tokred.select_rule(torch.zeros_like(score), "stride", 3, max_k=4)[0]
    assert first[0].tolist() == [0, 3, 6, 9]
    assert tokred.select_rule(score, "stride", 1)[1].tolist() == [23, 23]
    assert tokred.select_rule(score, "stride", 3, offset=23)[1].tolist() == [0, 0]


def test_multinomial_draws_without_replacement(device, simt):
    """How often each token is among two of four, against the probabilities of such a draw."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    trials = 250 if simt else 4000
    score = p.to(device).expand(trials, 4)
    kept_idx, num_kept = tokred.select_rule(score, "multinomial", max_k=2, seed=11)
    assert num_kept.unique().tolist() == [2]
    often = torch.bincount(kept_idx.flatten().cpu(), minlength=4) / trials
    for i in range(3):
        second = sum(float(p[j] * p[i] / (1 - p[j])) for j in range(3) if j != i)
        assert abs(float(often[i]) - float(p[i]) - second) < (0.16 if simt else 0.04)  # five standard deviations
    assert often[3] == 0
    again = tokred.select_rule(score, "multinomial", max_k=2, seed=12)[0]
    assert 0.1 < (again != kept_idx).any(-1).float().mean() < 0.9
    assert_close(tokred.select_rule(score, "multinomial", max_k=2, seed=11)[0], kept_idx)
    assert tokred.select_rule(score[:1], "multinomial")[1].tolist() == [3]  # no more can be drawn
    assert tokred.select_rule(score[:1], "multinomial", min_k=4)[1].tolist() == [4]
    logits = score.log()
    drawn = tokred.select_rule(logits, "multinomial", max_k=1, seed=3, temperature=1.0)[0]
    often = torch.bincount(drawn.flatten().cpu(), minlength=4) / trials
    assert (often - p).abs().max() < (0.16 if simt else 0.04)


def test_lottery_is_monotone_in_the_weight(device):
    """The same noise, one token's weight raised: that token can only come in."""
    score = torch.rand(1, 64, device=device) + 0.1
    before = set(tokred.select_rule(score, "multinomial", max_k=16)[0][0].tolist())
    score[0, 9] *= 1000
    after = set(tokred.select_rule(score, "multinomial", max_k=16)[0][0].tolist())
    assert 9 in after and len(after - before - {9}) == 0


@pytest.mark.parametrize("lens", [[5, 0, 700, 33, 1], [10, 8192, 0, 9500, 3]])
def test_ragged_equals_dense(device, lens, simt):
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    score = planted(sum(lens), device=device)
    keep, drop = score > 1.2, score < -1
    windows = {"keep_first": 1, "keep_last": 2}
    options = {"cu_seqlens": cu_seqlens, "keep_mask": keep, "drop_mask": drop, **windows}
    small = not simt or sum(lens) < 1000
    for rule, value, own in RULES[:: 2 if simt else 1] if small else RULES[2:3]:
        kept_idx, num_kept = check(score, rule, value, max_k=max(lens), max_seqlen=max(lens), **own, **options)
        for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
            if rule == "multinomial" and b > 0:  # the noise knows the number of the row
                continue
            part = slice(start, start + length)
            alone = tokred.select_rule(
                score[None, part], rule, value, keep_mask=keep[None, part], drop_mask=drop[None, part], **own, **windows
            )
            assert_close(kept_idx[b, :length], alone[0][0])
            assert num_kept[b] == alone[1][0]
        check(score, rule, value, max_k=8, cu_seqlens=cu_seqlens, max_seqlen=20, **own)  # longer ones are cut
    if small:
        check(score, "top_p", 0.9, cu_seqlens=cu_seqlens)
        check(score, "ratio", 0.9, cu_seqlens=cu_seqlens, max_k=2 * max(lens))  # more than any sequence has
        heads = torch.stack([score, score.flip(0)])
        both = torch.stack([drop, keep])
        values = torch.rand(len(lens), 2, device=device)
        every_rule(heads, cu_seqlens=cu_seqlens, max_seqlen=max(lens), drop_mask=both)
        check(heads, "coverage", values, cu_seqlens=cu_seqlens)
        check(heads, "quantile", values, cu_seqlens=cu_seqlens, weight=torch.arange(heads.numel()).view_as(heads) % 3)


@pytest.mark.parametrize("max_k", [4096, 4097, 9000])
def test_long_lists(device, max_k, simt):
    """Lists beyond what a block holds: sorted in runs that are merged."""
    score = planted(1, 20_001, device=device)
    check(score, "threshold", -0.5, max_k=max_k, order="score")
    if not simt:
        check(score[:, :8000], "threshold", -9.0, order="score")
        check(score, "top_p", 0.99, temperature=1.0, max_k=max_k, order="score")
        check(score, "iqr", 0.1, max_k=max_k)


def test_very_long_rows(device, simt):
    if simt:
        check(planted(1, 30_000, device=device), "coverage", 0.7, max_k=20_000)
        return
    score = torch.randn(2, 140_000, device=device).bfloat16()
    for rule, value, own in RULES[2::4]:
        check(score, rule, value, **own)
    check(score[:1].float().expand(1, -1).repeat(1, 31), "top_p", 0.5, temperature=1.0, max_k=3)  # beyond 4M tokens


def test_views(device):
    base = torch.randn(4, 3, 120, device=device)
    mask = base > 0.5
    every_rule(base[:, 1:, 7:90])
    every_rule(base.transpose(0, 1), keep_mask=mask.transpose(0, 1))
    check(base[:, :1].expand(4, 3, 120), "top_p", 0.5, drop_mask=mask[:, 0][:, None].expand(4, 3, 120))
    check(base[:, 0, :50], "threshold", 0.3, other=base[:, 1, 20:70], other_value=1.0, keep_mask=mask[:, 2, 70:])
    for dtype in (torch.float16, torch.bfloat16):
        every_rule(base.to(dtype)[..., 1:])


def test_offsets_beyond_2_31(device):
    score = torch.empty(2**31 + 99, dtype=torch.bfloat16, device=device).as_strided((2, 33), (2**31 + 7, 1))
    score.copy_(torch.randn(2, 33))
    every_rule(score)
    heads = torch.empty(2**31 + 99, dtype=torch.bfloat16, device=device).as_strided((1, 2, 33), (5, 2**31 + 7, 1))
    heads.copy_(torch.randn(1, 2, 33))
    mask = torch.empty(2**31 + 99, dtype=torch.bool, device=device).as_strided((1, 2, 33), (5, 2**31 + 7, 1))
    mask.copy_(torch.rand(1, 2, 33) < 0.3)
    check(heads, "top_p", 0.8, temperature=1.0, keep_mask=mask)
    check(heads.float(), "threshold", 0.8, drop_mask=mask)
    check(torch.zeros_like(heads), "threshold", 0.8, other=heads, other_value=0.5)


def test_bad_offsets_read_nothing_out_of_bounds(device):
    score = torch.randn(30, device=device)
    cu_seqlens = torch.tensor([0, -5, 2**30, 10, 30], dtype=torch.int32, device=device)
    for rule, value, own in RULES:
        kept_idx, num_kept = tokred.select_rule(score, rule, value, cu_seqlens=cu_seqlens, max_k=4, **own)
        assert (kept_idx < 30).all() and (num_kept <= 4).all() and (kept_idx >= -1).all()


@given(st.data())
def test_any_row(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 0.1, float("inf"), -float("inf"), float("nan")])
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    n = len(row)
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    keep, drop = (torch.tensor([data.draw(flags)], device=device) for _ in range(2))
    max_k = data.draw(st.integers(0, n))
    min_k = data.draw(st.integers(0, max_k))
    rule, value, own = data.draw(st.sampled_from(RULES))
    options = {"keep_mask": keep, "drop_mask": drop, "min_k": min_k, "max_k": max_k, **own}
    score = torch.tensor([row], device=device)
    kept_idx, num_kept = check(score, rule, value, **options)
    count, eligible = int(num_kept[0]), int((~drop).sum())
    kept = kept_idx[0, :count]
    assert (kept.diff() > 0).all() and (kept_idx[0, count:] == -1).all()
    assert not drop[0, kept].any() and min(min_k, eligible) <= count <= max_k
    forced = keep & ~drop
    if int(forced.sum()) <= max_k:
        assert torch.isin(forced[0].nonzero()[:, 0], kept).all()
    ordered = check(score, rule, value, order="score", **options)[0][0, :count]
    assert ordered.sort().values.tolist() == kept.tolist()
    check(score, rule, value, **own)


def test_row_is_independent_of_its_batch(device, threads, simt):
    score = torch.randn(4, 5, 600, device=device).bfloat16()
    for rule, value, own in RULES[2::5] if simt else RULES:

        def call(part, rule=rule, value=value, own=own):
            return tokred.select_rule(part, rule, value, **own)[0]

        # The noise of the last rule depends on the number of the row: those before it stay.
        alone = [call(score[: b + 1])[b:] if rule == "multinomial" else call(score[b : b + 1]) for b in range(4)]
        for result in threads(lambda call=call: call(score)):
            assert_close(result, torch.cat(alone))


def test_empty(device):
    score = torch.randn(2, 3, 5, device=device)
    for part in (score[:0], score[:, :0], score[..., :0]):
        every_rule(part)
    check(score, "threshold", 0.0, max_k=0)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert tokred.select_rule(score[0, 0], "iqr", cu_seqlens=none)[0].shape == (0, 5)
    check(score[0, 0, :0], "top_p", 0.5, cu_seqlens=torch.zeros(3, dtype=torch.int32, device=device), max_k=2)


def test_score_that_requires_grad(device):
    score = torch.randn(2, 6, device=device, requires_grad=True)
    kept_idx, _ = tokred.select_rule(score, "ratio", 0.5, max_k=3)
    assert not kept_idx.requires_grad
    score.gather(1, kept_idx).sum().backward()
    assert score.grad.sum() == 6


def test_vmap(device):
    score, values = torch.randn(2, 11, 3, device=device), torch.rand(3, 2, device=device)
    mapped = torch.vmap(lambda s: tokred.select_rule(s, "iqr", max_k=4), in_dims=2)(score)
    valued = torch.vmap(lambda s, v: tokred.select_rule(s, "coverage", v), in_dims=(2, 0))(score, values)
    for i in range(3):
        row = score[..., i].contiguous()
        assert_close([x[i] for x in mapped], list(tokred.select_rule(row, "iqr", max_k=4)))
        assert_close([x[i] for x in valued], list(tokred.select_rule(row, "coverage", values[i])))
    cu_seqlens = torch.tensor([0, 11], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="select_rule: a packed input has no batch dimension"):
        torch.vmap(lambda s: tokred.select_rule(s, "iqr", cu_seqlens=cu_seqlens))(score[..., 0].contiguous())


ERRORS = {
    "expected rule one of 'threshold', 'top_p', 'coverage', 'quantile', 'iqr', 'ratio', 'stride', 'multinomial', got 'best'": (
        lambda s: tokred.select_rule(s, "best", 1)
    ),
    "expected a value for rule 'ratio', got None": lambda s: tokred.select_rule(s, "ratio"),
    "expected a value that is a number, got nan": lambda s: tokred.select_rule(s, "threshold", float("nan")),
    "expected value in [0, 1] for 'top_p', got 1.5": lambda s: tokred.select_rule(s, "top_p", 1.5),
    "expected value in [0, 1] for 'ratio', got -0.5": lambda s: tokred.select_rule(s, "ratio", -0.5),
    "expected value of dtype float32, got float64": lambda s: tokred.select_rule(s, "iqr", s[:, 0].double()),
    "expected value of shape [batch_size] = [2], got [3]": lambda s: tokred.select_rule(s, "iqr", s[0, :3]),
    "expected value of shape [batch_size, num_heads] = [2, 1], got [2]": (
        lambda s: tokred.select_rule(s[:, None], "iqr", s[:, 0].contiguous())
    ),
    "expected value contiguous, got strides [6]": lambda s: tokred.select_rule(s, "iqr", s[:, 0]),
    "expected max_k in [0, 6], got 7": lambda s: tokred.select_rule(s, "iqr", max_k=7),
    "expected min_k in [0, max_k = 3], got 4": lambda s: tokred.select_rule(s, "iqr", max_k=3, min_k=4),
    "expected min_k in [0, max_k = 6], got -1": lambda s: tokred.select_rule(s, "iqr", min_k=-1),
    "expected rounding 'floor', 'round' or 'ceil', got 'up'": lambda s: tokred.select_rule(
        s, "ratio", 0.5, rounding="up"
    ),
    "expected temperature > 0, got 0.0": lambda s: tokred.select_rule(s, "top_p", 0.5, temperature=0.0),
    "expected temperature > 0, got inf": lambda s: tokred.select_rule(s, "top_p", 0.5, temperature=float("inf")),
    "expected an int as value of 'stride', got 1.5": lambda s: tokred.select_rule(s, "stride", 1.5),
    "expected a stride >= 1 as value, got 0": lambda s: tokred.select_rule(s, "stride", 0),
    "expected offset >= 0, got -1": lambda s: tokred.select_rule(s, "stride", 2, offset=-1),
    "expected other and other_value together, got other alone": lambda s: tokred.select_rule(
        s, "threshold", 0, other=s
    ),
    "expected other with rule 'threshold', got rule 'iqr'": (
        lambda s: tokred.select_rule(s, "iqr", other=s, other_value=0.0)
    ),
    "expected other of the dtype of score (float32), got float16": (
        lambda s: tokred.select_rule(s, "threshold", 0, other=s.half(), other_value=0.0)
    ),
    "expected other of shape of score = [2, 6], got [2, 3]": (
        lambda s: tokred.select_rule(s, "threshold", 0, other=s[:, :3], other_value=0.0)
    ),
    "expected weight with rule 'quantile', got rule 'iqr'": lambda s: tokred.select_rule(s, "iqr", weight=s.long()),
    "expected weight of dtype int64 or int32, got float32": lambda s: tokred.select_rule(s, "quantile", 0.5, weight=s),
    "expected keep_mask of dtype bool, got float32": lambda s: tokred.select_rule(s, "iqr", keep_mask=s),
    "expected drop_mask of shape of score = [2, 6], got [2, 3]": (
        lambda s: tokred.select_rule(s, "iqr", drop_mask=s[:, :3] > 0)
    ),
    "expected keep_first >= 0, got -1": lambda s: tokred.select_rule(s, "iqr", keep_first=-1),
    "expected order 'index' or 'score', got 'size'": lambda s: tokred.select_rule(s, "iqr", order="size"),
    "expected score of dtype float32, float16 or bfloat16, got int64": lambda s: tokred.select_rule(s.long(), "iqr"),
    "expected score of shape [batch_size, num_tokens] or [batch_size, num_heads, num_tokens], got [6]": (
        lambda s: tokred.select_rule(s[0], "iqr")
    ),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda s: tokred.select_rule(s[0], "iqr", cu_seqlens=torch.tensor([0, 6], device=s.device))
    ),
    "expected max_seqlen in [0, 6], got 7": (
        lambda s: tokred.select_rule(s[0], "iqr", cu_seqlens=torch.tensor([0, 6], device=s.device).int(), max_seqlen=7)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 6, device=device))
    assert f"select_rule: {message}" in str(caught.value)
