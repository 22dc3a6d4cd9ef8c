# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.select.select_budget")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    meta = {"device": "meta"}  # floors look at shapes and dtypes alone
    score, mask = torch.empty(2, 8, 1000, **meta), torch.empty(2, 8, 1000, dtype=torch.bool, **meta)
    assert floor(score, 100) == (16 * 1000 * 4 + 16 * (800 * 8 + 4), 0)  # scores, lists of 8 heads' budget, counts
    assert floor(score, 100, max_k=200, drop_mask=mask) == (16 * 1000 * 5 + 16 * (200 * 8 + 4), 0)
    # Packed, 3 rows of 2 heads with 10 tokens together: bounds 4 * 4; lists of max_seqlen 4.
    cu_seqlens = torch.empty(4, dtype=torch.int32, **meta)
    packed = floor(torch.empty(2, 10, dtype=torch.bfloat16, **meta), 3, cu_seqlens=cu_seqlens, max_seqlen=4)
    assert packed == (40 + 16 + 6 * (4 * 8 + 4), 0)


def check(score, budget, **options):
    """Everything exact."""
    actual = tokred.select_budget(score, budget, **options)
    assert_close(actual, reference(score, budget, **options), name="select_budget")
    return actual


def planted(*shape, device):
    """Scores with many ties, some infinite, some NaN, zeros of both signs."""
    score = torch.randn(*shape).mul(3).round() / 3
    score[torch.rand(*shape) < 0.02] = float("nan")
    score[torch.rand(*shape) < 0.01] = float("inf")
    score[torch.rand(*shape) < 0.02] = -float("inf")
    score[score == 0] *= torch.where(torch.rand(int((score == 0).sum())) < 0.5, -1.0, 1.0)
    return score.to(device)


RULES = [
    {},
    {"alpha": 0.2},
    {"alpha": 1.0},
    {"alpha": 0.2, "rule": "rounded"},
    {"alpha": 0.5, "rule": "rounded", "order": "score"},
    {"rule": "rounded"},
]


# One less, equal, one more than a block; a block's row (8192), two chunks.
@pytest.mark.parametrize("num_tokens", [1, 2, 33, 255, 257, 1025, 8193, 9001])
def test_sizes_and_budgets(device, num_tokens, simt):
    score = planted(1 if num_tokens > 1000 else 2, 3, num_tokens, device=device)
    for rule in RULES[1::3] if simt and num_tokens > 1000 else RULES:
        for budget in {num_tokens // 9} if num_tokens > 1000 else {0, 1, num_tokens // 9, num_tokens // 2, num_tokens}:
            check(score, budget, **rule)


@pytest.mark.parametrize("kind", ["constant", "few", "bf16 softmax", "nan", "one head"])
def test_hard_scores(device, kind):
    score = torch.randn(2, 4, 577)
    if kind == "constant":
        score[:] = -1.5
    elif kind == "few":
        score = score.round()
        score[score == 0] *= -1  # both zeros are there, and equal
    elif kind == "bf16 softmax":
        score = (3 * score).softmax(-1).bfloat16()
    elif kind == "nan":
        score[..., ::2] = float("nan")
        score[0] = float("nan")
    elif kind == "one head":
        score[:, 2] += 100
    for rule in RULES:
        check(score.to(device), 60, **rule)


def test_ties_go_to_the_lower_head(device):
    score = torch.ones(1, 3, 4, device=device)
    assert tokred.select_budget(score, 2)[1].tolist() == [[4, 2, 0]]
    assert tokred.select_budget(score, 2, alpha=0.5)[1].tolist() == [[4, 1, 1]]
    assert tokred.select_budget(score, 2, alpha=0.5, rule="rounded")[1].tolist() == [[3, 2, 1]]
    assert tokred.select_budget(score, 3, alpha=0.34, rule="rounded")[1].tolist() == [[4, 4, 2]]  # 3.64, 3.64, 1.66


def test_halves_are_rounded_to_even(device):
    score = torch.tensor([[[9.0, 8, 7, 6, 5], [4.0, 3, 2, 1, 0]]], device=device)
    # 5 and 1 of 6 places: 2.5 + 1 and 0.5 + 1.
    assert tokred.select_budget(score, 3, alpha=0.5, rule="rounded")[1].tolist() == [[4, 2]]


def kvpress_rule(score, budget, alpha):
    """AdaKVPress's steps: floors get the largest value, then the lowest of all heads together are masked."""
    batch_size, heads, num_tokens = score.shape
    safe = score.topk(int(budget * alpha), dim=-1).indices
    score = score.scatter(-1, safe, torch.finfo(score.dtype).max)
    masked = score.flatten(1).topk(heads * (num_tokens - budget), largest=False).indices
    return (
        torch.ones(batch_size, heads * num_tokens, dtype=torch.bool).scatter(1, masked, False).unflatten(1, (heads, -1))
    )


def adakv_rule(score, budget, alpha):
    """Ada-KV's steps: a flat top-k gives counts, blended with the floor; then each head's best."""
    heads, num_tokens = score.shape[1:]
    flat = score.flatten(1).topk(heads * budget).indices // num_tokens
    keep = torch.zeros_like(score, dtype=torch.bool)
    for b in range(score.shape[0]):
        for h in range(heads):
            count = round(int((flat[b] == h).sum()) * (1 - alpha) + int(budget * alpha))
            keep[b, h, score[b, h].topk(min(count, num_tokens)).indices] = True
    return keep


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_released_rules(device, alpha):
    score = torch.rand(2 * 4 * 90).argsort().float().reshape(2, 4, 90) * torch.tensor([1.0, 0.8, 0.6, 2.0])[:, None]
    for rule, formula in (("exact", kvpress_rule), ("rounded", adakv_rule)):
        kept_idx, num_kept = tokred.select_budget(score.to(device), 20, alpha=alpha, rule=rule)
        expected = formula(score.double(), 20, alpha)
        assert num_kept.tolist() == expected.sum(-1).tolist()
        for b in range(2):
            for h in range(4):
                assert kept_idx[b, h, : num_kept[b, h]].tolist() == expected[b, h].nonzero()[:, 0].tolist()
        if rule == "exact":
            assert num_kept.sum(-1).tolist() == [80, 80] and num_kept.min() >= int(20 * alpha)


@pytest.mark.parametrize("num_tokens", [9, 300, 8200])
def test_forced_and_excluded(device, num_tokens, simt):
    score = planted(2, 3, num_tokens, device=device)
    keep, drop = (torch.rand(2, 3, num_tokens).lt(share).to(device) for share in (0.3, 0.4))
    keep[0, 1], drop[1, 2], keep[1, 0], drop[1, 0] = True, True, True, True
    for rule in RULES[1:2] if simt and num_tokens > 8000 else RULES:
        for budget in {num_tokens // 4} if num_tokens > 8000 else {num_tokens // 9, num_tokens // 2, num_tokens}:
            check(score, budget, keep_mask=keep, drop_mask=drop, **rule)
            if num_tokens < 8000:
                check(score, budget, keep_mask=keep, max_k=num_tokens // 3, **rule)
                check(score, budget, drop_mask=drop, **rule)


@pytest.mark.parametrize("lens", [[5, 0, 700, 33, 1], [10, 0, 9500]])
def test_ragged_equals_dense(device, lens, simt):
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    score = planted(3, sum(lens), device=device)
    keep, drop = score > 1.2, score < -1
    for rule in RULES[1:2] if simt and sum(lens) > 1000 else RULES:
        options = {"keep_mask": keep, "drop_mask": drop, "cu_seqlens": cu_seqlens, "max_seqlen": max(lens)}
        kept_idx, num_kept = check(score, 40, **options, **rule)
        for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
            part = slice(start, start + length)
            if length < 40:
                continue
            masks = {"keep_mask": keep[None, :, part], "drop_mask": drop[None, :, part]}
            alone = tokred.select_budget(
                score[None, :, part], 40, max_k=kept_idx.shape[-1] if length > 120 else None, **masks, **rule
            )
            width = alone[0].shape[-1]
            assert_close(kept_idx[b, :, :width], alone[0][0])
            assert_close(num_kept[b], alone[1][0])
        if sum(lens) < 1000:
            check(score, 8, cu_seqlens=cu_seqlens, **rule)
            check(score, 8, cu_seqlens=cu_seqlens, max_seqlen=20, max_k=5, **rule)  # longer ones are cut


def test_layers_side_by_side(device):
    layers = planted(2, 5, 3, 64, device=device)  # [batch, layer, head, token]
    kept_idx, num_kept = check(layers.flatten(1, 2), 10, alpha=0.1)
    assert (num_kept.sum(-1) == 150).all() and kept_idx.shape == (2, 15, 64)


def test_views(device):
    base = torch.randn(4, 3, 120, device=device)
    mask = base > 0.5
    check(base[:, 1:, 7:90], 9, alpha=0.3)
    check(base.transpose(0, 1), 9, keep_mask=mask.transpose(0, 1), alpha=0.3)
    check(base[:, :1].expand(4, 3, 120), 9, drop_mask=mask[:, 0][:, None].expand(4, 3, 120))
    for dtype in (torch.float16, torch.bfloat16):
        check(base.to(dtype)[..., 1:], 30, rule="rounded", alpha=0.2)


def test_offsets_beyond_2_31(device):
    score = torch.empty(2**31 + 99, dtype=torch.bfloat16, device=device).as_strided((1, 2, 33), (5, 2**31 + 7, 1))
    score.copy_(torch.randn(1, 2, 33))
    mask = torch.empty(2**31 + 99, dtype=torch.bool, device=device).as_strided((1, 2, 33), (5, 2**31 + 7, 1))
    mask.copy_(torch.rand(1, 2, 33) < 0.3)
    check(score, 5, keep_mask=mask)
    check(score, 9, drop_mask=mask, alpha=0.5)


def test_bad_offsets_read_nothing_out_of_bounds(device):
    score = torch.randn(2, 30, device=device)
    # Beyond both ends and falling, but no two sequences overlap: they share the mask of the floors.
    cu_seqlens = torch.tensor([0, -5, 10, 2**30, 30], dtype=torch.int32, device=device)
    for rule in RULES:
        kept_idx, num_kept = tokred.select_budget(score, 4, cu_seqlens=cu_seqlens, **rule)
        assert (kept_idx < 30).all() and (num_kept <= 8).all() and (kept_idx >= -1).all()


@given(st.data())
def test_any_heads(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    heads, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    score = torch.tensor([data.draw(st.lists(values, min_size=heads * n, max_size=heads * n))], device=device)
    score = score.reshape(1, heads, n)
    flags = st.lists(st.booleans(), min_size=heads * n, max_size=heads * n)
    keep, drop = (torch.tensor(data.draw(flags), device=device).reshape(1, heads, n) for _ in range(2))
    budget, alpha = data.draw(st.integers(0, n)), data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    _, num_kept = check(score, budget, alpha=alpha, keep_mask=keep, drop_mask=drop)
    assert int(num_kept.sum()) == min(heads * budget, int((~drop).sum())) or alpha > 0
    _, num_kept = check(score, budget, alpha=alpha)
    assert int(num_kept.sum()) == heads * budget and int(num_kept.min()) >= int(budget * alpha)
    check(score, budget, alpha=alpha, rule="rounded", drop_mask=drop, order="score", max_k=max(n // 2, 1))


def test_sequence_is_independent_of_its_batch(device, threads):
    score = torch.randn(5, 4, 600, device=device).bfloat16()
    alone = [tokred.select_budget(score[b : b + 1], 50, alpha=0.2)[0] for b in range(5)]
    for result in threads(lambda: tokred.select_budget(score, 50, alpha=0.2)):
        assert_close(result[0], torch.cat(alone))


def test_empty(device):
    score = torch.randn(2, 3, 5, device=device)
    for rule in RULES:
        check(score[:0], 3, **rule)
        check(score[..., :0], 0, **rule)
        check(score, 0, **rule)
        check(score, 2, max_k=0, **rule)
    assert tokred.select_budget(score[:, :0], 3)[0].shape == (2, 0, 0)


def test_score_that_requires_grad(device):
    score = torch.randn(2, 3, 6, device=device, requires_grad=True)
    assert not tokred.select_budget(score, 2)[0].requires_grad


def test_vmap(device):
    score = torch.randn(2, 3, 11, 4, device=device)
    mapped = torch.vmap(lambda s: tokred.select_budget(s, 4, alpha=0.5), in_dims=3)(score)
    for i in range(4):
        assert_close([x[i] for x in mapped], list(tokred.select_budget(score[..., i].contiguous(), 4, alpha=0.5)))


ERRORS = {
    "expected a score per head, [batch_size, num_heads, num_tokens], got [2, 6]": (
        lambda s: tokred.select_budget(s[:, 0], 2)
    ),
    "expected a score per head, [num_heads, total_tokens], got [6]": (
        lambda s: tokred.select_budget(s[0, 0], 2, cu_seqlens=torch.tensor([0, 6], device=s.device).int())
    ),
    "expected budget in [0, 6], got 7": lambda s: tokred.select_budget(s, 7),
    "expected budget in [0, 6], got -1": lambda s: tokred.select_budget(s, -1, max_k=2),
    "expected max_k in [0, 6], got 8": lambda s: tokred.select_budget(s, 2, max_k=8),
    "expected alpha in [0, 1], got 1.5": lambda s: tokred.select_budget(s, 2, alpha=1.5),
    "expected rule 'exact' or 'rounded', got 'fair'": lambda s: tokred.select_budget(s, 2, rule="fair"),
    "expected order 'index' or 'score', got 'size'": lambda s: tokred.select_budget(s, 2, order="size"),
    "expected keep_mask of dtype bool, got float32": lambda s: tokred.select_budget(s, 2, keep_mask=s),
    "expected drop_mask of shape of score = [2, 3, 6], got [2, 3, 3]": (
        lambda s: tokred.select_budget(s, 2, drop_mask=s[..., :3] > 0)
    ),
    "expected score of dtype float32, float16 or bfloat16, got int64": lambda s: tokred.select_budget(s.long(), 2),
    "expected max_seqlen in [0, 6], got 7": (
        lambda s: tokred.select_budget(
            s[0], 2, cu_seqlens=torch.tensor([0, 6], device=s.device).int(), max_seqlen=7, max_k=4
        )
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 3, 6, device=device))
    assert f"select_budget: {message}" in str(caught.value)
