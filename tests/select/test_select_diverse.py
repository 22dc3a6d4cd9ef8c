# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.select.select_diverse")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    x = torch.empty(4, 576, 1024, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    weight = torch.empty(4, 576, device="meta")
    moved = 4 * 576 * 2048 + 4 * (64 * (8 + 4) + 4)  # tokens in; lists with values and counts out
    assert floor(x, 64) == (moved, 4 * 576 * 576 * 1024)  # all pairs, each once
    assert floor(x, 64, weight=weight) == (moved + 4 * 576 * 4, 2 * 4 * 576 * 64 * 1024)  # all tokens with the picks
    assert floor(x, 576, start="first")[1] == 4 * 576 * 576 * 1024  # never more than all pairs


RULES = ["max_min", "max_sum", "mmr"]
STARTS = ["farthest", "weight", "first"]


def similarities(x, metric):
    """[batch, n, n] in float64; NaN where a token has no direction or norm."""
    v = x.double().cpu()
    squares = v.square().sum(-1)
    if metric == "cosine":
        v = v / squares.sqrt().clamp_min(1e-12)[..., None]
        s = v @ v.transpose(1, 2)
    else:
        s = -torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist").square()
    bad = ~squares.isfinite()
    return s.masked_fill(bad[:, None] | bad[..., None], torch.nan)


def check(x, k, *, exact=False, atol=4e-6, **options):
    """Each pick against float64: it is not taken or dropped, and no free token's value is larger by more than rounding.

    exact: the inputs are small integers, so that the reference's picks and values must come out bit for bit.
    """
    kept_idx, num_kept, value = (
        t.cpu() for t in tokred.select_diverse(x, k, **options, order="score", return_num_kept=True, return_value=True)
    )
    assert kept_idx.dtype == torch.int64 and num_kept.dtype == torch.int32 and value.dtype == torch.float32
    double = {n: v.double() if n == "weight" and v is not None else v for n, v in options.items()}
    expected = reference(x.double(), k, **double, order="score", return_num_kept=True, return_value=True)
    assert_close(num_kept, expected[1].cpu())
    assert torch.equal(kept_idx < 0, expected[0].cpu() < 0) and torch.equal(
        kept_idx < 0, torch.arange(k) >= num_kept[:, None]
    )
    if exact:
        assert_close([kept_idx, value], [expected[0].cpu(), expected[2].float().cpu()], rtol=0, atol=0)
    drop = options.get("drop_mask")
    for b in range(x.shape[0]):
        picks = kept_idx[b, : num_kept[b]].tolist()
        assert len(set(picks)) == len(picks)
        assert drop is None or not drop[b].cpu()[picks].any()
    in_order = tokred.select_diverse(x, k, **options, return_num_kept=True, return_value=True)
    by_index = kept_idx.where(kept_idx >= 0, torch.iinfo(torch.int64).max).sort(1)
    assert_close(in_order[0].cpu(), kept_idx.gather(1, by_index.indices))
    assert_close(in_order[2].cpu(), value.gather(1, by_index.indices), rtol=0, atol=0)
    if not exact:
        follow(x, kept_idx, num_kept, value, atol=atol, **options)
    return kept_idx, num_kept, value


def follow(
    x, kept_idx, num_kept, value, *, atol, rule="max_min", metric="cosine", start=None, weight=None, lam=0.5,
    positions=None, position_weight=0.5, picks_per_step=1, drop_mask=None,
):  # fmt: skip
    """Replay the picks with float64 similarities: each must be within rounding of the best value at its turn."""
    start = ("farthest" if weight is None else "weight") if start is None else start
    batch_size, num_tokens, _ = x.shape
    every, base = similarities(x, metric), 1.0 if metric == "cosine" else 0.0
    for b in range(batch_size):
        s, w = every[b], None if weight is None else weight[b].double().cpu()
        free = torch.ones(num_tokens, dtype=torch.bool) if drop_mask is None else ~drop_mask[b].cpu()
        bad = s.diagonal().isnan()
        xyz = None if positions is None else positions[b].double().cpu()
        if xyz is not None:
            bad |= ~xyz.isfinite().all(-1)
        placed = free & ~bad
        share = 1.0 if xyz is None else 1.0 - position_weight
        picks = kept_idx[b, : num_kept[b]].tolist()
        # Rounding of a similarity, of as many as are summed, times what a weight makes of it.
        size = 1.0 if metric == "cosine" else float(every[b].nan_to_num().abs().max())
        size *= 1.0 if w is None else max(float(w.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1.0)
        first = picks_per_step if isinstance(start, str) and start == "weight" else 1
        done = 0  # picks that count
        for i, pick in enumerate(picks):
            if i >= first and (i - first) % picks_per_step == 0:
                done = i
            if done == 0 and not isinstance(start, str):
                best = torch.full((num_tokens,), torch.inf, dtype=torch.float64)
                inside = 0 <= int(start[b]) < num_tokens and (drop_mask is None or not drop_mask[b, int(start[b])])
                if inside:
                    assert pick == int(start[b])
            elif done == 0 and start == "farthest":
                others = s[:, free & ~bad].masked_fill(
                    torch.eye(num_tokens, dtype=torch.bool)[:, free & ~bad], torch.nan
                )
                best = (
                    base - others.nan_to_num(-torch.inf).amax(1)
                    if others.shape[1]
                    else torch.full_like(s[0], torch.inf)
                )
            elif done == 0:
                best = w if start == "weight" else torch.full((num_tokens,), torch.inf, dtype=torch.float64)
            else:
                rows = share * s[picks[:done]]
                if xyz is not None:
                    distance = torch.stack([(xyz - xyz[p]).norm(dim=-1) for p in picks[:done]])
                    spread = (xyz - xyz[picks[0]]).norm(dim=-1)[placed].max()
                    rows = rows - (position_weight * distance / spread if spread > 0 else 0.0)
                rows = rows.nan_to_num(0.0 if rule == "max_sum" else -torch.inf)
                state = rows.sum(0) if rule == "max_sum" else rows.amax(0)
                if rule == "mmr":
                    best = lam * w - (1 - lam) * state
                elif rule == "max_sum":
                    best = -state
                else:
                    best = (share * base - state) * (1.0 if w is None else w)
            best = best.masked_fill(bad, torch.nan)
            numbers = free & ~best.isnan()
            if numbers.any():
                allowed = atol * size * max(done, 1)
                top = float(best[numbers].max())
                assert not best[pick].isnan() and (best[pick] == top or best[pick] >= top - 2 * allowed), (b, i)
                assert value[b, i] == best[pick].float() or abs(value[b, i] - best[pick]) <= 2 * allowed, (b, i)
            else:
                assert value[b, i].isnan() and pick == int(free.nonzero()[0])
            free[pick] = False


def make(batch_size, num_tokens, dim, dtype=torch.float32, device="cpu"):
    x = torch.randn(batch_size, num_tokens, dim).to(device, dtype)
    return (
        x,
        torch.rand(batch_size, num_tokens).to(device, dtype),
        torch.randn(batch_size, num_tokens, 3, device=device),
    )


def planted(batch_size, num_tokens, dim, dtype, device):
    """Small integers: squared distances are exact, and most of them tie."""
    return torch.randint(-2, 3, (batch_size, num_tokens, dim)).to(device, dtype)


# Around a warp, the rows and columns of a CUDA tile, the CPU's tiles of 160 and strips of 32; then ViTs.
SIZES = [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 161, 197, 257, 325, 577]


@pytest.mark.parametrize("num_tokens", SIZES)
def test_sizes(device, num_tokens, dtype, simt):
    if simt and num_tokens > 130 and (num_tokens > 260 or dtype == torch.float16):
        return
    x, weight, _ = make(2, num_tokens, 24, dtype, device)
    for i, (rule, start) in enumerate(itertools.product(RULES, STARTS)):
        if num_tokens > 40 and (i + num_tokens) % (5 if simt else 3):  # other rules for each size
            continue
        k = [min(num_tokens, 7), num_tokens // 2, num_tokens][i % 3] if num_tokens < 60 else 20
        check(x, k, rule=rule, start=start, weight=weight if rule == "mmr" or start == "weight" else None)


# One element, around a 16-byte load, a k step of 32 floats or 64 halves, several steps, longer than the pipeline.
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 72, 96, 128, 200, 320, 513])
def test_dims(device, dim, dtype):
    x, weight, _ = make(2, 77, dim, dtype, device)
    check(x, 12)
    check(x, 12, rule="mmr", weight=weight)
    check(x, 12, metric="l2", start="first")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_options(device, rule, metric, simt):
    """Every start with every extra, on two sizes."""
    for num_tokens in (70,) if simt else (20, 170):
        x, weight, positions = make(2, num_tokens, 16, device=device)
        drop = torch.rand(2, num_tokens, device=device) < 0.4
        starts = [*STARTS, torch.tensor([3, num_tokens - 1], device=device)]
        for i, (start, picks) in enumerate(itertools.product(starts, (1, 3))):
            options = {"rule": rule, "metric": metric, "start": start, "weight": weight, "picks_per_step": picks}
            check(x, 14, **options, lam=0.3, drop_mask=drop if i % 2 else None)
            check(x, 14, **options, positions=positions, position_weight=0.7, drop_mask=drop if not i % 2 else None)
    check(x, 9, rule=rule, metric=metric, start="first", weight=weight, picks_per_step=100)


@pytest.mark.parametrize("num_tokens", [5, 70, 300])
def test_exact_ties(device, num_tokens, dtype, simt):
    if simt and num_tokens == 300 and dtype != torch.float32:
        return
    x = planted(2, num_tokens, 4, dtype, device)
    weight = torch.randint(0, 4, (2, num_tokens)).to(device, dtype)
    k = min(num_tokens, 40)
    for i, (rule, start, picks) in enumerate(itertools.product(RULES, STARTS, (1, 4))):
        if not simt or i % 3 == 0:
            check(x, k, exact=True, rule=rule, metric="l2", start=start, weight=weight, picks_per_step=picks)
    # All the same: nothing but indices decide. Values of max_min are exactly 0.
    same = torch.ones(1, num_tokens, 40, device=device, dtype=dtype)
    kept_idx, _, value = check(same, k, exact=True, metric="l2")
    assert kept_idx[0].tolist() == list(range(k)) and (value == 0).all()
    # Duplicates are picked after everything else, lowest index first.
    twice = torch.eye(8, device=device, dtype=dtype).repeat(1, 2)[None].repeat(1, 2, 1)
    assert tokred.select_diverse(twice, 16, order="score", start="first").tolist() == [list(range(16))]


def test_prefix_property(device, simt):
    """The first picks do not depend on k, bit for bit, also where rows are made as they are needed."""
    for num_tokens in (40, 200) if simt else (40, 400):
        x, weight, positions = make(1, num_tokens, 48, device=device)
        for rule, start, picks in itertools.product(RULES, STARTS, (1, 3)):
            options = {"rule": rule, "start": start, "weight": weight, "picks_per_step": picks, "positions": positions}
            longest = tokred.select_diverse(x, num_tokens, **options, order="score", return_value=True)
            assert longest[0][0].sort().values.tolist() == list(range(num_tokens))
            for k in (1, 2, 9, num_tokens // 3):
                shorter = tokred.select_diverse(x, k, **options, order="score", return_value=True)
                assert_close(shorter, [t[:, :k] for t in longest], rtol=0, atol=0)


def test_max_min_values_fall(device):
    """The distances at which max_min picks can only fall (after the first, which is a distance of another kind)."""
    x = torch.randn(3, 150, 8, device=device)
    for metric in ("cosine", "l2"):
        _, value = tokred.select_diverse(x, 150, metric=metric, start="first", order="score", return_value=True)
        assert (value[:, 1:-1] >= value[:, 2:]).all()


def test_mmr_limits(device):
    """All weight: the top-k. No weight: the farthest points, from the same start."""
    x, weight, _ = make(2, 90, 16, device=device)
    kept_idx = tokred.select_diverse(x, 30, rule="mmr", weight=weight, lam=1.0, order="score")
    assert_close(kept_idx, weight.topk(30).indices)
    start = torch.tensor([5, 7], device=device)
    apart = tokred.select_diverse(x, 30, rule="mmr", weight=weight, lam=0.0, start=start, order="score")
    assert_close(apart, tokred.select_diverse(x, 30, start=start, order="score"))


@pytest.mark.parametrize("num_tokens", [6, 151])
def test_nan_inf_zero(device, num_tokens, dtype, simt):
    x, weight, positions = make(4, num_tokens, 20, device=device)
    x[0, ::3] = 0  # cosine 0 to everything
    x[1, 2, 3] = float("nan")
    x[1, 3, 5] = float("inf")
    x[2] = float("nan")
    x[3] = 0
    weight[1, 1] = float("nan")
    weight[1, 4] = -float("inf")
    weight[1, 5] = float("inf")
    positions[1, 0, 1] = float("nan")
    x, weight = x.to(dtype), weight.to(dtype)
    k = min(num_tokens, 25)
    for rule, start in itertools.product(RULES, STARTS):
        kept_idx, _, value = check(
            x, k, rule=rule, start=start, weight=weight if rule == "mmr" else weight.nan_to_num(0, 1, 0)
        )
        assert kept_idx[2].tolist() == list(range(k)) and value[2].isnan().all()
    for rule in RULES:
        order = tokred.select_diverse(
            x, num_tokens, rule=rule, start="first", weight=weight, order="score", positions=positions
        )
        assert order[1].sort().values.tolist() == list(range(num_tokens))
        assert order[1, 0] == 1 and order[1, -3:].tolist() == [0, 2, 3]  # nobody looks at the weight of a first index
    weighted = tokred.select_diverse(x, num_tokens, weight=weight, order="score", positions=positions)
    assert weighted[1, 0] == 5 and weighted[1, -4:].tolist() == [0, 1, 2, 3]


def test_a_nan_pick_leaves_the_others(device):
    x = torch.randn(1, 40, 8, device=device)
    x[0, 0] = float("nan")
    start = torch.zeros(1, dtype=torch.int64, device=device)
    for rule in RULES:
        weight = torch.rand(1, 40, device=device)
        picks = tokred.select_diverse(x, 10, rule=rule, weight=weight, start=start, order="score", return_value=True)
        assert picks[0][0, 0] == 0 and picks[1][0, 0].isnan()
        # Without a similarity to anything all values are equal: the lowest index is next, and then it goes on as ever.
        rest = tokred.select_diverse(x[:, 1:], 9, rule=rule, weight=weight[:, 1:], start="first", order="score")
        assert_close(picks[0][:, 1:], rest + 1)


def test_start_indices(device):
    """Outside of the sequence, or dropped: the first token that may be picked."""
    x = torch.randn(6, 9, 4, device=device)
    drop = torch.zeros(6, 9, dtype=torch.bool, device=device)
    drop[:, 0] = True
    drop[3, 5] = True
    for dtype in (torch.int64, torch.int32):
        start = torch.tensor([4, -1, 9, 5, -(2**31), 0], device=device, dtype=dtype)
        kept_idx = tokred.select_diverse(x, 3, start=start, drop_mask=drop, order="score")
        assert kept_idx[:, 0].tolist() == [4, 1, 1, 1, 1, 1]


def test_drop_mask(device):
    """Dropped tokens are as good as absent, also as neighbours; fewer than k left pad with -1."""
    x, weight, positions = make(2, 50, 12, device=device)
    drop = torch.rand(2, 50, device=device) < 0.5
    drop[1] = False
    drop[1, ::2] = True
    for rule, start in itertools.product(RULES, STARTS):
        options = {"rule": rule, "start": start, "order": "score", "return_value": True}
        kept_idx, value = tokred.select_diverse(x, 50, weight=weight, positions=positions, drop_mask=drop, **options)
        for b in range(2):
            rest = (~drop[b]).nonzero()[:, 0]
            count = len(rest)
            alone = tokred.select_diverse(
                x[b : b + 1, rest],
                count,
                weight=weight[b : b + 1, rest],
                positions=positions[b : b + 1, rest],
                **options,
            )
            assert_close(kept_idx[b, :count], rest[alone[0][0]])
            assert_close(value[b, :count], alone[1][0], rtol=1e-5, atol=1e-5)
            assert (kept_idx[b, count:] == -1).all() and (value[b, count:] == -torch.inf).all()
    assert (tokred.select_diverse(x, 5, drop_mask=torch.ones_like(drop)) == -1).all()


@pytest.mark.parametrize("order", ["index", "score"])
def test_packed_equals_dense(device, dtype, order):
    lens = [30, 0, 7, 64, 1, 129]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, weight, positions = (t[0] for t in make(1, sum(lens), 40, dtype, device))
    drop = torch.rand(sum(lens), device=device) < 0.1
    for rule, start in itertools.product(RULES, [*STARTS, torch.tensor([4, 0, 6, 99, 0, 3], device=device)]):
        options = {"rule": rule, "order": order, "return_value": True, "return_num_kept": True}
        given = isinstance(start, torch.Tensor)
        packed = tokred.select_diverse(
            x, 20, weight=weight, positions=positions, drop_mask=drop, cu_seqlens=cu_seqlens, max_seqlen=129, start=start,
            **options,
        )  # fmt: skip
        for b, (begin, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
            k, part = min(20, length), slice(begin, begin + length)
            alone = tokred.select_diverse(
                x[None, part], k, weight=weight[None, part], positions=positions[None, part],
                drop_mask=drop[None, part].contiguous(), start=start[b : b + 1] if given else start, **options,
            )  # fmt: skip
            assert_close([packed[0][b, :k], packed[1][b], packed[2][b, :k]], [t[0] for t in alone], rtol=0, atol=0)
            assert (packed[0][b, k:] == -1).all() and (packed[2][b, k:] == -torch.inf).all()


def test_bad_cu_seqlens_reads_nothing_out_of_bounds(device):
    x = torch.randn(20, 8, device=device)
    for ends in ([-5, 30, 12], [0, 50, 3], [25, 40, -1]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        kept_idx, num_kept = tokred.select_diverse(x, 20, cu_seqlens=cu_seqlens)
        assert ((kept_idx >= -1) & (kept_idx < 20)).all() and ((num_kept >= 0) & (num_kept <= 20)).all()
    kept_idx, num_kept = tokred.select_diverse(
        x, 20, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32, device=device), max_seqlen=7
    )
    assert num_kept.tolist() == [7] and kept_idx[0, :7].tolist() == list(range(7))


def test_views(device, dtype):
    base = torch.randn(2, 80, 60).to(device, dtype)
    weight = torch.rand(2, 81).to(device, dtype)
    for view in (
        base[:, :, 1:34],  # misaligned
        base[:, :, :32],
        base[:, 1::3],
        base.transpose(0, 1).contiguous().transpose(0, 1),
        base[:1].expand(3, 80, 60),
        base[:, :1].expand(2, 50, 60),
    ):
        picks = tokred.select_diverse(view, 9, order="score", return_value=True)
        assert_close(picks, tokred.select_diverse(view.contiguous(), 9, order="score", return_value=True))
    # The weights of [CLS] attention without [CLS] itself.
    assert_close(
        tokred.select_diverse(base, 9, rule="mmr", weight=weight[:, 1:]),
        tokred.select_diverse(base, 9, rule="mmr", weight=weight[:, 1:].contiguous()),
    )


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**32, dtype=torch.float16, device=device)
    x = base.as_strided((3, 5, 8), (700, 2**30 - 707, 1))
    x.copy_(torch.randn(3, 5, 8))
    check(x, 4)
    x = base.as_strided((2, 33, 8), (2**31 + 8, 16, 1))
    x.copy_(torch.randn(2, 33, 8))
    check(x, 9, rule="max_sum", start="first")


@given(st.data())
def test_any_call(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens = data.draw(st.integers(0, 80))
    batch_size, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = planted(batch_size, num_tokens, dim, torch.float32, device)
    drop = torch.rand(batch_size, num_tokens, device=device) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    start_idx = torch.randint(-1, num_tokens + 1, (batch_size,), device=device)
    check(
        x,
        data.draw(st.integers(0, num_tokens)),
        exact=True,
        metric="l2",
        rule=data.draw(st.sampled_from(RULES)),
        start=data.draw(st.sampled_from([*STARTS, start_idx])),
        weight=torch.randint(-3, 4, (batch_size, num_tokens), device=device).float(),
        lam=data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        drop_mask=data.draw(st.sampled_from([None, drop])),
        picks_per_step=data.draw(st.integers(1, 5)),
    )


@pytest.mark.parametrize("shape", [(5, 130, 24), (2, 500, 64)])
def test_row_is_independent_of_its_batch(device, threads, dtype, shape, simt):
    if simt and shape[1] > 300:
        return
    x, weight, positions = make(*shape, dtype, device)
    options = {"order": "score", "return_value": True}

    def all_rules():
        return [
            tokred.select_diverse(x, 40, rule=rule, start=start, weight=weight, positions=positions, **options)
            for rule, start in zip(RULES, STARTS)
        ]

    alone = []
    for rule, start in zip(RULES, STARTS):
        rows = []
        for b in range(shape[0]):
            part = {"weight": weight[b : b + 1], "positions": positions[b : b + 1]}
            rows.append(tokred.select_diverse(x[b : b + 1], 40, rule=rule, start=start, **part, **options))
        alone.append([torch.cat(column) for column in zip(*rows)])
    for result in threads(all_rules):
        assert_close(result, alone, rtol=0, atol=0)


def test_threads_on_one_sequence(device, threads, simt):
    x, weight, _ = make(1, 100 if simt else 700, 64, device=device)
    for options in ({}, {"rule": "mmr", "weight": weight}):
        first, *rest = threads(
            lambda options=options: tokred.select_diverse(x, 50, order="score", return_value=True, **options)
        )
        for other in rest:
            assert_close(other, first, rtol=0, atol=0)


def test_empty(device):
    for shape in ((0, 7, 4), (2, 0, 4), (2, 1, 4), (2, 7, 0), (0, 0, 0)):
        x = torch.randn(*shape, device=device)
        for k in {0, min(shape[1], 3)}:
            kept_idx, num_kept = tokred.select_diverse(x, k, return_num_kept=True)
            assert kept_idx.shape == (shape[0], k) and (num_kept == k).all()
            assert (kept_idx == torch.arange(k, device=device)).all()  # no features: all tokens are alike
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    assert tokred.select_diverse(x.new_zeros(0, 4), 3, cu_seqlens=nothing)[0].shape == (0, 3)
    twice = torch.zeros(3, dtype=torch.int32, device=device)
    assert (tokred.select_diverse(x.new_zeros(0, 4), 3, cu_seqlens=twice)[0] == -1).all()


@pytest.mark.parametrize("rule", RULES)
def test_long(device, rule, simt):
    """More tokens than similarities are kept for: rows are made when picked, and not kept on CUDA."""
    num_tokens = 4100 if simt else 4500
    x = torch.randint(-2, 3, (2, num_tokens, 3), device=device).float()
    weight = torch.randint(0, 5, (2, num_tokens), device=device).float()
    ends = torch.tensor([0, num_tokens, 2 * num_tokens - 300], dtype=torch.int32, device=device)
    for start, picks in (("weight", 2),) if simt else (("weight", 2), ("first", 1), ("farthest", 1)):
        check(
            x[:1],
            10 if simt else 40,
            exact=True,
            metric="l2",
            rule=rule,
            start=start,
            weight=weight[:1],
            picks_per_step=picks,
        )
    options = {"rule": rule, "metric": "l2", "start": "first", "weight": weight.flatten(), "order": "score"}
    k = 5 if simt else 30
    packed = tokred.select_diverse(x.flatten(0, 1), k, cu_seqlens=ends, max_seqlen=num_tokens, **options)
    for b in range(2):
        alone = tokred.select_diverse(
            x[b : b + 1, : ends[b + 1] - ends[b]],
            k,
            **options | {"weight": weight[b : b + 1, : ends[b + 1] - ends[b]]},
        )
        assert_close(packed[0][b], alone[0])


def test_long_farthest(device, simt):
    num_tokens = 4100
    x = torch.randint(-2, 3, (1, num_tokens, 3), device=device).float()
    x[0, 777] = torch.tensor([9.0, 0, 0])
    x[0, 4099] = torch.tensor([0, 9.0, 0])
    kept_idx, value = tokred.select_diverse(x, 3, metric="l2", order="score", return_value=True)
    assert kept_idx[0, :2].tolist() == [777, 4099] and value[0, 0] == 49 and value[0, 1] == 162


def test_middle_length(device):
    """Four tokens a thread on CUDA."""
    x = torch.randint(-2, 3, (1, 1500, 3), device=device).float()
    check(x, 25, exact=True, metric="l2")


def test_backward_raises(device):
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    kept_idx, value = tokred.select_diverse(x, 2, return_value=True)
    assert not kept_idx.requires_grad
    with pytest.raises(
        RuntimeError, match="select_diverse: has no gradient; gather by its kept_idx with gather_tokens"
    ):
        value.sum().backward()
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32, device=device)
    _, _, value = tokred.select_diverse(x[0], 2, cu_seqlens=cu_seqlens, return_value=True)
    with pytest.raises(RuntimeError, match="select_diverse: has no gradient"):
        value.sum().backward()


def test_vmap(device):
    x, weight = torch.randn(2, 11, 3, 4, device=device), torch.rand(3, 2, 11, device=device)
    mapped = torch.vmap(lambda a, w: tokred.select_diverse(a, 5, rule="mmr", weight=w), in_dims=(2, 0))(x, weight)
    for i in range(3):
        alone = tokred.select_diverse(x[:, :, i].contiguous(), 5, rule="mmr", weight=weight[i])
        assert_close(mapped[i], alone)


def test_autocast_leaves_x_alone(device):
    x = torch.randn(2, 50, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokred.select_diverse(x, 9, return_value=True)
    assert_close(inside, tokred.select_diverse(x, 9, return_value=True), rtol=0, atol=0)


def test_few_compilations_over_k(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, k: tokred.select_diverse(x, k), fullgraph=True, backend=counter)
    x = torch.randn(2, 40, 8, device=device)
    for k in (5, 9, 2, 17, 40):
        assert_close(compiled(x, k), tokred.select_diverse(x, k))
    assert counter.frame_count <= 2


def packed_call(x, **options):
    return tokred.select_diverse(x[0], 2, **options)


ENDS = torch.tensor([0, 3, 7], dtype=torch.int32)
ERRORS = {
    "expected k in [0, 7], got 8": lambda x: tokred.select_diverse(x, 8),
    "expected k in [0, 7], got -1": lambda x: tokred.select_diverse(x, -1),
    "expected k >= 0, got -1": lambda x: tokred.select_diverse(x[0], -1, cu_seqlens=ENDS.to(x.device)),
    "expected x of shape [batch_size, num_tokens, dim], got [7, 4]": lambda x: tokred.select_diverse(x[0], 2),
    "expected x of shape [total_tokens, dim] (with cu_seqlens), got [2, 7, 4]": lambda x: tokred.select_diverse(
        x, 2, cu_seqlens=ENDS.to(x.device)
    ),
    "expected x of dtype float32, float16 or bfloat16, got float64": lambda x: tokred.select_diverse(x.double(), 2),
    "expected x contiguous in its last dimension, got strides [28, 1, 7]": lambda x: tokred.select_diverse(
        x.transpose(1, 2).contiguous().transpose(1, 2), 2
    ),
    'expected rule "max_min", "max_sum" or "mmr", got "best"': lambda x: tokred.select_diverse(x, 2, rule="best"),
    'expected metric "cosine" or "l2", got "dot"': lambda x: tokred.select_diverse(x, 2, metric="dot"),
    'expected start "farthest", "weight" or "first" (or start_idx), got "last"': lambda x: tokred.select_diverse(
        x, 2, start="last"
    ),
    'expected order "index" or "score", got "value"': lambda x: tokred.select_diverse(x, 2, order="value"),
    "expected lam in [0, 1], got 1.5": lambda x: tokred.select_diverse(x, 2, lam=1.5),
    "expected lam in [0, 1], got nan": lambda x: tokred.select_diverse(x, 2, lam=float("nan")),
    "expected position_weight in [0, 1], got -1": lambda x: tokred.select_diverse(x, 2, position_weight=-1.0),
    "expected picks_per_step >= 1, got 0": lambda x: tokred.select_diverse(x, 2, picks_per_step=0),
    'expected weight with rule "mmr", got none': lambda x: tokred.select_diverse(x, 2, rule="mmr"),
    'expected weight with start "weight", got none': lambda x: tokred.select_diverse(x, 2, start="weight"),
    "expected weight of shape [batch_size, num_tokens] = [2, 7], got [2, 6]": lambda x: tokred.select_diverse(
        x, 2, weight=x[:, 1:, 0].contiguous()
    ),
    "expected weight of dtype float32, float16 or bfloat16, got int64": lambda x: tokred.select_diverse(
        x, 2, weight=x[..., 0].long()
    ),
    "expected weight contiguous in its last dimension, got strides [28, 4]": lambda x: tokred.select_diverse(
        x, 2, weight=x[..., 0]
    ),
    "expected positions of dtype float32, got float16": lambda x: tokred.select_diverse(
        x, 2, positions=x[..., :3].half().contiguous()
    ),
    "expected positions of shape [batch_size, num_tokens, 3] = [2, 7, 3], got [2, 7, 2]": lambda x: (
        tokred.select_diverse(x, 2, positions=x[..., :2].contiguous())
    ),
    "expected positions contiguous, got strides [28, 4, 1]": lambda x: tokred.select_diverse(
        x, 2, positions=x[..., :3]
    ),
    "expected drop_mask of dtype bool, got float32": lambda x: tokred.select_diverse(
        x, 2, drop_mask=x[..., 0].contiguous()
    ),
    "expected drop_mask of shape [batch_size, num_tokens] = [2, 7], got [2, 4]": lambda x: tokred.select_diverse(
        x, 2, drop_mask=x[:, :4, 0].contiguous() > 0
    ),
    "expected drop_mask contiguous, got strides [0, 1]": lambda x: tokred.select_diverse(
        x, 2, drop_mask=(x[:1, :, 0] > 0).expand(2, 7)
    ),
    "expected start_idx of shape [batch_size] = [2], got [1]": lambda x: tokred.select_diverse(
        x, 2, start=torch.zeros(1, dtype=torch.int64, device=x.device)
    ),
    "expected start_idx of dtype int64 or int32, got float32": lambda x: tokred.select_diverse(x, 2, start=x[:, 0, 0]),
    "expected start_idx contiguous, got strides [0]": lambda x: tokred.select_diverse(
        x, 2, start=torch.zeros(1, dtype=torch.int64, device=x.device).expand(2)
    ),
    "expected cu_seqlens of shape [batch_size + 1], got [0]": lambda x: packed_call(
        x, cu_seqlens=ENDS[:0].to(x.device)
    ),
    "expected cu_seqlens of dtype int32, got int64": lambda x: packed_call(x, cu_seqlens=ENDS.long().to(x.device)),
    "expected max_seqlen in [0, 7], got 8": lambda x: packed_call(x, cu_seqlens=ENDS.to(x.device), max_seqlen=8),
    "expected weight of shape [total_tokens] = [7], got [6]": lambda x: packed_call(
        x, cu_seqlens=ENDS.to(x.device), weight=torch.zeros(6, device=x.device)
    ),
    "expected positions of shape [total_tokens, 3] = [7, 3], got [7, 4]": lambda x: packed_call(
        x, cu_seqlens=ENDS.to(x.device), positions=x[0]
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 7, 4, device=device))
    assert f"select_diverse: {message}" in str(caught.value)
