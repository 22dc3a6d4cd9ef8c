# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.compact.scatter_tokens")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes and dtypes alone

    rows, kept_idx, base = meta(1, 320, 4096), meta(1, 320, dtype=torch.int64), meta(1, 2880, 4096)
    assert floor([rows], kept_idx, num_tokens=2880) == (320 * 8 + (320 + 2880) * 8192, 0)  # list; rows in and out
    assert floor([rows], kept_idx, base=[base]) == (320 * 8 + 2 * 2880 * 8192, 0)  # what is not replaced, too
    assert floor([rows], kept_idx, base=[base], beta=0.5) == (320 * 8 + (320 + 2 * 2880) * 8192, 0)
    kv, per_head = meta(1, 8, 64, 128), meta(1, 8, 64, dtype=torch.int64)
    assert floor([kv, kv], per_head, num_tokens=1024) == (8 * 64 * 8 + 2 * 8 * (64 + 1024) * 256, 0)


def check(tensors, kept_idx, **options):
    """Rows are copies: exact. What is blended has one rounding, or two where a product is not fused with the sum."""
    actual = tokred.scatter_tokens(tensors, kept_idx, **options)
    exact = {"rtol": 0, "atol": 0} if "alpha" not in options and "beta" not in options else {}
    assert_close(actual, reference(tensors, kept_idx, **options), **exact, name="scatter_tokens")
    return actual


def ids(*shape, high, device):
    """Any order, repeats, and ids outside on both sides."""
    return torch.randint(-2, high + 3, shape).to(device)


# Around the 4,096 tokens of a list that one block turns around.
@pytest.mark.parametrize("num_tokens", [1, 2, 33, 577, 4095, 4096, 4097, 8200])
@pytest.mark.parametrize("k", [0, 1, 32, 255, 257, 900])
def test_sizes(device, num_tokens, k):
    kept_idx = ids(2, k, high=num_tokens, device=device)
    check([torch.randn(2, k, 3, device=device)], kept_idx, num_tokens=num_tokens)
    base = [torch.randn(2, num_tokens, 3, device=device)]
    check([torch.randn(2, k, 3, device=device)], kept_idx, base=base)
    check([torch.randn(2, k, 3, device=device)], kept_idx, base=base, alpha=0.3, beta=0.7)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 33, 577, 2050])
def test_widths(device, dtype, dim):
    kept_idx = ids(3, 21, high=30, device=device)
    x, base = torch.randn(3, 21, dim).to(device, dtype), torch.randn(3, 30, dim).to(device, dtype)
    check([x], kept_idx, num_tokens=30)
    check([x], kept_idx, base=[base])
    check([x], kept_idx, base=[base], alpha=0.3, beta=0.7)
    check([x], kept_idx, base=[base], beta=1.0)
    check([x], kept_idx, num_tokens=30, alpha=-0.3)


def test_the_last_slot_of_a_token_counts(device):
    x = torch.arange(5.0, device=device).reshape(1, 5, 1) + 1
    for order, expected in (([2, 0, 2, -1, 2], [2, 0, 5]), ([1, 1, 1, 1, 0], [5, 4, 0])):
        kept_idx = torch.tensor([order], device=device)
        assert check([x], kept_idx, num_tokens=3)[0].flatten().tolist() == expected
    many = torch.zeros(1, 5000, dtype=torch.int64, device=device)
    rows = torch.arange(5000.0, device=device).reshape(1, 5000, 1)
    assert check([rows], many, num_tokens=2)[0].flatten().tolist() == [4999, 0]


def test_everything_of_a_layer_at_once(device):
    kept_idx = ids(2, 9, high=21, device=device)
    hidden = torch.randn(2, 9, 48, device=device).bfloat16()
    positions = torch.arange(18, device=device).reshape(2, 9)
    kv = [torch.randn(2, 9, 4, 16, device=device).half().transpose(1, 2) for _ in range(2)]
    tensors, dims = [hidden, positions, positions > 7, *kv], [1, 1, 1, 2, 2]
    check(tensors, kept_idx, dims=dims, num_tokens=21)
    base = [torch.randn(2, 21, 48, device=device).bfloat16(), torch.zeros_like(positions).repeat(1, 3)[:, :21]]
    base[1] = torch.arange(42, device=device).reshape(2, 21)
    base += [base[1] > 20, *(torch.randn(2, 21, 4, 16, device=device).half().transpose(1, 2) for _ in range(2))]
    check(tensors, kept_idx.int(), dims=dims, base=base)
    floats = [0, 3, 4]  # blended in their own dtypes, in one launch
    mixed = [tensors[i] for i in floats] + [torch.randn(2, 9, 5, device=device)]
    under = [base[i] for i in floats] + [torch.randn(2, 21, 5, device=device)]
    check(mixed, kept_idx, dims=[1, 2, 2, 1], base=under, alpha=0.9, beta=0.1)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_list_per_head(device, dtype, index_dtype):
    kv = [torch.randn(2, 5, 17, d).to(device, dtype) for d in (8, 12)]
    base = [torch.randn(2, 5, 40, d).to(device, dtype) for d in (8, 12)]
    kept_idx = ids(2, 5, 17, high=40, device=device).to(index_dtype)
    check(kv, kept_idx, num_tokens=40)
    check(kv, kept_idx, base=base, alpha=2.0, beta=-1.0)


def test_more_tensors_than_one_launch_takes(device):
    tensors = [torch.randn(2, 11, d, device=device) for d in range(1, 40)]
    check(tensors, ids(2, 11, high=30, device=device), num_tokens=30)
    assert tokred.scatter_tokens([], torch.zeros(2, 3, dtype=torch.int64, device=device), num_tokens=4) == []


@pytest.mark.parametrize("row_dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64])
def test_any_dtype(device, row_dtype):
    x, base = (torch.randn(2, n, 5).mul(9).to(row_dtype).to(device) for n in (6, 13))
    check([x, x[:, :, 0]], ids(2, 6, high=13, device=device), base=[base, base[:, :, 0]])


def test_views(device):
    rows, under = torch.randn(2, 40, 64, device=device), torch.randn(2, 40, 64, device=device)
    kept_idx = ids(2, 20, high=40, device=device)
    check([rows[:, :20, 1:18]], kept_idx, base=[under[:, :, 1:18]])
    check([rows[:, ::2]], kept_idx, base=[under[:1].expand(2, 40, 64)])
    check([rows[:, ::2, 1:18]], kept_idx, base=[under[:, :, 3:20]], alpha=0.5, beta=0.5)
    check([rows[:, ::2].half()[:, :, 1:18]], kept_idx, base=[under.half()[:, :, 3:20]], alpha=0.5, beta=0.5)
    check([rows[:, :20, :0]], kept_idx, num_tokens=9)
    check([rows[:0, :20]], kept_idx[:0], num_tokens=9)
    check([rows[:, :20]], kept_idx, num_tokens=0)


def test_nan_under_a_listed_token(device):
    """With beta 0 the base is not read there; with another beta it is a number like others."""
    x, base = torch.ones(1, 2, 4, device=device), torch.full((1, 3, 4), float("nan"), device=device)
    kept_idx = torch.tensor([[0, 2]], device=device)
    for alpha in (1.0, 0.5):
        out = check([x], kept_idx, base=[base], alpha=alpha)[0]
        assert (out[0, [0, 2]] == alpha).all() and out[0, 1].isnan().all()
    assert check([x], kept_idx, base=[base], beta=0.5)[0].isnan().all()
    big = torch.full((1, 2, 4), 300.0, device=device)
    assert check([big.half()], kept_idx, num_tokens=3, alpha=300.0)[0][0, 0].isinf().all()  # beyond float16


def test_large_output(device, simt):
    slots, num_tokens = (60, 290) if simt else (900, 2900)
    kept_idx = torch.randperm(num_tokens)[:slots].to(device)[None]
    x, base = torch.randn(1, slots, 1025, device=device), torch.randn(1, num_tokens, 1025, device=device)
    check([x, x[:, :, 1:]], kept_idx, base=[base, base[:, :, :-1]])


def test_offsets_beyond_2_31(device):
    x = torch.empty(2**32 + 4096, dtype=torch.uint8, device=device).as_strided((1, 3, 64), (0, 2**31 + 7, 1))
    x[:] = torch.arange(64, device=device) + torch.tensor([[0], [1], [2]], device=device)
    kept_idx = torch.tensor([[2, 0, 3]], device=device)
    check([x], kept_idx, num_tokens=5)
    check([x[:, :2]], kept_idx[:, :2].contiguous(), base=[x])


def test_restoring_what_was_gathered_is_the_identity(device):
    x, score = torch.randn(3, 50, 6, device=device), torch.randn(3, 50, device=device)
    x_kept, kept_idx = tokred.prune_topk(x, score, 20)
    assert_close(tokred.scatter_tokens([x_kept], kept_idx, base=[x])[0], x, rtol=0, atol=0)
    restored = tokred.scatter_tokens([x_kept], kept_idx, num_tokens=50)[0]
    assert_close(tokred.gather_tokens([restored], kept_idx)[0], x_kept, rtol=0, atol=0)


@given(st.data())
def test_any_list(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, order = data.draw(st.integers(0, 9)), data.draw(st.lists(st.integers(-2, 10), max_size=20))
    kept_idx = torch.tensor([order], dtype=torch.int64, device=device)
    x, base = torch.randn(1, len(order), 2, device=device), torch.randn(1, n, 2, device=device)
    out = check([x], kept_idx, base=[base])[0]
    expected = base.clone()
    for slot, token in enumerate(order):  # what a loop over the list leaves
        if 0 <= token < n:
            expected[0, token] = x[0, slot]
    assert_close(out, expected, rtol=0, atol=0)


def test_out(device):
    x, kept_idx = torch.randn(2, 5, 4, device=device), ids(2, 5, high=9, device=device)
    out = [torch.full((2, 9, 4), float("nan"), device=device)]
    assert tokred.scatter_tokens([x], kept_idx, num_tokens=9, out=out)[0] is out[0]
    assert_close(out, reference([x], kept_idx, num_tokens=9), rtol=0, atol=0)


@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.5, 0.0), (0.25, 0.5)])
def test_in_place(device, factors):
    alpha, beta = factors
    x, base = torch.randn(2, 5, 40, device=device), torch.randn(2, 9, 40, device=device)
    kept_idx = ids(2, 5, high=9, device=device)
    expected = reference([x], kept_idx, base=[base], alpha=alpha, beta=beta)
    tokred.scatter_tokens([x], kept_idx, base=[base], alpha=alpha, beta=beta, out=[base])
    assert_close(base, expected[0])


def test_gradients_equal_reference(device, dtype):
    kept_idx = torch.tensor([[3, 3, -1, 0, 3, 9], [1, 2, 3, 9, 4, 4]], device=device)
    per_head = torch.tensor([[3, 3], [-1, 0], [4, 1]], device=device).expand(2, 3, 2).contiguous()
    for lists, shape, dim in ((kept_idx, (2, 6, 7), 1), (kept_idx, (2, 3, 6, 7), 2), (per_head, (2, 3, 2, 7), 2)):
        for alpha, beta in ((1.0, 0.0), (0.5, 0.25)):
            grads = []
            for function in (tokred.scatter_tokens, reference):
                torch.manual_seed(1)
                x = torch.randn(shape).to(device, dtype).requires_grad_()
                base = torch.randn(*shape[:dim], 5, 7).to(device, dtype).requires_grad_()
                out = function([x], lists, base=[base], dims=dim, alpha=alpha, beta=beta)[0]
                (out * torch.randn(out.shape).to(device, dtype)).sum().backward()
                grads.append((x.grad, base.grad))
            assert_close(grads[0], grads[1])
    x = torch.randn(2, 6, 7, device=device, requires_grad=True)
    positions = torch.zeros(2, 6, dtype=torch.int64, device=device)
    tokred.scatter_tokens([positions, x], kept_idx, num_tokens=5)[1].transpose(1, 2).sum().backward()
    assert x.grad[..., 0].tolist() == [[0, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1]]  # the last slot of 3, of 4
    x.grad = None
    tokred.scatter_tokens([x], kept_idx[:, :6], num_tokens=0)[0].sum().backward()
    assert (x.grad == 0).all()


def test_result_is_independent_of_its_batch(device, threads):
    x, base = torch.randn(5, 300, 9, device=device), torch.randn(5, 700, 9, device=device)
    kept_idx = ids(5, 300, high=700, device=device)

    def call(at):
        return tokred.scatter_tokens([x[at]], kept_idx[at], base=[base[at]], alpha=0.3, beta=0.6)[0]

    alone = torch.cat([call(slice(b, b + 1)) for b in range(5)])
    for result in threads(lambda: call(slice(None))):
        assert torch.equal(result, alone)


def test_vmap(device):
    x, base = torch.randn(2, 3, 5, 4, device=device), torch.randn(3, 9, 4, device=device)
    kept_idx = ids(3, 5, high=9, device=device)
    mapped = torch.vmap(lambda a: tokred.scatter_tokens([a], kept_idx, base=[base])[0])(x)
    for i in range(2):
        assert_close(mapped[i], tokred.scatter_tokens([x[i]], kept_idx, base=[base])[0], rtol=0, atol=0)


def test_autocast_leaves_dtypes_alone(device):
    x, kept_idx = torch.randn(2, 5, 4, device=device), ids(2, 5, high=9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tokred.scatter_tokens([x], kept_idx, num_tokens=9)[0].dtype == torch.float32


X = torch.zeros(2, 3, 4)
BASE = torch.zeros(2, 6, 4)
IDX = torch.zeros(2, 3, dtype=torch.int64)
ERRORS = {
    "expected kept_idx of dtype int64 or int32, got float32": lambda d: ([X.to(d)], IDX.float().to(d), {}),
    "expected kept_idx of shape [batch_size, k] or [batch_size, num_heads, k], got [2]": (
        lambda d: ([X.to(d)], IDX[:, 0].contiguous().to(d), {"dims": 1})
    ),
    "expected kept_idx contiguous, got strides [1, 2]": lambda d: ([X.to(d)], IDX.T.contiguous().T.to(d), {}),
    "expected the token dimension of tensors[0] to be 1 or 2, got 3": lambda d: ([X.to(d)], IDX.to(d), {"dims": 3}),
    "expected one token dimension per tensor (1), got 2": lambda d: ([X.to(d)], IDX.to(d), {"dims": [1, 1]}),
    "expected tensors[0] of shape [batch_size, num_heads, k, ...] for a list per head, got token dimension 1": (
        lambda d: ([X.to(d)], IDX[:, None].to(d), {"dims": 1})
    ),
    "expected tensors[1] of shape [batch_size, k, ...] with the leading sizes of kept_idx [2, 3], got [1, 3, 4]": (
        lambda d: ([X.to(d), X[:1].to(d)], IDX.to(d), {})
    ),
    "expected tensors[0] with a row per slot of kept_idx [2, 3], got [2, 2, 4]": (
        lambda d: ([X[:, :2].to(d)], IDX.to(d), {})
    ),
    "expected tensors[0] contiguous after its token dimension, got strides [12, 4, 2]": (
        lambda d: ([X.to(d)[:, :, ::2]], IDX.to(d), {})
    ),
    "expected num_tokens >= 0, got -1": lambda d: ([X.to(d)], IDX.to(d), {"num_tokens": -1}),
    "expected num_tokens, or a base to take it from": lambda d: ([X.to(d)], IDX.to(d), {"num_tokens": None}),
    "expected one base per tensor (1), got 2": lambda d: ([X.to(d)], IDX.to(d), {"base": [BASE.to(d)] * 2}),
    "expected base[0] of shape of tensors[0] with num_tokens for k = [2, 6, 4], got [2, 5, 4]": (
        lambda d: ([X.to(d)], IDX.to(d), {"base": [BASE[:, :5].to(d)]})
    ),
    "expected base[0] of dtype float32, got float16": (lambda d: ([X.to(d)], IDX.to(d), {"base": [BASE.half().to(d)]})),
    "expected base[0] contiguous after its token dimension, got strides [24, 1, 6]": (
        lambda d: ([X.to(d)], IDX.to(d), {"base": [torch.zeros(2, 4, 6).to(d).transpose(1, 2)]})
    ),
    "expected a base with beta, got beta 0.5 alone": lambda d: ([X.to(d)], IDX.to(d), {"beta": 0.5}),
    "expected tensors[0] of dtype float32, float16 or bfloat16, got int64": (
        lambda d: ([X.long().to(d)], IDX.to(d), {"alpha": 0.5})
    ),
    "expected out[0] of shape of the restored tensor = [2, 6, 4], got [2, 2, 4]": (
        lambda d: ([X.to(d)], IDX.to(d), {"out": [X[:, :2].clone().to(d)]})
    ),
    "expected out[0] of dtype float32, got float16": (lambda d: ([X.to(d)], IDX.to(d), {"out": [BASE.half().to(d)]})),
    "expected out[0] contiguous, got strides [24, 1, 6]": (
        lambda d: ([X.to(d)], IDX.to(d), {"out": [torch.zeros(2, 4, 6).to(d).transpose(1, 2)]})
    ),
    "expected one out tensor per tensor (1), got 2": (
        lambda d: ([X.to(d)], IDX.to(d), {"out": [BASE.to(d), BASE.to(d)]})
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    tensors, kept_idx, options = ERRORS[message](device)
    with pytest.raises(RuntimeError) as caught:
        tokred.scatter_tokens(tensors, kept_idx, **{"num_tokens": 6, **options})
    assert f"scatter_tokens: {message}" in str(caught.value)
