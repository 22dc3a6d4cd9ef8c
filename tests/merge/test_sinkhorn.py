# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.merge.sinkhorn").reference
floor = importlib.import_module("tokred.merge.sinkhorn").floor


def test_floor_by_hand():
    cost = torch.empty(32, 603, 126, dtype=torch.bfloat16, device="meta")
    assert floor(cost) == (32 * 603 * 126 * (2 + 4) + 32 * 4, 0)
    masses = {"row_mass": torch.empty(32, 603, device="meta"), "col_mass": torch.empty(32, 126, device="meta")}
    assert floor(cost, **masses)[0] - floor(cost)[0] == 32 * (603 + 126) * 4


def masses(batch_size, num_rows, num_cols, device):
    rows, cols = torch.rand(batch_size, num_rows) + 0.05, torch.rand(batch_size, num_cols) + 0.05
    return {
        "row_mass": (rows / rows.sum(1, keepdim=True)).to(device),
        "col_mass": (cols / cols.sum(1, keepdim=True)).to(device),
    }


def check(cost, rtol=None, **options):
    """Against float64; rounding cost / eps in float32 shows in the plan, and rtol is that error."""
    plan, num_rounds = tokred.sinkhorn(cost, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    expected, rounds = reference(cost.double(), **wide)
    assert plan.dtype == torch.float32 and num_rounds.dtype == torch.int32
    eps = options.get("eps", 0.1)
    finite = cost.double().abs().where(cost.isfinite(), 0)
    rtol = 1e-5 + 1e-6 * float(finite.max() if finite.numel() else 0) / eps if rtol is None else rtol
    assert_close(plan, expected, rtol=rtol, atol=1e-8, name="plan")
    if options.get("tol") == 0:
        assert_close(num_rounds, rounds, name="num_rounds")
    return plan, num_rounds


SIZES = [
    (1, 1),
    (1, 7),
    (9, 1),
    (5, 15),
    (8, 16),
    (7, 17),
    (16, 31),
    (33, 32),
    (3, 100),
    (40, 126),
    (20, 128),
    (12, 129),
]


@pytest.mark.parametrize(("num_rows", "num_cols"), SIZES)
def test_sizes(device, num_rows, num_cols):
    cost = torch.rand(2, num_rows, num_cols, device=device) * 2
    check(cost, max_rounds=7, tol=0.0)
    check(cost, max_rounds=7, tol=0.0, eps=0.02, **masses(2, num_rows, num_cols, device))


def test_rows_beyond_shared_memory_and_several_column_passes(device, simt):
    """80 KiB of a kernel stay on the SM; columns come in passes of 128."""
    for num_rows, num_cols in ((173, 126), (75, 300)) if simt else ((603, 126), (700, 1030)):
        check(torch.rand(1, num_rows, num_cols, device=device), max_rounds=3, tol=0.0)


def test_dtypes(device, dtype):
    cost = (torch.rand(2, 19, 40, device=device) * 2).to(dtype)
    plan, _ = check(cost, max_rounds=9, tol=0.0)
    assert torch.equal(plan, tokred.sinkhorn(cost.float(), max_rounds=9, tol=0.0)[0])  # widened exactly


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 1.0, 1e6])
def test_small_and_large_eps(device, simt, eps):
    """Where exp(-cost / eps) is 0 for whole rows and columns; scalings that grow are absorbed many times."""
    cost = torch.rand(1, 24, 20, device=device) * 3
    cost[0, :, 3] += 50
    cost[0, 5] += 1000
    cost[0, :, :2] -= 7
    plan, _ = check(cost, eps=eps, max_rounds=100 if simt else 400, tol=0.0, rtol=1e-5 + 1e-4 / eps)
    assert_close(plan.sum(1), torch.full((1, 20), 0.05), rtol=1e-5, atol=0)


def test_scalings_that_drift_far(device):
    """A long way between two clusters of masses that fit badly: u and v move by e^4 a round, all in one direction."""
    cost = torch.full((1, 4, 4), 3.0)
    cost[0, :2, :2], cost[0, 2:, 2:] = 0.0, 0.0
    options = {"row_mass": torch.tensor([[0.5, 0.4, 0.04, 0.06]]), "col_mass": torch.tensor([[0.03, 0.07, 0.45, 0.45]])}
    options = {name: mass.to(device) for name, mass in options.items()}
    plan, _ = check(cost.to(device), eps=0.01, max_rounds=150, tol=0.0, rtol=1e-3, **options)
    assert_close(plan.sum(2), options["row_mass"], rtol=1e-4, atol=0)
    assert plan[0, :2, 2:].sum().sub(0.8).abs() < 1e-4  # only what must cross


def test_vanishing_eps_gives_the_assignment(device):
    """I9: a permutation that is cheapest for every row stays, however small eps is."""
    order = torch.randperm(33)
    cost = torch.rand(1, 33, 33) + 0.5
    cost[0, torch.arange(33), order] = torch.rand(33) * 0.1
    for eps in (1e-3, 1e-6, 1e-12, 1e-30):
        plan, rounds = tokred.sinkhorn(cost.to(device), eps=eps)
        assert_close(plan[0].cpu() * 33, torch.eye(33)[order], rtol=1e-5, atol=1e-5)
        assert rounds.item() == 2


def test_ends_when_rows_are_right(device):
    """Each problem by itself: after num_rounds its rows are off by less than tol, one round earlier they were not."""
    cost = torch.rand(4, 20, 30, device=device)
    cost[1] *= 4
    cost[2] = 1.0
    cost[3] *= 0.1
    tol = 1e-3
    plan, rounds = tokred.sinkhorn(cost, tol=tol)
    assert rounds[2] == 2 and rounds[1] > rounds[0] > rounds[3] > 1
    for b in range(4):
        off = [
            (tokred.sinkhorn(cost[b : b + 1], max_rounds=n, tol=0.0)[0].sum(2) - 1 / 20).abs().sum().item()
            for n in range(1, int(rounds[b]) + 1)
        ]
        assert (plan[b].sum(1) - 1 / 20).abs().sum() < tol
        assert off[-2] < tol, "the last round was started from rows that were already right, and found it"
        assert all(error >= tol for error in off[:-2])
        assert torch.equal(tokred.sinkhorn(cost[b : b + 1], max_rounds=int(rounds[b]), tol=0.0)[0][0], plan[b])
    assert tokred.sinkhorn(cost, max_rounds=2, tol=1e-9)[1].tolist() == [2] * 4


def test_rounds_of_the_released_code(device):
    """AOT: r = mu / (K c), c = nu / (K^T r) from ones, in float64."""
    cost = torch.rand(2, 30, 18, device=device) * 2
    kernel = (-cost.double() / 0.1).exp()
    for num_rounds in (1, 2, 5):
        c = torch.ones(2, 18, 1, dtype=torch.float64, device=device)
        for _ in range(num_rounds):
            r = 1 / 30 / (kernel @ c)
            c = 1 / 18 / (kernel.mT @ r)
        assert_close(tokred.sinkhorn(cost, max_rounds=num_rounds)[0], r * kernel * c.mT, rtol=1e-4, atol=1e-9)


def test_ragged(device):
    """A problem's bits do not depend on its padding, nor on what the padding holds."""
    sizes = [(20, 40), (3, 5), (1, 17), (20, 1), (0, 9), (8, 0), (19, 16)]
    cost = torch.full((len(sizes), 20, 40), float("nan"), device=device)
    given = masses(len(sizes), 20, 40, device)
    for b, (m, n) in enumerate(sizes):
        cost[b, :m, :n] = torch.rand(m, n, device=device)
        given["row_mass"][b, m:] = given["col_mass"][b, n:] = float("nan")
    lens = {
        "row_lens": torch.tensor([99, 3, 1, 20, -4, 8, 19], dtype=torch.int32, device=device),
        "col_lens": torch.tensor([2**31 - 1, 5, 17, 1, 9, -(2**31), 16], dtype=torch.int32, device=device),
    }
    for options in ({}, given):
        plan, rounds = check(cost, **options, **lens, max_rounds=9, tol=0.0)
        for b, (m, n) in enumerate(sizes):
            row = slice(b, b + 1)
            alone = {name: v[row, : (m if name == "row_mass" else n)].contiguous() for name, v in options.items()}
            one, one_rounds = tokred.sinkhorn(cost[row, :m, :n], **alone, max_rounds=9, tol=0.0)
            assert torch.equal(plan[row, :m, :n], one)
            assert plan[b, m:].abs().sum() == 0 and plan[b, :, n:].abs().sum() == 0
            assert rounds[b] == one_rounds[0] == (9 if m * n else 0)


def test_rows_and_columns_without_mass(device):
    cost = torch.rand(1, 6, 20, device=device)
    given = masses(1, 6, 20, device)
    given["row_mass"][0, [0, 4]] = 0.0
    given["col_mass"][0, [3, 19]] = 0.0
    plan, _ = check(cost, **given, max_rounds=20, tol=0.0)
    assert plan[0, [0, 4]].abs().sum() == 0 and plan[0, :, [3, 19]].abs().sum() == 0
    plan, _ = check(cost, row_mass=torch.zeros(1, 6, device=device), max_rounds=5, tol=0.0)
    assert plan.abs().sum() == 0


def test_masses_that_differ(device):
    """The columns get theirs, however many rounds drift."""
    cost, given = torch.rand(1, 9, 30, device=device), masses(1, 9, 30, device)
    given["row_mass"] *= 3
    plan, rounds = check(cost, **given, max_rounds=60, rtol=1e-4)
    assert_close(plan.sum(1), given["col_mass"], rtol=1e-5, atol=0)
    assert_close(plan.sum(2) * 3, given["row_mass"], rtol=1e-3, atol=0)
    assert rounds.item() == 60  # never right


def test_forbidden_pairs(device):
    inf = float("inf")
    cost = torch.rand(2, 12, 18, device=device)
    allowed = torch.rand(2, 12, 18, device=device) < 0.7
    cost = torch.where(allowed, cost, inf)
    cost[1, 3], cost[1, :, 7] = inf, inf  # a row and a column that can go nowhere
    plan, _ = check(cost, max_rounds=30, tol=0.0)
    assert plan[cost == inf].abs().sum() == 0
    assert plan[0].sum().sub(1).abs() < 1e-5 and plan[1, 3].sum() == 0
    nothing, _ = tokred.sinkhorn(torch.full((1, 3, 40), inf, device=device), max_rounds=4)
    assert nothing.abs().sum() == 0


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_nan_stays_in_its_problem(device, bad):
    cost = torch.rand(3, 10, 20, device=device)
    expected, rounds = tokred.sinkhorn(cost, tol=1e-3)
    for at in ((2, 3), (9, 19), (0, 0)):
        broken = cost.clone()
        broken[1][at] = bad
        plan, num_rounds = tokred.sinkhorn(broken, tol=1e-3)
        assert plan[1].isnan().all() and num_rounds[1] == 100
        assert torch.equal(plan[[0, 2]], expected[[0, 2]]) and torch.equal(num_rounds[[0, 2]], rounds[[0, 2]])
    all_nan = tokred.sinkhorn(torch.full((1, 3, 4), float("nan"), device=device), max_rounds=2)[0]
    assert all_nan.isnan().all()


def test_empty(device):
    for shape in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
        plan, rounds = tokred.sinkhorn(torch.zeros(shape, device=device))
        assert plan.shape == shape and rounds.tolist() == [0] * shape[0]


def test_views(device, dtype):
    base = torch.rand(30, 3, 64).to(device, dtype)
    cost = base.transpose(0, 1)
    for view in (cost[:, ::2], cost[:, 20:, 1:18], cost[:, :9, 5:44], cost[:1, :1].expand(3, 20, 64), cost[:, :7, 3:9]):
        expected = tokred.sinkhorn(view.contiguous(), max_rounds=5)
        assert_close(tokred.sinkhorn(view, max_rounds=5), expected, rtol=0, atol=0)


def test_offsets_beyond_2_31(device):
    cost = torch.empty(2**32 + 4096, dtype=torch.float16, device=device).as_strided((1, 3, 20), (0, 2**31 + 7, 1))
    cost[:] = torch.rand(3, 20, device=device)
    for view in (cost, cost.transpose(0, 1)):
        expected = tokred.sinkhorn(view.contiguous(), max_rounds=5)
        assert_close(tokred.sinkhorn(view, max_rounds=5), expected, rtol=0, atol=0)


def test_bits_do_not_depend_on_threads_or_batch(device, dtype, threads):
    cost = (torch.rand(6, 21, 37, device=device) * 2).to(dtype)
    first, *rest = threads(lambda: tokred.sinkhorn(cost, eps=0.02, tol=1e-2))
    for other in rest:
        assert_close(other, first, rtol=0, atol=0)
    for b in (0, 3):
        assert torch.equal(tokred.sinkhorn(cost[b : b + 1], eps=0.02, tol=1e-2)[0][0], first[0][b])


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**20))
def test_properties(num_rows, num_cols, seed):
    """I9: marginals within tol; a cost that a whole row shares changes nothing; neither does the order of rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(seed)
    cost = torch.rand(1, num_rows, num_cols, generator=random).to(device)
    plan, rounds = tokred.sinkhorn(cost, tol=1e-3, max_rounds=200)
    assert (plan >= 0).all() and rounds.item() >= 2
    assert (plan.sum(2) - 1 / num_rows).abs().sum() < 1e-3 or rounds.item() == 200
    assert (plan.sum(1) - 1 / num_cols).abs().sum() < 1e-5
    shift = torch.randint(0, 8, (1, num_rows, 1), generator=random).to(device).float()
    order = torch.randperm(num_rows, generator=random).to(device)
    few = {"max_rounds": 4, "tol": 0.0}
    same = tokred.sinkhorn(cost, **few)[0]
    assert_close(tokred.sinkhorn(cost + shift, **few)[0], same, rtol=1e-3, atol=1e-9)
    assert_close(tokred.sinkhorn(cost[:, order], **few)[0], same[:, order], rtol=1e-3, atol=1e-9)


def test_backward_says_what_to_use(device):
    cost = torch.rand(1, 3, 4, device=device, requires_grad=True)
    plan, _ = tokred.sinkhorn(cost)
    with pytest.raises(
        RuntimeError, match="sinkhorn: has no gradient; detach the cost, or train through the rounds of"
    ):
        plan.sum().backward()
    (reference(cost, max_rounds=3)[0] * torch.rand(3, 4, device=device)).sum().backward()
    assert cost.grad.isfinite().all() and cost.grad.abs().sum() > 0


def test_vmap(device):
    cost, rows = torch.rand(2, 3, 5, 6, device=device), masses(3, 5, 6, device)["row_mass"]
    mapped = torch.vmap(lambda c: tokred.sinkhorn(c, row_mass=rows), in_dims=1)(cost.transpose(0, 1))
    for i in range(2):
        for m, e in zip(mapped, tokred.sinkhorn(cost[i], row_mass=rows)):
            assert torch.equal(m[i], e)


def test_autocast_leaves_it_alone(device):
    cost = torch.rand(1, 5, 6, device=device)
    expected = tokred.sinkhorn(cost)[0]
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(tokred.sinkhorn(cost)[0], expected)


C, R = torch.zeros(2, 5, 6), torch.ones(2, 5)
ERRORS = {
    "expected cost of shape [batch_size, num_rows, num_cols], got [2, 5]": lambda d: ((R.to(d),), {}),
    "expected cost of dtype float32, float16 or bfloat16, got float64": lambda d: ((C.double().to(d),), {}),
    "expected cost contiguous in its last dimension, got strides [30, 6, 2]": lambda d: ((C.to(d)[:, :, ::2],), {}),
    "expected row_mass of dtype float32, got float16": lambda d: ((C.to(d),), {"row_mass": R.half().to(d)}),
    "expected row_mass contiguous, got strides [1, 2]": lambda d: ((C.to(d),), {"row_mass": R.T.contiguous().to(d).T}),
    "expected col_mass of shape [batch_size, num_cols] = [2, 6], got [2, 5]": (
        lambda d: ((C.to(d),), {"col_mass": R.to(d)})
    ),
    "expected row_lens of dtype int32, got int64": lambda d: ((C.to(d),), {"row_lens": torch.ones(2).long().to(d)}),
    "expected col_lens of shape [batch_size] = [2], got [3]": (
        lambda d: ((C.to(d),), {"col_lens": torch.ones(3).int().to(d)})
    ),
    "expected eps in [1e-30, 1e+30], got 0": lambda d: ((C.to(d),), {"eps": 0.0}),
    "expected eps in [1e-30, 1e+30], got nan": lambda d: ((C.to(d),), {"eps": float("nan")}),
    "expected tol >= 0, got -1": lambda d: ((C.to(d),), {"tol": -1.0}),
    "expected max_rounds >= 1, got 0": lambda d: ((C.to(d),), {"max_rounds": 0}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    args, options = ERRORS[message](device)
    with pytest.raises(RuntimeError) as caught:
        tokred.sinkhorn(*args, **options)
    assert f"sinkhorn: {message}" in str(caught.value)
