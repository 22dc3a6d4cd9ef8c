# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.score.pair_topk")
reference, floor = module.reference, module.floor

METRICS = ["cosine", "dot", "l2"]


def test_floor_by_hand():
    x = torch.empty(2, 300, 64, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    y = torch.empty(2, 500, 64, dtype=torch.bfloat16, device="meta")
    written = 2 * 300 * 5 * 12
    assert floor(x, y, 5) == (2 * 800 * 128 + written, 2 * 2 * 300 * 500 * 64)
    bias = torch.empty(500, device="meta")
    assert floor(x, y[0], 5, bias=bias) == ((600 + 500) * 128 + 2000 + written, 2 * 2 * 300 * 500 * 64)
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    packed = (x.view(600, 64), y.view(1000, 64), 5)
    assert floor(*packed, cu_seqlens_x=cu, cu_seqlens_y=cu) == (1600 * 128 + 40 + written, 2 * 600 * 250 * 64)


def scale_of(x, y, metric):
    """What similarities are rounded relative to."""
    if metric == "cosine" or 0 in (x.numel(), y.numel()):
        return 1.0
    sizes = [v.double().norm(dim=-1).nan_to_num(0.0).max().item() for v in (x, y)]
    return sizes[0] * sizes[1] if metric == "dot" else sizes[0] ** 2 + sizes[1] ** 2


def as_double(options):
    return {name: v.double() if name == "bias" else v for name, v in options.items()}


def check(x, y, k, *, exact=False, metric="cosine", **options):
    """Against float64: exactly where similarities are exact, else values by rounding and indices by their similarity."""
    value, idx = tokred.pair_topk(x, y, k, metric=metric, **options)
    assert value.dtype == torch.float32 and idx.dtype == torch.int64
    assert value.shape == idx.shape == (*x.shape[:-1], k)
    expected, expected_idx = reference(x.double(), y.double(), k, metric=metric, **as_double(options))
    if exact:
        assert_close([value, idx], [expected.float(), expected_idx], rtol=0, atol=0)
        return value, idx
    # Sums of dim products in float32: dim * 2^-24 at the worst, about sqrt(dim) of that in truth.
    atol = 4e-6 * max(scale_of(x, y, metric), 1e-30)
    assert_close(value, expected.float(), rtol=1e-6, atol=atol)
    assert torch.equal(idx < 0, expected_idx < 0)
    assert (value[..., :-1] >= value[..., 1:])[~value[..., 1:].isnan()].all()
    assert all(len(set(row)) == len(row) for row in ([i for i in r if i >= 0] for r in idx.flatten(0, -2).tolist()))
    # What was found has, in float64, the similarity that it was found for.
    found = found_similarity(x, y, idx, metric, options)
    assert_close(found, value.double(), rtol=1e-6, atol=atol)
    return value, idx


def found_similarity(x, y, idx, metric, options):
    pair = importlib.import_module("tokred._pair")
    names = ("bias", "drop_mask", "x_group", "y_group", "cu_seqlens_x", "cu_seqlens_y")
    given_options = [options.get(name) for name in names]
    rule, apart = options.get("group_rule", "same"), options.get("exclude_self", False)
    rows, at, flat = [], 0, idx.flatten(0, -2)
    for part in pair.sequences(x.double(), y.double(), *given_options):
        similar, meets = pair.similarities(part, metric, rule, apart)
        similar = similar + (0 if part.bias is None else part.bias)
        own = flat[at : at + len(similar)]
        at += len(similar)
        assert (own < meets.shape[1]).all()
        if similar.shape[1]:
            assert (meets.gather(1, own.clamp_min(0)) | (own < 0)).all()
            rows.append(similar.gather(1, own.clamp_min(0)).masked_fill(own < 0, -torch.inf))
        else:
            rows.append(similar.new_full(own.shape, -torch.inf))
    assert at == len(flat)
    return torch.cat(rows).reshape(idx.shape) if rows else idx.double()


def whole(device, dtype, *shape):
    """Small integers: every product and sum is exact, and many similarities tie."""
    return torch.randint(-2, 3, shape).to(device, dtype)


def draw(device, dtype, *shape):
    return torch.randn(*shape).to(device, dtype)


# Around a warp, a tile of 64 rows or 128 others, the CPU's tiles of 6 x 16 or 6 x 32.
@pytest.mark.parametrize(
    ("num_x", "num_y"), [(1, 1), (5, 16), (6, 17), (31, 33), (65, 128), (64, 129), (1, 300), (130, 40), (200, 577)]
)
def test_sizes(device, dtype, num_x, num_y, simt):
    if simt and num_x * num_y > 10000:
        if dtype != torch.bfloat16:
            return
        num_x = 70
    x, y = draw(device, dtype, 2, num_x, 24), draw(device, dtype, 2, num_y, 24)
    for k in {1, min(7, num_y), min(32, num_y)}:
        for metric in METRICS[:1] if simt and k > 1 else METRICS:
            check(x, y, k, metric=metric)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 33, 40, 64, 65, 72, 80, 96, 128, 200, 320, 513])
def test_dims(device, dtype, dim, simt):
    x, y = draw(device, dtype, 2, 37, dim), draw(device, dtype, 2, 45, dim)
    for metric in METRICS[dim % 3 :][:1] if simt else METRICS:
        check(x, y, 3, metric=metric)
        check(x, y, 1, metric=metric)


@pytest.mark.parametrize("k", [1, 2, 5, 31, 32, 33, 64, 70, 150, 300])
def test_exact_ties(device, dtype, k, simt):
    """Longer lists than 32 take several passes on CUDA, and more than 64 have no shares on the CPU."""
    if simt and dtype == torch.float16 and k > 32:
        return
    x, y = whole(device, dtype, 2, 20, 5), whole(device, dtype, 2, 300, 5)
    for metric in ("dot", "l2"):
        check(x, y, k, metric=metric, exact=True)
    same = torch.ones(1, 70, 8, device=device, dtype=dtype)
    _, idx = tokred.pair_topk(same, same, min(k, 70))
    assert (idx == torch.arange(min(k, 70), device=device)).all()


def test_bank_of_many_rows(device, dtype, simt):
    """A bank that the batch shares, in shares of their own: several lists per row are merged."""
    num_y = 1300 if simt else 9000
    x, bank = whole(device, dtype, 2, 5, 4), whole(device, dtype, num_y, 4)
    bias = torch.randint(-3, 4, (num_y,), device=device).float()
    drop = torch.rand(num_y, device=device) < 0.3
    for k in (1, 5, 32, 40):
        value, idx = check(x, bank, k, metric="dot", exact=True)
        assert_close([value, idx], tokred.pair_topk(x, bank[None].expand(2, -1, -1), k, metric="dot"), rtol=0, atol=0)
        check(x, bank, k, metric="l2", bias=bias, drop_mask=drop, exact=True)
    check(draw(device, dtype, 1, 3, 33), draw(device, dtype, num_y, 33), 20)


def test_one_share_of_several_tiles(device):
    """So many batch entries that y is not shared out: later tiles bring few that enter a list, anywhere in it."""
    x, y = whole(device, torch.bfloat16, 270, 1, 4), whole(device, torch.bfloat16, 270, 400, 4)
    check(x, y, 25, metric="dot", exact=True)


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_who_meets_whom(device, dtype, metric, simt):
    x, y = whole(device, dtype, 2, 70, 6), whole(device, dtype, 2, 140, 6)
    bias = torch.randint(-9, 9, (2, 140), device=device).float()
    drop = torch.rand(2, 140, device=device) < 0.5
    drop[1, 3:] = True  # fewer are left than asked for
    x_group, y_group = (torch.randint(0, 4, (2, n), device=device) for n in (70, 140))
    groups = {"x_group": x_group, "y_group": y_group}
    for k in (1, 6) if simt else (1, 6, 40):
        check(x, y, k, metric=metric, bias=bias, exact=True)
        check(x, y, k, metric=metric, bias=bias, drop_mask=drop, exact=True)
        for rule in ("same", "other"):
            check(x, y, k, metric=metric, group_rule=rule, **groups, exact=True)
        check(x, y, k, metric=metric, exclude_self=True, exact=True)
        narrow = {name: group.int() for name, group in groups.items()}
        check(x, y, k, metric=metric, bias=bias, drop_mask=drop, exclude_self=True, **narrow, exact=True)
    none = torch.ones_like(drop)
    value, idx = tokred.pair_topk(x, y, 3, drop_mask=none)
    assert (idx == -1).all() and (value == -torch.inf).all()


def test_groups_are_whole_numbers_of_64_bits(device):
    """Equal in their lower half, they still differ; and what differs is found, whatever its value."""
    x, y = torch.ones(1, 1, 4, device=device), torch.ones(1, 3, 4, device=device)
    y[0, 1] = torch.nan
    x_group, y_group = torch.tensor([[5]], device=device), torch.tensor([[5 + 2**32, 5, 5 - 2**33]], device=device)
    options = {"x_group": x_group, "y_group": y_group}
    assert tokred.pair_topk(x, y, 3, **options)[1].tolist() == [[[1, -1, -1]]]
    assert tokred.pair_topk(x, y, 3, group_rule="other", **options)[1].tolist() == [[[0, 2, -1]]]
    assert tokred.pair_topk(x, y, 1, group_rule="other", **options)[1].tolist() == [[[0]]]


def test_centres_do_not_find_themselves(device):
    """Rows taken out of y, with their positions as groups (PruMerge's neighbours of centres)."""
    y = torch.randn(2, 50, 16, device=device)
    centre = torch.stack([torch.randperm(50)[:6] for _ in range(2)]).to(device)
    x = y.gather(1, centre[..., None].expand(-1, -1, 16))
    positions = torch.arange(50, device=device).expand(2, 50).contiguous()
    _, idx = check(x, y, 49, x_group=centre, y_group=positions, group_rule="other")
    assert not (idx == centre[..., None]).any() and (idx >= 0).all()
    assert (tokred.pair_topk(x, y, 1)[1][..., 0] == centre).all()


@pytest.mark.parametrize("k", [1, 4, 40])
def test_zero_nan_inf(device, dtype, k, simt):
    x, y = torch.randn(2, 66, 20), torch.randn(2, 150, 20)
    x[0, ::3] = 0  # similarity 0 to everything
    x[0, 1] = torch.nan
    y[0, ::2] = 0
    y[0, 5:9] = torch.nan
    y[1, 2:] = torch.nan  # found last, lowest index first
    x, y = x.to(device, dtype), y.to(device, dtype)
    drop = torch.zeros(2, 150, dtype=torch.bool, device=device)
    drop[:, [0, 3]] = True
    for metric in METRICS[:1] if simt and k == 40 else METRICS:
        check(x, y, k, metric=metric)
        check(x, y, k, metric=metric, drop_mask=drop, exclude_self=True)
    value, idx = tokred.pair_topk(x, y, k, drop_mask=drop)
    nan = idx[0, 1].tolist()
    assert nan == [i for i in range(150) if i not in (0, 3)][:k] and value[0, 1].isnan().all()
    bias = torch.full((2, 150), -torch.inf, device=device)  # a number, unlike a dropped row
    bias[:, 1] = torch.nan
    value, idx = tokred.pair_topk(torch.ones_like(x), torch.ones_like(y), 3, bias=bias)
    assert (idx == torch.tensor([0, 2, 3], device=device)).all() and (value == -torch.inf).all()
    assert (tokred.pair_topk(torch.ones_like(x), torch.ones_like(y), 1, bias=bias)[1] == 0).all()


def test_duplicates_are_nearest(device, dtype):
    """A row's distance to itself is rounding, never positive."""
    x = draw(device, dtype, 2, 90, 64)
    value, idx = tokred.pair_topk(x, x, 1, metric="l2")
    assert (idx[..., 0] == torch.arange(90, device=device)).all()
    assert (value <= 0).all() and (value > -1e-3).all()


def packed_case(device, dtype, lens_x, lens_y, dim=6):
    cu_x, cu_y = (torch.tensor([0, *lens]).cumsum(0).int().to(device) for lens in (lens_x, lens_y))
    x, y = whole(device, dtype, sum(lens_x), dim), whole(device, dtype, sum(lens_y), dim)
    return x, y, {"cu_seqlens_x": cu_x, "cu_seqlens_y": cu_y}


@pytest.mark.parametrize("k", [1, 3, 40])
def test_packed(device, dtype, k, simt):
    lens_x, lens_y = [30, 0, 70, 64, 1, 5], [40, 9, 0, 130, 200, 2]
    x, y, cu = packed_case(device, dtype, lens_x, lens_y)
    total = sum(lens_y)
    rules = {
        "bias": torch.randint(-3, 4, (total,), device=device).float(),
        "drop_mask": torch.rand(total, device=device) < 0.3,
        "x_group": torch.randint(0, 2, (sum(lens_x),), device=device),
        "y_group": torch.randint(0, 2, (total,), device=device),
    }
    check(x, y, k, metric="dot", **cu, exact=True)
    value, idx = check(x, y, k, metric="l2", exclude_self=True, **cu, **rules, exact=True)
    for b in range(6):  # the same as alone
        i, j = (slice(*c[b : b + 2].tolist()) for c in cu.values())
        if lens_y[b] >= k and lens_x[b]:
            own = {name: rule[i if name == "x_group" else j][None] for name, rule in rules.items()}
            alone = tokred.pair_topk(x[i][None], y[j][None], k, metric="l2", exclude_self=True, **own)
            assert_close([value[i], idx[i]], [t[0] for t in alone], rtol=0, atol=0)


def test_views(device, dtype):
    base = draw(device, dtype, 2, 80, 60)
    bank = draw(device, dtype, 90, 70)
    for x in (
        base[:, :, 1:34],  # misaligned
        base[:, :, :33],
        base[:, 1::3, 5:38],
        base.transpose(0, 1).contiguous().transpose(0, 1)[..., :33],
        base[:1, :, :33].expand(3, 80, 33),
        base[:, :1, :33].expand(2, 50, 33),
    ):
        check(x, bank[::2, 3:36], 4)
        check(x, x.flip(1), 1)


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**32, dtype=torch.float16, device=device)
    bank = base.as_strided((4, 8), (2**30 - 707, 1))
    bank.copy_(torch.randn(4, 8))
    x = draw(device, torch.float16, 2, 3, 8)
    check(x, bank, 2)
    check(bank[None], x[:1], 1)
    rows = base.as_strided((2, 33, 8), (2**31 + 8, 16, 1))
    rows.copy_(torch.randn(2, 33, 8))
    check(rows, rows, 3, exclude_self=True)


@given(st.data())
def test_any_call(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch_size, num_x, num_y = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(0, 80)),
        data.draw(st.integers(0, 150)),
    )
    dim, k = data.draw(st.integers(0, 20)), data.draw(st.integers(0, num_y))
    x, y = whole(device, torch.float32, batch_size, num_x, dim), whole(device, torch.float32, batch_size, num_y, dim)
    options = {"metric": data.draw(st.sampled_from(["dot", "l2"])), "exclude_self": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["drop_mask"] = torch.rand(batch_size, num_y, device=device) < data.draw(st.sampled_from([0.1, 0.9]))
    if data.draw(st.booleans()):
        options["x_group"] = torch.randint(0, 3, (batch_size, num_x), device=device)
        options["y_group"] = torch.randint(0, 3, (batch_size, num_y), device=device)
        options["group_rule"] = data.draw(st.sampled_from(["same", "other"]))
    check(x, y, k, exact=True, **options)


@pytest.mark.parametrize("k", [1, 9])
def test_row_is_independent_of_its_batch(device, threads, dtype, k, simt):
    """The same bits alone, in a batch, for few and many rows of x, and for any number of threads."""
    x, y = draw(device, dtype, 3, 40 if simt else 500, 40), draw(device, dtype, 3, 300 if simt else 1500, 40)
    alone = [torch.cat(t) for t in zip(*(tokred.pair_topk(x[b : b + 1], y[b : b + 1], k) for b in range(3)))]
    few = tokred.pair_topk(x[:, :7], y, k)
    for result in threads(lambda: tokred.pair_topk(x, y, k)):
        assert_close(result, alone, rtol=0, atol=0)
        assert_close([t[:, :7] for t in result], few, rtol=0, atol=0)


def test_empty(device):
    for shape_x, shape_y in (((0, 7, 4), (0, 5, 4)), ((2, 0, 4), (2, 5, 4)), ((0, 7, 4), (5, 4))):
        check(torch.randn(shape_x, device=device), torch.randn(shape_y, device=device), 2)
    x, y = torch.randn(2, 7, 4, device=device), torch.randn(2, 5, 4, device=device)
    check(x, y, 0)
    check(x, y[:, :0], 0)
    value, idx = tokred.pair_topk(x[:, :, :0], y[:, :, :0], 2)  # all similarities are 0
    assert (idx == torch.arange(2, device=device)).all() and (value == 0).all()
    cu = torch.zeros(3, dtype=torch.int32, device=device)
    value, idx = tokred.pair_topk(
        x[0], y[0, :0], 2, cu_seqlens_x=torch.tensor([0, 3, 7], dtype=torch.int32).to(device), cu_seqlens_y=cu
    )
    assert (idx == -1).all() and (value == -torch.inf).all()
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert tokred.pair_topk(x[0, :0], y[0, :0], 2, cu_seqlens_x=none, cu_seqlens_y=none)[1].shape == (0, 2)


def test_bad_cu_seqlens_read_nothing_out_of_bounds(device):
    x, y = torch.randn(330, 4, device=device), torch.randn(320, 4, device=device)
    for ends in ([0, 250, 900], [-500, 100, 330], [0, 300, 100]):
        cu = torch.tensor(ends, dtype=torch.int32, device=device)
        tokred.pair_topk(x, y, 3, cu_seqlens_x=cu, cu_seqlens_y=cu)


def test_backward_raises(device):
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    value, idx = tokred.pair_topk(x, x, 2)
    assert not idx.requires_grad
    with pytest.raises(RuntimeError, match="pair_topk: has no gradient; gather rows by its idx"):
        value.sum().backward()


def test_vmap(device):
    x, y = torch.randn(2, 11, 3, 4, device=device), torch.randn(3, 2, 20, 4, device=device)
    drop = torch.rand(3, 2, 20, device=device) < 0.2
    mapped = torch.vmap(lambda a, b, d: tokred.pair_topk(a, b, 3, drop_mask=d), in_dims=(2, 0, 0))(x, y, drop)
    bank, bias = torch.randn(30, 4, device=device), torch.randn(30, device=device)
    shared = torch.vmap(lambda a: tokred.pair_topk(a, bank, 3, bias=bias), in_dims=2)(x)
    for i in range(3):
        own = x[:, :, i].contiguous()
        assert_close([m[i] for m in mapped], tokred.pair_topk(own, y[i], 3, drop_mask=drop[i]), rtol=0, atol=0)
        assert_close([m[i] for m in shared], tokred.pair_topk(own, bank, 3, bias=bias), rtol=0, atol=0)
    cu = torch.tensor([0, 11], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="a packed input has no batch dimension"):
        torch.vmap(lambda a: tokred.pair_topk(a, a, 3, cu_seqlens_x=cu, cu_seqlens_y=cu))(x[:, :, 0].contiguous())


def test_autocast_leaves_inputs_alone(device):
    x = torch.randn(2, 50, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokred.pair_topk(x, x, 9)
    assert_close(inside, tokred.pair_topk(x, x, 9), rtol=0, atol=0)


def cu(*ends):
    return torch.tensor(ends, dtype=torch.int32)


topk = tokred.pair_topk
ERRORS = {
    "expected k in [0, 5], got 6": lambda x, y: topk(x, y, 6),
    "expected k in [0, 5], got -1": lambda x, y: topk(x, y, -1),
    "expected k >= 0, got -1": lambda x, y: topk(x[0], y[0], -1, cu_seqlens_x=cu(0, 7), cu_seqlens_y=cu(0, 5)),
    "expected x of shape [batch_size, num_x, dim], got [7, 4]": lambda x, y: topk(x[0], y, 1),
    "expected x of shape [total_x, dim] (with cu_seqlens_x), got [2, 7, 4]": (
        lambda x, y: topk(x, y, 1, cu_seqlens_x=cu(0, 7), cu_seqlens_y=cu(0, 5))
    ),
    "expected y of shape [batch_size, num_y, dim] or [num_y, dim], got [4]": lambda x, y: topk(x, y[0, 0], 1),
    "expected y of shape [total_y, dim] (with cu_seqlens_y), got [2, 5, 4]": (
        lambda x, y: topk(x[0], y, 1, cu_seqlens_x=cu(0, 7), cu_seqlens_y=cu(0, 5))
    ),
    "expected y with the batch_size and dim of x [2, 7, 4], got [1, 5, 4]": lambda x, y: topk(x, y[:1], 1),
    "expected y with the dim of x [2, 7, 4], got [5, 3]": lambda x, y: topk(x, y[0, :, :3], 1),
    "expected x of dtype float32, float16 or bfloat16, got float64": lambda x, y: topk(x.double(), y.double(), 1),
    "expected y of dtype float32, got float16": lambda x, y: topk(x, y.half(), 1),
    "expected x contiguous in its last dimension, got strides [28, 1, 7]": (
        lambda x, y: topk(x.transpose(1, 2).contiguous().transpose(1, 2), y, 1)
    ),
    "expected y contiguous in its last dimension, got strides [20, 1, 5]": (
        lambda x, y: topk(x, y.transpose(1, 2).contiguous().transpose(1, 2), 1)
    ),
    'expected metric "cosine", "dot" or "l2", got "l1"': lambda x, y: topk(x, y, 1, metric="l1"),
    'expected group_rule "same" or "other", got "all"': lambda x, y: topk(x, y, 1, group_rule="all"),
    "expected x_group and y_group, both or none, got x_group alone": (
        lambda x, y: topk(x, y, 1, x_group=torch.zeros(2, 7, dtype=torch.int64))
    ),
    "expected y_group of shape [batch_size, num_y] = [2, 5], got [2, 7]": (
        lambda x, y: topk(x, y, 1, x_group=torch.zeros(2, 7).long(), y_group=torch.zeros(2, 7).long())
    ),
    "expected x_group of dtype int64 or int32, got float32": (
        lambda x, y: topk(x, y, 1, x_group=torch.zeros(2, 7), y_group=torch.zeros(2, 5))
    ),
    "expected bias of dtype float32, got float16": lambda x, y: topk(x, y, 1, bias=torch.zeros(2, 5).half()),
    "expected bias of shape [num_y] = [5], got [2, 5]": lambda x, y: topk(x, y[0], 1, bias=torch.zeros(2, 5)),
    "expected bias contiguous, got strides [0, 1]": lambda x, y: topk(x, y, 1, bias=torch.zeros(1, 5).expand(2, 5)),
    "expected drop_mask of dtype bool, got float32": lambda x, y: topk(x, y, 1, drop_mask=torch.zeros(2, 5)),
    "expected drop_mask of shape [total_y] = [5], got [4]": (
        lambda x, y: topk(x[0], y[0], 1, drop_mask=torch.zeros(4) > 0, cu_seqlens_x=cu(0, 7), cu_seqlens_y=cu(0, 5))
    ),
    "expected cu_seqlens_x and cu_seqlens_y, both or none, got cu_seqlens_y alone": (
        lambda x, y: topk(x[0], y[0], 1, cu_seqlens_y=cu(0, 5))
    ),
    "expected cu_seqlens_x of dtype int32, got int64": (
        lambda x, y: topk(x[0], y[0], 1, cu_seqlens_x=cu(0, 7).long(), cu_seqlens_y=cu(0, 5))
    ),
    "expected cu_seqlens_y of shape [batch_size + 1] = [2], got [3]": (
        lambda x, y: topk(x[0], y[0], 1, cu_seqlens_x=cu(0, 7), cu_seqlens_y=cu(0, 2, 5))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 7, 4), torch.randn(2, 5, 4))
    assert f"pair_topk: {message}" in str(caught.value)
