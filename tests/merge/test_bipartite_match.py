# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.merge.bipartite_match").reference
floor = importlib.import_module("tokred.merge.bipartite_match").floor

ORDERS = ["index", "grouped", "score"]


def test_floor_by_hand():
    metric = torch.empty(32, 197, 64, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    moved = 32 * 197 * (128 + 20)  # the metric, and three outputs of 8, 8 and 4 bytes
    assert floor(metric, 16) == (moved, 2 * 32 * 99 * 98 * 64)
    assert floor(metric, 16, num_protected=1) == (moved, 2 * 32 * 98 * 98 * 64)  # the class token is a source
    protect = torch.empty(32, 197, dtype=torch.bool, device="meta")
    assert floor(metric, 16, num_protected=2, protect=protect) == (moved + 32 * 197, 2 * 32 * 98 * 97 * 64)
    lists = {
        name: torch.empty(n, dtype=torch.int64, device="meta") for name, n in (("sources", 150), ("destinations", 40))
    }
    assert floor(metric, 16, **lists) == (moved + 190 * 8, 2 * 32 * 150 * 40 * 64)
    lens = torch.empty(32, dtype=torch.int32, device="meta")  # beside it a count per row comes out
    assert floor(metric, threshold=0.5, seq_lens=lens) == (moved + 2 * 32 * 4, 2 * 32 * 99 * 98 * 64)
    weight = torch.empty(32, 197, device="meta")
    assert floor(metric, 16, weight=weight, group=weight.int()) == (moved + 32 * 197 * 8, 2 * 32 * 99 * 98 * 64)


def similarities(metric, normalize=True):
    """[batch, sources, destinations] in float64."""
    value = metric.double().cpu()
    if normalize:
        value = value / value.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return value[:, ::2] @ value[:, 1::2].transpose(1, 2)


def selection(score, r, num_protected, protect, order):
    """The map that follows from score and match by the rules, written as loops over one row; match comes later."""
    num_src = (len(score) + 1) // 2
    first = (num_protected + 1) // 2

    def rank(i):  # smaller is better
        if i < first:
            return (3, 0, 0, i)
        if protect is not None and protect[2 * i]:
            return (2, 0, 0, i)
        value = score[2 * i].item()
        return (0, 0, -value, i) if value == value else (1, 0, 0, i)

    ranked = sorted(range(num_src), key=rank)
    return set(ranked[:r]), ranked[r:] if order == "score" else sorted(ranked[r:])


def layout(score, match, r, num_protected, protect, order):
    num_tokens = len(score)
    merged, unmerged = selection(score, r, num_protected, protect, order)
    if order == "index":
        rows = [t for t in range(num_tokens) if t % 2 or t // 2 not in merged]
    else:
        rows = [2 * i for i in unmerged] + list(range(1, num_tokens, 2))
    place = {token: row for row, token in enumerate(rows)}
    return [place[match[t].item()] if t % 2 == 0 and t // 2 in merged else place[t] for t in range(num_tokens)]


def check(metric, r, *, num_protected=0, protect=None, normalize=True, order="index", exact=False, atol=None):
    """Scores against float64, the match by its similarity, and the map exactly as it follows from both."""
    options = {"num_protected": num_protected, "protect": protect, "normalize": normalize, "order": order}
    dst_idx, match_idx, score = (t.cpu() for t in tokred.bipartite_match(metric, r, **options, return_score=True))
    batch_size, num_tokens, _ = metric.shape
    assert dst_idx.dtype == match_idx.dtype == torch.int64 and score.dtype == torch.float32
    expected = [t.cpu() for t in reference(metric.double(), r, **options, return_score=True)]
    if exact:
        assert_close([dst_idx, match_idx, score], [*expected[:2], expected[2].float()], rtol=0, atol=0)
    # Sums of dim products of unit vectors in float32: dim * 2^-24 at the worst, about sqrt(dim) of that in truth; norms add
    # two roundings. Inputs are compared as they are, so half and bfloat16 have the same bound.
    atol = atol or 4e-6
    assert_close(score, expected[2].float(), rtol=1e-6, atol=atol)
    assert torch.equal(match_idx < 0, expected[1] < 0)
    assert torch.equal(match_idx >= 0, (match_idx % 2 == 1) & (match_idx >= num_protected))
    similarity, source = similarities(metric, normalize), match_idx[:, ::2] >= 0
    if source.any():
        chosen, best = (
            similarity.gather(2, m[:, ::2, None].clamp_min(1) // 2)[..., 0] for m in (match_idx, expected[1])
        )
        equal = match_idx[:, ::2] == expected[1][:, ::2]
        assert (equal | (chosen >= best - 2 * atol))[source].all()
    for b in range(batch_size):
        mask = None if protect is None else protect[b].cpu()
        assert dst_idx[b].tolist() == layout(score[b], match_idx[b], r, num_protected, mask, order)
        if num_tokens:
            count = torch.bincount(dst_idx[b], minlength=num_tokens - r)
            assert len(count) == num_tokens - r and (count > 0).all()
    assert_close(tokred.bipartite_match(metric, r, **options).cpu(), dst_idx)
    return dst_idx, match_idx, score


def tome_steps(metric, r):
    """ToMe's steps, one after the other, for one image without protected tokens, in float64."""
    value = metric.double()
    value = value / value.norm(dim=-1, keepdim=True)
    best, column = (value[::2] @ value[1::2].T).max(dim=1)
    order = best.argsort(descending=True)
    src, unmerged = order[:r], order[r:]
    out = torch.full((len(metric),), -1)
    out[2 * unmerged] = torch.arange(len(unmerged))
    out[1::2] = len(unmerged) + torch.arange(len(metric) // 2)
    out[2 * src] = len(unmerged) + column[src]
    return out


@pytest.mark.parametrize("num_tokens", [2, 3, 32, 65, 197])
def test_tome_steps(device, num_tokens):
    metric = torch.randn(3, num_tokens, 48, dtype=torch.float64)
    r = num_tokens // 3
    actual = tokred.bipartite_match(metric.float().to(device), r, order="score").cpu()
    assert_close(actual, torch.stack([tome_steps(row, r) for row in metric]))


def max_r(num_tokens, num_protected):
    if num_tokens // 2 <= num_protected // 2:
        return 0
    return (num_tokens + 1) // 2 - (num_protected + 1) // 2


# Around a vector, a warp, a tile of 64 sources or 128 destinations, the CPU's tiles; then ViTs.
SIZES = [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 129, 197, 257, 577]


@pytest.mark.parametrize("num_tokens", SIZES)
def test_sizes(device, num_tokens, simt, dtype):
    if simt and (num_tokens > 300 or (num_tokens > 40 and dtype == torch.float16)):
        return
    for num_protected in range(4):
        if num_protected > num_tokens or (simt and num_tokens > 130 and num_protected > 1):
            break
        metric = torch.randn(2, num_tokens, 24).to(device, dtype)
        most = max_r(num_tokens, num_protected)
        for i, r in enumerate({0, min(1, most), most // 3, most}):
            check(metric, r, num_protected=num_protected, order=ORDERS[(i + num_protected) % 3])


# One element, around a 16-byte load, a k step of 32 floats or 64 halves, several steps, longer than the pipeline.
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 33, 40, 64, 65, 72, 80, 96, 128, 200, 320, 513])
def test_dims(device, dim, dtype, simt):
    metric = torch.randn(2, 77, dim).to(device, dtype)
    for order in ORDERS[:1] if simt else ORDERS:
        check(metric, 20, order=order)
    check(metric, 20, normalize=False, num_protected=1, atol=1e-5 * dim**0.5 * 4)


def planted(batch_size, num_tokens, dim, dtype, device):
    """Small integers: every product and sum is exact, and most similarities tie."""
    return torch.randint(-2, 3, (batch_size, num_tokens, dim)).to(device, dtype)


@pytest.mark.parametrize("num_tokens", [5, 70, 300, 601])
def test_exact_ties(device, num_tokens, dtype, simt):
    if simt and (num_tokens > 300 or (num_tokens == 300 and dtype == torch.float16)):
        return
    metric = planted(2, num_tokens, 5, dtype, device)
    for order in ORDERS:
        for num_protected in (ORDERS.index(order),) if simt else (0, 1, 2):
            check(metric, num_tokens // 4, num_protected=num_protected, normalize=False, order=order, exact=True)
    same = torch.ones(1, num_tokens, 40, device=device, dtype=dtype)
    dst_idx, match_idx, _ = check(same, num_tokens // 5, normalize=False, exact=True)
    assert (match_idx[0, ::2] == 1).all()
    if num_tokens > 5:
        assert dst_idx[0, 0] == dst_idx[0, 2] == dst_idx[0, 1]


@pytest.mark.parametrize("num_tokens", [9, 140, 280, 530])
def test_protect_mask(device, num_tokens, dtype, simt):
    if simt and (num_tokens > 300 or (num_tokens > 9 and dtype == torch.float16)):
        return
    metric = planted(6, num_tokens, 6, dtype, device)
    protect = torch.rand(6, num_tokens).lt(0.3)
    protect[1] = True  # violates the precondition: all sources protected, no destination left
    protect[2, 1::2] = True
    protect[3, ::2] = True
    protect[4, : num_tokens // 2] = True
    protect[5] = False
    for order in ORDERS:
        for num_protected in (ORDERS.index(order),) if simt else (0, 1, 3):
            r = max_r(num_tokens, num_protected) // 2
            check(
                metric,
                r,
                num_protected=num_protected,
                protect=protect.to(device),
                normalize=False,
                order=order,
                exact=True,
            )
    unprotected = tokred.bipartite_match(metric[5:], 3, normalize=False, return_score=True)
    with_mask = tokred.bipartite_match(metric, 3, protect=protect.to(device), normalize=False, return_score=True)
    assert_close([t[5:] for t in with_mask], unprotected, rtol=0, atol=0)


def test_protected_tokens_stay_alone(device):
    metric = torch.randn(4, 90, 16, device=device)
    protect = torch.rand(4, 90, device=device) < 0.5
    dst_idx = tokred.bipartite_match(metric, 8, protect=protect, num_protected=2)
    for b in range(4):
        members = torch.bincount(dst_idx[b], minlength=82)
        alone = protect[b].clone()
        alone[:2] = True
        assert (members[dst_idx[b][alone]] == 1).all()


@pytest.mark.parametrize("num_tokens", [6, 151, 300])
def test_zero_nan_inf(device, num_tokens, dtype, simt):
    if simt and num_tokens > 200 and dtype != torch.bfloat16:
        return
    metric = torch.randn(4, num_tokens, 20)
    metric[0, ::3] = 0  # similarity 0 to everything
    metric[1, 2] = float("nan")  # a source and a destination without a number
    metric[1, 3, 5] = float("nan")
    metric[2] = float("nan")
    metric[3] = 0
    metric = metric.to(device, dtype)
    for order in ORDERS:
        for num_protected in (0, 2):
            check(metric, num_tokens // 3, num_protected=num_protected, order=order)
    _, match_idx, score = tokred.bipartite_match(metric, 1, num_protected=2, return_score=True)
    assert (match_idx[2, 2::2] == 3).all() and score[2, 2::2].isnan().all()
    protect = torch.zeros(4, num_tokens, dtype=torch.bool, device=device)
    protect[:, 1:4] = True
    assert (tokred.bipartite_match(metric, 1, protect=protect, return_score=True)[1][2, ::2] == 5).all()
    protect[:, 1::2] = True  # no destination is left: the first one
    assert (
        tokred.bipartite_match(metric, 1, protect=protect, return_score=True)[1][2, ::2][~protect[2, ::2]] == 1
    ).all()
    # Without a bound on the norm a zero vector has no direction, as in ToMe.
    score = tokred.bipartite_match(metric, 0, eps=0.0, return_score=True)[2]
    assert score[3, ::2].isnan().all()


def test_minus_infinity_is_a_number(device):
    """Similarities that overflow: -inf, then NaN."""
    metric = torch.zeros(1, 8, 2, dtype=torch.bfloat16, device=device)
    metric[0, ::2, 0] = -3e38
    metric[0, 1::2, 0] = torch.tensor([float("nan"), 3e38, 3e38, float("nan")])
    check(metric, 2, normalize=False, exact=True)
    metric[0, 3] = float("nan")
    check(metric, 2, normalize=False, exact=True)
    metric[0, 5] = float("nan")
    check(metric, 2, normalize=False, exact=True)


def test_views(device, dtype):
    base = torch.randn(2, 80, 60).to(device, dtype)
    for view in (
        base[:, :, 1:34],  # misaligned
        base[:, :, :32],
        base[:, 1::3],
        base.transpose(0, 1).contiguous().transpose(0, 1),
        base[:1].expand(3, 80, 60),
        base[:, :1].expand(2, 50, 60),
    ):
        check(view, 9, num_protected=1)


def test_keys_of_heads(device):
    """ToMe's metric: keys averaged over heads, here a mean that leaves odd strides."""
    keys = torch.randn(2, 3, 50, 8, device=device)
    check(keys.mean(1), 9)
    check(keys.permute(0, 2, 1, 3).flatten(2), 9, order="score")


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**32, dtype=torch.float16, device=device)
    metric = base.as_strided((3, 5, 8), (700, 2**30 - 707, 1))
    metric.copy_(torch.randint(-2, 3, (3, 5, 8)))
    check(metric, 2)
    exactly(metric, 1, normalize=False, **some_lists(3, 5, 2, 2, device))
    metric = base.as_strided((2, 33, 8), (2**31 + 8, 16, 1))
    metric.copy_(torch.randn(2, 33, 8))
    check(metric, 9)


def exactly(metric, *args, **options):
    """The reference's result to the bit: for inputs whose products are exact."""
    actual = tokred.bipartite_match(metric, *args, **options, return_score=True)
    expected = reference(metric, *args, **options, return_score=True)
    assert_close(list(actual), list(expected), rtol=0, atol=0)
    return actual


def some_lists(batch_size, num_tokens, num_src, num_dst, device, empty=0.0):
    """Sources and destinations per row in no order, and slots that are empty in several ways."""
    shuffled = torch.rand(batch_size, num_tokens).argsort(1)
    lists = [shuffled[:, :num_src].clone(), shuffled[:, num_src : num_src + num_dst].clone()]
    for tokens in lists:
        no_token = torch.tensor([-1, -7, num_tokens, 2**31 - 1])[torch.randint(4, tokens.shape)]
        tokens[...] = torch.where(torch.rand(tokens.shape) < empty, no_token, tokens)
    return {"sources": lists[0].to(device), "destinations": lists[1].to(device)}


# Around a tile of 64 sources and 128 destinations; what one block keeps of a row is 1,024 and 4,096 sources.
@pytest.mark.parametrize(
    ("num_tokens", "num_src", "num_dst"),
    [
        (1, 1, 0),
        (2, 1, 1),
        (9, 4, 3),
        (150, 65, 40),
        (260, 63, 130),
        (330, 64, 257),
        (1500, 1100, 33),
        (5000, 4200, 20),
    ],
)
def test_lists(device, num_tokens, num_src, num_dst, dtype, simt):
    if dtype != torch.bfloat16 and num_tokens > (150 if simt else 1000):
        return
    for order in ORDERS[:1] if num_tokens > (300 if simt else 2000) else ORDERS:
        metric = planted(2, num_tokens, 5, dtype, device)
        r = num_src // 2 if num_dst else 0
        lists = some_lists(2, num_tokens, num_src, num_dst, device)
        options = {"normalize": False, "order": order}
        dst_idx = exactly(metric, r, **lists, **options)[0]
        assert [row.unique().numel() for row in dst_idx.cpu()] == [num_tokens - r] * 2
        protect = torch.rand(2, num_tokens, device=device) < 0.2
        exactly(metric, r, **lists, **options, protect=protect)
        if num_tokens < 1000:
            protect[0] = True
            exactly(metric, r, **lists, **options, protect=protect)
            holes = some_lists(2, num_tokens, num_src, num_dst, device, empty=0.3)
            exactly(metric, r, **{name: t.int() for name, t in holes.items()}, **options, protect=protect)
            exactly(metric, None, **holes, **options, protect=protect, threshold=1.0)
            shared = {name: t[1] for name, t in holes.items()}  # one list for all rows
            each = {name: t[1].expand(2, -1).contiguous() for name, t in holes.items()}
            assert torch.equal(
                tokred.bipartite_match(metric, 0, **shared, **options),
                tokred.bipartite_match(metric, 0, **each, **options),
            )


@pytest.mark.parametrize("num_tokens", [5, 131, 300])
def test_lists_of_parity_are_parity(device, num_tokens, dtype):
    metric = torch.randn(2, num_tokens, 40).to(device, dtype)
    place = torch.arange(num_tokens, device=device)
    for order in ORDERS:
        for first in (0, 1):
            lists = {"sources": place[first::2][first:], "destinations": place[1 - first :: 2][first:]}
            if first == 0:
                plain = tokred.bipartite_match(metric, num_tokens // 4, order=order, return_score=True)
                listed = tokred.bipartite_match(metric, num_tokens // 4, order=order, return_score=True, **lists)
                assert_close(listed, plain, rtol=0, atol=0)
            else:  # the other direction
                options = {**lists, "order": order, "return_score": True}
                actual = tokred.bipartite_match(metric, num_tokens // 5, **options)
                expected = reference(metric.double(), num_tokens // 5, **options)
                assert_close(actual[2], expected[2].float(), rtol=1e-6, atol=4e-6)


def test_lists_of_methods(device):
    """PiToMe's alternate ranks of energy, all of which merge; DUET-VLM's pool with every third of it an anchor."""
    metric, energy = torch.randn(2, 40, 8, device=device), torch.rand(2, 40, device=device)
    ranked = energy.argsort(1, descending=True)
    pool = ranked[:, :18]
    others = torch.arange(18, device=device) % 3 > 0
    for sources, destinations in ((pool[:, ::2], pool[:, 1::2]), (pool[:, others], pool[:, ~others])):
        lists = {"sources": sources.contiguous(), "destinations": destinations.contiguous()}
        count = sources.shape[1]
        dst_idx, match_idx, _ = tokred.bipartite_match(metric, count, **lists, return_score=True)
        unit = torch.nn.functional.normalize(metric.double(), dim=-1)
        for b in range(2):
            best = (unit[b][sources[b]] @ unit[b][destinations[b]].T).argmax(1)
            assert torch.equal(match_idx[b][sources[b]], destinations[b][best])
            assert torch.equal(dst_idx[b][sources[b]], dst_idx[b][destinations[b][best]])
            assert sorted(dst_idx[b].unique().tolist()) == list(range(40 - count))


def sizes_of(dst_idx, num_out):
    return torch.stack([torch.bincount(row[row >= 0], minlength=num_out) for row in dst_idx.cpu()])


@pytest.mark.parametrize("num_tokens", [1, 2, 33, 140, 300])
def test_threshold_and_lengths(device, num_tokens, dtype, simt):
    if dtype != torch.bfloat16 and num_tokens > (40 if simt else 200):
        return
    metric = planted(5, num_tokens, 5, dtype, device)
    seq_lens = torch.tensor([num_tokens, num_tokens // 2, 0, 1, -3], dtype=torch.int32, device=device)
    protect = torch.rand(5, num_tokens, device=device) < 0.2
    row_threshold = torch.tensor([float("inf"), 2.0, float("nan"), -float("inf"), 0.0], device=device)
    poisoned = metric.clone()
    for b, count in enumerate(seq_lens.clamp(0).tolist()):
        poisoned[b, count:] = float("nan")  # padding is not looked at
    for i, order in enumerate(ORDERS[1:2] if simt and num_tokens > 100 else ORDERS):
        options = {"normalize": False, "order": order}
        for mask in (None, protect):
            exactly(metric, None, **options, protect=mask, threshold=1.0, num_protected=min(i, num_tokens))
            exactly(metric, None, **options, protect=mask, threshold=row_threshold)
            exactly(metric, min(1, num_tokens // 2), **options, protect=mask, threshold=-1.0, seq_lens=seq_lens)
        exactly(metric, None, **options, protect=torch.ones_like(protect), seq_lens=seq_lens)
        dst_idx, match_idx, _, num_kept = exactly(poisoned, None, **options, seq_lens=seq_lens, threshold=1.0)
        place = torch.arange(num_tokens, device=device)
        absent = place >= seq_lens.clamp(0)[:, None]
        assert torch.equal(dst_idx < 0, absent) and (match_idx[absent] == -1).all()
        # I1: all tokens are in some row, and the rows are those before num_kept.
        size = sizes_of(dst_idx, num_tokens)
        assert torch.equal(size.sum(1), seq_lens.clamp(0).long().cpu())
        assert torch.equal(size > 0, torch.arange(num_tokens) < num_kept.cpu()[:, None])


def test_threshold_is_strict_and_nan_never_merges(device):
    metric = torch.tensor([[[1.0, 0], [1, 0], [2, 0], [3, 0], [float("nan"), 0]]], device=device)
    for threshold, kept in ((3.0, [4]), (6.0, [5]), (5.9, [4]), (-float("inf"), [3])):  # scores 3, 6 and NaN
        out = tokred.bipartite_match(metric, threshold=threshold, normalize=False)
        assert out[1].tolist() == kept
        assert torch.equal(
            tokred.bipartite_match(metric, threshold=torch.tensor(threshold), normalize=False)[0], out[0]
        )
    assert tokred.bipartite_match(metric, 1, threshold=0.0, normalize=False)[1].tolist() == [4]  # r caps
    assert tokred.bipartite_match(metric, 3, normalize=False).max() == 1  # without a threshold the last one is NaN


@pytest.mark.parametrize("num_tokens", [3, 32, 141, 300])
def test_weights_and_groups(device, num_tokens, dtype, simt):
    if dtype != torch.bfloat16 and num_tokens > (40 if simt else 200):
        return
    metric = planted(3, num_tokens, 5, dtype, device)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, (3, num_tokens))].to(device)  # exact factors
    group = torch.randint(0, 4, (3, num_tokens), device=device, dtype=torch.int32)
    group[2] = torch.arange(num_tokens) % 2  # no source meets any destination
    for i, order in enumerate(ORDERS):
        options = {"normalize": False, "order": order, "num_protected": i}
        r = max_r(num_tokens, i) // 2
        exactly(metric, r, **options, weight=weight, offset=3.0)
        exactly(metric, r, **options, group=group)
        exactly(metric, None, **options, group=group, weight=weight, offset=-1.0, threshold=0.5)
        lists = some_lists(3, num_tokens, num_tokens // 2, num_tokens // 3, device, empty=0.1)
        exactly(metric, num_tokens // 5, **lists, normalize=False, order=order, weight=weight, group=group[0])
    dst_idx, _, score, num_kept = exactly(metric, None, normalize=False, group=group, threshold=-1e9)
    assert num_kept[2] == num_tokens and (score[2] == -torch.inf).all()
    merged = dst_idx[0][:, None] == dst_idx[0]
    assert (group[0][:, None] == group[0])[merged].all()


def test_weighted_cosines(device, dtype):
    """The product of three criteria, as MCTF has it, against float64."""
    metric = torch.randn(2, 150, 72).to(device, dtype)
    weight = torch.rand(2, 150).add(0.1).to(device)
    actual = tokred.bipartite_match(metric, 30, weight=weight, offset=1.0, return_score=True)
    expected = reference(metric.double(), 30, weight=weight, offset=1.0, return_score=True)
    assert_close(actual[2], expected[2].float(), rtol=4e-6, atol=4e-6)
    similarity = (
        (similarities(metric) + 1) * weight.double().cpu()[:, 1::2][:, None] * weight.double().cpu()[:, ::2, None]
    )
    chosen = similarity.gather(2, actual[1].cpu()[:, ::2, None] // 2)[..., 0]
    assert (chosen >= similarity.amax(2) - 1e-5).all()
    # Logarithms of the factors as biases: the same order.
    bias = weight.log()
    shifted = tokred.bipartite_match(metric, 30, weight=(bias - bias.amax()).exp(), offset=1.0)
    assert_close(shifted, actual[0])


def test_merged_means_keep_the_mean(device):
    """I2 and I3: unmerging what was merged keeps the mean; nothing merged is nothing changed."""
    x = torch.randn(2, 90, 8, device=device)
    lists = some_lists(2, 90, 40, 30, device)
    for options in ({}, {"threshold": 0.1}, lists, {**lists, "threshold": 0.2}):
        r = None if "threshold" in options else 20
        out = tokred.bipartite_match(x, r, **options)
        dst_idx = out[0] if "threshold" in options else out
        merged, size = tokred.segment_merge(x, dst_idx, 90)
        assert_close(tokred.segment_expand(merged, dst_idx).mean(1), x.mean(1))
        assert size.sum(1).tolist() == [90, 90]
    same = tokred.bipartite_match(x, None, threshold=2.0)[0]
    assert torch.equal(tokred.segment_merge(x, same, 90)[0], x)
    assert torch.equal(tokred.segment_merge(x, tokred.bipartite_match(x, 0, **lists), 90)[0], x)


@given(st.data())
def test_any_call(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens = data.draw(st.integers(0, 80))
    num_protected = data.draw(st.integers(0, min(num_tokens, 5)))
    r = data.draw(st.integers(0, max_r(num_tokens, num_protected)))
    batch_size, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    metric = planted(batch_size, num_tokens, dim, torch.float32, device)
    protect = torch.rand(batch_size, num_tokens, device=device) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    check(
        metric,
        r,
        num_protected=num_protected,
        protect=data.draw(st.sampled_from([None, protect])),
        normalize=False,
        order=data.draw(st.sampled_from(ORDERS)),
        exact=True,
    )


@pytest.mark.parametrize("shape", [(5, 130, 24), (3, 600, 64)])
def test_row_is_independent_of_its_batch(device, threads, dtype, shape, simt):
    if simt and shape[1] > 300:
        return
    metric = torch.randn(*shape).to(device, dtype)
    protect = torch.rand(*shape[:2], device=device) < 0.2

    group = torch.randint(0, 3, shape[:2], device=device, dtype=torch.int32)

    def grouped(rows):
        options = {"group": group[rows], "protect": protect[rows], "offset": 1.0, "order": "grouped"}
        return list(tokred.bipartite_match(metric[rows], None, threshold=0.8, **options, return_score=True))

    def both():
        plain = [
            tokred.bipartite_match(metric, 20, protect=p, order="score", return_score=True) for p in (None, protect)
        ]
        return [*plain, grouped(slice(None))]

    alone = [
        [
            torch.cat(rows)
            for rows in zip(
                *(
                    tokred.bipartite_match(
                        metric[b : b + 1],
                        20,
                        protect=None if p is None else p[b : b + 1],
                        order="score",
                        return_score=True,
                    )
                    for b in range(shape[0])
                )
            )
        ]
        for p in (None, protect)
    ]
    alone.append([torch.cat(rows) for rows in zip(*(grouped(slice(b, b + 1)) for b in range(shape[0])))])
    for result in threads(both):
        assert_close(result, alone, rtol=0, atol=0)


def test_empty(device):
    for shape in ((0, 7, 4), (2, 0, 4), (2, 1, 4), (2, 7, 0), (0, 0, 0)):
        check(torch.randn(*shape, device=device), 0)
        check(torch.randn(*shape, device=device), 0, protect=torch.ones(shape[:2], dtype=torch.bool, device=device))
    _, match_idx, _ = check(torch.randn(2, 7, 0, device=device), 3)  # all similarities are 0
    assert (match_idx[:, ::2] == 1).all()


@pytest.mark.parametrize("num_tokens", [1100, 2053, 8195])
def test_long(device, num_tokens, simt):
    """Several tiles and splits; 1,024 and 4,096 sources are what one block keeps."""
    metric = planted(1, num_tokens, 3, torch.bfloat16, device)
    protect = torch.rand(1, num_tokens, device=device) < 0.1
    for order in ORDERS[:1] if simt and num_tokens > 2000 else ORDERS:
        for mask in (protect,) if simt and num_tokens > 8000 else (None, protect):
            options = {"protect": mask, "normalize": False, "order": order, "return_score": True}
            actual = tokred.bipartite_match(metric, num_tokens // 5, **options)
            assert_close(actual, reference(metric, num_tokens // 5, **options), rtol=0, atol=0)


def test_backward_raises(device):
    metric = torch.randn(2, 9, 4, device=device, requires_grad=True)
    dst_idx, match_idx, score = tokred.bipartite_match(metric, 2, return_score=True)
    assert not dst_idx.requires_grad and not match_idx.requires_grad
    with pytest.raises(RuntimeError, match="bipartite_match: has no gradient; merge by its dst_idx with segment_merge"):
        score[:, ::2].sum().backward()


def test_vmap(device):
    metric = torch.randn(2, 11, 3, 4, device=device)
    protect = torch.rand(3, 2, 11, device=device) < 0.2
    mapped = torch.vmap(
        lambda m, p: tokred.bipartite_match(m, 3, protect=p, num_protected=1, return_score=True), in_dims=(2, 0)
    )(metric, protect)
    for i in range(3):
        alone = tokred.bipartite_match(
            metric[:, :, i].contiguous(), 3, protect=protect[i], num_protected=1, return_score=True
        )
        assert_close([m[i] for m in mapped], alone, rtol=0, atol=0)
    lists = {"sources": torch.tensor([0, 4, 8], device=device), "destinations": torch.tensor([1, 2], device=device)}
    mapped = torch.vmap(lambda m, p: tokred.bipartite_match(m, protect=p, threshold=0.1, **lists), in_dims=(2, 0))(
        metric, protect
    )
    for i in range(3):
        alone = tokred.bipartite_match(metric[:, :, i].contiguous(), protect=protect[i], threshold=0.1, **lists)
        assert_close([m[i] for m in mapped], alone, rtol=0, atol=0)


def test_autocast_leaves_metric_alone(device):
    metric = torch.randn(2, 50, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokred.bipartite_match(metric, 9, return_score=True)
    assert_close(inside, tokred.bipartite_match(metric, 9, return_score=True), rtol=0, atol=0)


BAD_R = "the number of unprotected sources (even tokens) when there is an unprotected destination (odd token), got"
PAIR = torch.tensor([[0, 2], [1, 3]])


def listed(m, sources=PAIR, destinations=PAIR, r=1, **options):
    given = {"sources": sources, "destinations": destinations, **options}
    return tokred.bipartite_match(
        m, r, **{k: v.to(m.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    )


ERRORS = {
    "expected r in [0, 2], the number of sources when there is a destination, got 3": lambda m: listed(m, r=3),
    "expected r in [0, 0], the number of sources when there is a destination, got 1": (
        lambda m: listed(m, destinations=PAIR[:, :0])
    ),
    "expected sources and destinations together, got sources alone": (
        lambda m: tokred.bipartite_match(m, 1, sources=PAIR.to(m.device))
    ),
    "expected sources and destinations together, got destinations alone": (
        lambda m: tokred.bipartite_match(m, 1, destinations=PAIR.to(m.device))
    ),
    "expected num_protected 0 with sources, got 1": lambda m: listed(m, num_protected=1),
    "expected sources of dtype int64 or int32, got float32": lambda m: listed(m, PAIR.float()),
    "expected destinations of shape [batch_size, count] with batch_size 2, got [1, 2]": lambda m: listed(
        m, PAIR, PAIR[:1]
    ),
    "expected sources contiguous in its last dimension, got strides [1, 2]": lambda m: listed(m, PAIR.T),
    "expected weight of dtype float32, got float16": lambda m: listed(m, weight=torch.ones(2, 7).half()),
    "expected weight of shape [batch_size, num_tokens] = [2, 7], got [2, 6]": lambda m: listed(
        m, weight=torch.ones(2, 6)
    ),
    "expected weight contiguous, got strides [0, 1]": lambda m: listed(m, weight=torch.ones(1, 7).expand(2, 7)),
    "expected group of dtype int32, got int64": lambda m: listed(m, group=torch.ones(2, 7).long()),
    "expected group of shape [batch_size, num_tokens] = [2, 7], got [2, 6]": lambda m: listed(
        m, group=torch.ones(6).int()
    ),
    "expected seq_lens of dtype int32, got int64": lambda m: listed(m, seq_lens=torch.ones(2).long()),
    "expected seq_lens of shape [batch_size] = [2], got [3]": lambda m: listed(m, seq_lens=torch.ones(3).int()),
    "expected r, or threshold or seq_lens, got none of them": lambda m: tokred.bipartite_match(m),
    f"expected r in [0, 4], {BAD_R} 7": lambda m: tokred.bipartite_match(m, 7, threshold=0.5),
    f"expected r in [0, 4], {BAD_R} 5": lambda m: tokred.bipartite_match(m, 5),
    f"expected r in [0, 4], {BAD_R} -1": lambda m: tokred.bipartite_match(m, -1),
    f"expected r in [0, 3], {BAD_R} 4": lambda m: tokred.bipartite_match(m, 4, num_protected=1),
    f"expected r in [0, 0], {BAD_R} 1": lambda m: tokred.bipartite_match(m, 1, num_protected=6),
    "expected num_protected in [0, 7], got 8": lambda m: tokred.bipartite_match(m, 0, num_protected=8),
    "expected num_protected in [0, 7], got -1": lambda m: tokred.bipartite_match(m, 0, num_protected=-1),
    "expected metric of shape [batch_size, num_tokens, dim], got [7, 4]": lambda m: tokred.bipartite_match(m[0], 1),
    "expected metric of dtype float32, float16 or bfloat16, got float64": lambda m: tokred.bipartite_match(
        m.double(), 1
    ),
    "expected metric contiguous in its last dimension, got strides [28, 1, 7]": (
        lambda m: tokred.bipartite_match(m.transpose(1, 2).contiguous().transpose(1, 2), 1)
    ),
    'expected order "index", "grouped" or "score", got "size"': lambda m: tokred.bipartite_match(m, 1, order="size"),
    "expected eps >= 0, got -1": lambda m: tokred.bipartite_match(m, 1, eps=-1.0),
    "expected protect of dtype bool, got float32": lambda m: tokred.bipartite_match(
        m, 1, protect=m[:, :, 0].contiguous()
    ),
    "expected protect of shape [batch_size, num_tokens] = [2, 7], got [2, 4]": (
        lambda m: tokred.bipartite_match(m, 1, protect=m[:, :4, 0].contiguous() > 0)
    ),
    "expected protect contiguous, got strides [0, 1]": (
        lambda m: tokred.bipartite_match(m, 1, protect=(m[:1, :, 0] > 0).expand(2, 7))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 7, 4, device=device))
    assert f"bipartite_match: {message}" in str(caught.value)
