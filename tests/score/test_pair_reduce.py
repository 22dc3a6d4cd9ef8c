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

module = importlib.import_module("tokred.score.pair_reduce")
reference, floor = module.reference, module.floor

FUNCTIONS = [("mean", None), ("sum", None), ("count_above", 0.1), ("softmax_mean", 0.05), ("elu_margin", 0.3)]
FUNCTIONS += [("gauss", 0.4)]


def test_floor_by_hand():
    x = torch.empty(2, 300, 64, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    y = torch.empty(2, 500, 64, dtype=torch.bfloat16, device="meta")
    assert floor(x, y) == (2 * 800 * 128 + 2 * 300 * 4, 2 * 2 * 300 * 500 * 64)
    drop = torch.empty(500, dtype=torch.bool, device="meta")
    assert floor(x, y[0], "gauss", 1.0, drop_mask=drop) == (1100 * 128 + 500 + 2400, 2 * 2 * 300 * 500 * 64)
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    packed = {"cu_seqlens_x": cu, "cu_seqlens_y": cu}
    assert floor(x.view(600, 64), y.view(1000, 64), **packed) == (1600 * 128 + 40 + 2400, 2 * 600 * 250 * 64)


def draw(device, dtype, *shape):
    return torch.randn(*shape).to(device, dtype)


def whole(device, dtype, *shape):
    """Small integers: products and sums are exact."""
    return torch.randint(-2, 3, shape).to(device, dtype)


def check(x, y, fn, param, **options):
    """Against float64."""
    out = tokred.pair_reduce(x, y, fn, param, **options)
    assert out.dtype == torch.float32 and out.shape == x.shape[:-1]
    expected = reference(x.double(), y.double(), fn, param, **options)
    if fn == "count_above":  # a similarity within rounding of the threshold may fall on either side
        edge = 1e-5 * (1 if options.get("metric", "cosine") == "cosine" else x.shape[-1] * 9)
        low, high = (reference(x.double(), y.double(), fn, param + e, **options) for e in (edge, -edge))
        assert (out == out.round()).all() and (low <= out).all() and (out <= high).all()
        return out
    scale = 1.0
    if options.get("metric", "cosine") != "cosine":
        scale = max(1.0, max(v.double().norm(dim=-1).nan_to_num(0).max().item() for v in (x, y)) ** 2)
    if fn == "sum":
        scale *= max(y.shape[-2], 1)
    # Rounding of a similarity, 4e-6, passes through functions of slope up to about 1 / param (the softmax: spread / param).
    atol = 4e-6 * scale * max(1.0, 3 * scale / param if fn == "softmax_mean" else 1 / param if fn == "gauss" else 1.0)
    assert_close(out, expected.float(), rtol=1e-5, atol=atol)
    return out


@pytest.mark.parametrize(("fn", "param"), FUNCTIONS)
@pytest.mark.parametrize(("num_x", "num_y"), [(1, 1), (5, 16), (6, 33), (65, 127), (64, 129), (1, 300), (130, 257)])
def test_functions_and_sizes(device, dtype, num_x, num_y, fn, param, simt):
    if simt and num_x * num_y > 8000 and (dtype == torch.float16 or fn in ("sum", "gauss")):
        return
    check(draw(device, dtype, 2, num_x, 24), draw(device, dtype, 2, num_y, 24), fn, param)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 80, 128, 200, 513])
def test_dims(device, dtype, dim, simt):
    x, y = draw(device, dtype, 2, 37, dim), draw(device, dtype, 2, 45, dim)
    for metric in ["cosine", "dot", "l2"][dim % 3 :][: 1 if simt else 3]:
        check(x, y, "mean", None, metric=metric)


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_exact(device, dtype, metric):
    """Sums and counts of whole numbers, equal ones at the threshold among them."""
    x, y = whole(device, dtype, 2, 70, 6), whole(device, dtype, 2, 140, 6)
    drop = torch.rand(2, 140, device=device) < 0.5
    drop[1] = True  # nobody is left
    groups = {name: torch.randint(0, 3, (2, n), device=device) for name, n in (("x_group", 70), ("y_group", 140))}
    rules = [
        {},
        {"drop_mask": drop},
        {"exclude_self": True},
        groups,
        {"group_rule": "other", **groups},
        {"drop_mask": drop, "exclude_self": True, **{name: g.int() for name, g in groups.items()}},
    ]
    for rule in rules:
        for fn, param in (("sum", None), ("count_above", -4.0), ("mean", None)):
            actual = tokred.pair_reduce(x, y, fn, param, metric=metric, **rule)
            expected = reference(x.double(), y.double(), fn, param, metric=metric, **rule).float()
            assert_close(actual, expected, rtol=0, atol=0)
        check(x, y, "softmax_mean", 2.0, metric=metric, **rule)


def test_pitome_energy(device):
    """The mean over the Gram matrix of cosines, with itself: the formula, one pair after the other."""
    x = torch.randn(1, 20, 16, device=device)
    unit = (x[0] / x[0].norm(dim=1, keepdim=True)).double().tolist()
    margin = 0.75 - 0.75 * 3 / 12
    energy = []
    for a in unit:
        away = [sum(p * q for p, q in zip(a, b)) - margin for b in unit]
        energy.append(sum(z if z > 0 else math.exp(z) - 1 for z in away) / 20)
    assert_close(tokred.pair_reduce(x, x, "elu_margin", margin), torch.tensor([energy]), rtol=1e-5, atol=1e-5)


def test_flashvlm_text_relevance(device):
    """Softmax over words that are padded: padding has no part, whatever is in it."""
    patch, word = torch.randn(2, 30, 16, device=device), torch.randn(2, 9, 16, device=device)
    word[0, 6:] = torch.nan
    drop = torch.zeros(2, 9, dtype=torch.bool, device=device)
    drop[0, 6:] = True
    out = tokred.pair_reduce(patch, word, "softmax_mean", 0.05, drop_mask=drop)
    for b, n in ((0, 6), (1, 9)):
        s = torch.nn.functional.cosine_similarity(patch[b, :, None].double(), word[b, None, :n].double(), dim=-1)
        assert_close(out[b], (s * (s / 0.05).softmax(1)).sum(1).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fn", "param"), FUNCTIONS)
def test_zero_and_nan(device, dtype, fn, param):
    x, y = torch.randn(2, 10, 20), torch.randn(2, 40, 20)
    x[0, 2] = 0
    x[0, 1] = torch.nan
    y[1, 5] = torch.nan
    x, y = x.to(device, dtype), y.to(device, dtype)
    out = tokred.pair_reduce(x, y, fn, param)
    expected = reference(x.double(), y.double(), fn, param)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[0, 1].isnan().item() == (fn != "count_above") and out[1].isnan().all().item() == (fn != "count_above")
    check(x[:1, 2:], y[:1], fn, param)
    drop = torch.zeros(2, 40, dtype=torch.bool, device=device)
    drop[1, 5] = True
    check(x[1:], y[1:], fn, param, drop_mask=drop[1:])
    assert (tokred.pair_reduce(x, y, fn, param, drop_mask=torch.ones_like(drop)) == 0).all()


@pytest.mark.parametrize(("fn", "param"), [("mean", None), ("count_above", 3.0), ("softmax_mean", 5.0)])
def test_bank_of_many_rows(device, dtype, fn, param, simt):
    """Several shares, the last one short."""
    x, bank = whole(device, dtype, 2, 5, 4), whole(device, dtype, 2500 if simt else 90_000, 4)
    drop = torch.rand(len(bank), device=device) < 0.3
    check(x, bank, fn, param, metric="dot")
    check(x, bank, fn, param, metric="dot", drop_mask=drop)


@pytest.mark.parametrize(("fn", "param"), FUNCTIONS)
def test_packed(device, dtype, fn, param):
    lens_x, lens_y = [30, 0, 70, 64, 1, 5], [40, 9, 0, 130, 200, 2]
    cu_x, cu_y = (torch.tensor([0, *lens]).cumsum(0).int().to(device) for lens in (lens_x, lens_y))
    x, y = draw(device, dtype, sum(lens_x), 6), draw(device, dtype, sum(lens_y), 6)
    drop = torch.rand(sum(lens_y), device=device) < 0.3
    out = check(x, y, fn, param, exclude_self=True, drop_mask=drop, cu_seqlens_x=cu_x, cu_seqlens_y=cu_y)
    for b in range(6):  # the same as alone
        i, j = (slice(*c[b : b + 2].tolist()) for c in (cu_x, cu_y))
        alone = tokred.pair_reduce(x[i][None], y[j][None], fn, param, exclude_self=True, drop_mask=drop[j][None])
        assert_close(out[i], alone[0], rtol=0, atol=0)


def test_views(device, dtype):
    base, bank = draw(device, dtype, 2, 80, 60), draw(device, dtype, 90, 70)
    for x in (base[:, :, 1:34], base[:, 1::3, 5:38], base[:1, :, :33].expand(3, 80, 33)):
        check(x, bank[::2, 3:36], "mean", None)
        check(x, x.flip(1), "gauss", 0.5)


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**32, dtype=torch.float16, device=device)
    bank = base.as_strided((4, 8), (2**30 - 707, 1))
    bank.copy_(torch.randn(4, 8))
    check(draw(device, torch.float16, 2, 3, 8), bank, "mean", None)
    check(bank[None], bank, "gauss", 0.5)


@given(st.data())
def test_any_call(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch_size, num_x, num_y = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(0, 80)),
        data.draw(st.integers(0, 150)),
    )
    dim = data.draw(st.integers(0, 20))
    x, y = draw(device, torch.float32, batch_size, num_x, dim), draw(device, torch.float32, batch_size, num_y, dim)
    options = {"exclude_self": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["drop_mask"] = torch.rand(batch_size, num_y, device=device) < data.draw(st.sampled_from([0.1, 0.9]))
    if data.draw(st.booleans()):
        options["x_group"] = torch.randint(0, 3, (batch_size, num_x), device=device)
        options["y_group"] = torch.randint(0, 3, (batch_size, num_y), device=device)
        options["group_rule"] = data.draw(st.sampled_from(["same", "other"]))
    check(x, y, *data.draw(st.sampled_from(FUNCTIONS)), **options)


@pytest.mark.parametrize(("fn", "param"), FUNCTIONS)
def test_row_is_independent_of_its_batch(device, threads, dtype, fn, param, simt):
    """The same bits alone, in a batch, for few and many rows of x, and for any number of threads."""
    x, y = draw(device, dtype, 3, 20 if simt else 300, 40), draw(device, dtype, 3, 300 if simt else 4500, 40)
    alone = torch.cat([tokred.pair_reduce(x[b : b + 1], y[b : b + 1], fn, param) for b in range(3)])
    few = tokred.pair_reduce(x[:, :7], y, fn, param)
    for result in threads(lambda: tokred.pair_reduce(x, y, fn, param)):
        assert_close(result, alone, rtol=0, atol=0)
        assert_close(result[:, :7], few, rtol=0, atol=0)


def test_empty(device):
    for shape_x, shape_y in (
        ((0, 7, 4), (0, 5, 4)),
        ((2, 0, 4), (2, 5, 4)),
        ((2, 7, 4), (2, 0, 4)),
        ((2, 7, 4), (0, 4)),
    ):
        out = tokred.pair_reduce(torch.randn(shape_x, device=device), torch.randn(shape_y, device=device))
        assert out.shape == shape_x[:2] and (out == 0).all()
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    x = torch.randn(7, 4, device=device)
    assert (tokred.pair_reduce(x, x[:0], cu_seqlens_x=cu, cu_seqlens_y=none) == 0).all()


def test_bad_cu_seqlens_read_nothing_out_of_bounds(device):
    x, y = torch.randn(330, 4, device=device), torch.randn(320, 4, device=device)
    for ends in ([0, 250, 900], [-500, 100, 330], [0, 300, 100]):
        cu = torch.tensor(ends, dtype=torch.int32, device=device)
        tokred.pair_reduce(x, y, cu_seqlens_x=cu, cu_seqlens_y=cu)


def test_backward_raises(device):
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="pair_reduce: has no gradient; reduce the similarities in torch"):
        tokred.pair_reduce(x, x).sum().backward()


def test_vmap(device):
    x, y = torch.randn(2, 11, 3, 4, device=device), torch.randn(3, 2, 20, 4, device=device)
    drop = torch.rand(3, 2, 20, device=device) < 0.2
    mapped = torch.vmap(lambda a, b, d: tokred.pair_reduce(a, b, drop_mask=d), in_dims=(2, 0, 0))(x, y, drop)
    bank = torch.randn(30, 4, device=device)
    shared = torch.vmap(lambda a: tokred.pair_reduce(a, bank, "gauss", 0.5), in_dims=2)(x)
    for i in range(3):
        own = x[:, :, i].contiguous()
        assert_close(mapped[i], tokred.pair_reduce(own, y[i], drop_mask=drop[i]), rtol=0, atol=0)
        assert_close(shared[i], tokred.pair_reduce(own, bank, "gauss", 0.5), rtol=0, atol=0)


def test_autocast_leaves_inputs_alone(device):
    x = torch.randn(2, 50, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokred.pair_reduce(x, x)
    assert_close(inside, tokred.pair_reduce(x, x), rtol=0, atol=0)


reduce = tokred.pair_reduce
ERRORS = {  # what both ops check is in test_pair_topk.py
    "expected x of shape [batch_size, num_x, dim], got [7, 4]": lambda x, y: reduce(x[0], y),
    'expected fn "mean", "sum", "count_above", "softmax_mean", "elu_margin" or "gauss", got "max"': (
        lambda x, y: reduce(x, y, "max")
    ),
    'expected param with fn "gauss", got none': lambda x, y: reduce(x, y, "gauss"),
    'expected no param with fn "mean", got 2': lambda x, y: reduce(x, y, "mean", 2.0),
    'expected param > 0 with fn "softmax_mean", got 0': lambda x, y: reduce(x, y, "softmax_mean", 0.0),
    'expected param > 0 with fn "gauss", got -1': lambda x, y: reduce(x, y, "gauss", -1.0),
    "expected cu_seqlens_x and cu_seqlens_y, both or none, got cu_seqlens_x alone": (
        lambda x, y: reduce(x[0], y[0], cu_seqlens_x=torch.tensor([0, 7], dtype=torch.int32))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 7, 4), torch.randn(2, 5, 4))
    assert f"pair_reduce: {message}" in str(caught.value)
