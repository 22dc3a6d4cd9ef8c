# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.compact.gather_tokens").reference
floor = importlib.import_module("tokred.compact.gather_tokens").floor


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes and dtypes alone

    hidden, positions, kept_idx = meta(1, 2880, 4096), meta(1, 2880, dtype=torch.int64), meta(1, 320, dtype=torch.int64)
    assert floor([hidden, positions], kept_idx) == (320 * 8 + 2 * 320 * (8192 + 8), 0)  # list; rows in and out
    kv, per_head = [meta(1, 8, 32768, 128)] * 2, meta(1, 8, 4096, dtype=torch.int64)
    assert floor(kv, per_head) == (8 * 4096 * 8 + 2 * 2 * 8 * 4096 * 256, 0)
    assert floor([hidden, kv[0]], kept_idx, dims=[1, 2]) == (320 * 8 + 2 * 320 * (8192 + 8 * 256), 0)
    axes = meta(3, 1, 2880, dtype=torch.int64)
    spans = {"keep_first": 35, "keep_last": 53}
    assert floor([hidden, axes], kept_idx, dims=[1, -2], **spans) == (320 * 8 + 2 * 408 * (8192 + 3 * 8), 0)


def check(tensors, kept_idx, **options):
    """Rows are copies: exact."""
    actual = tokred.gather_tokens(tensors, kept_idx, **options)
    assert_close(actual, reference(tensors, kept_idx, **options), rtol=0, atol=0, name="gather_tokens")
    return actual


def ids(*shape, high, device):
    """Any order, repeats, and ids outside on both sides."""
    return torch.randint(-2, high + 3, shape).to(device)


@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("dim", [1, 3, 8, 33, 577])
def test_sizes(device, k, dim):
    check([torch.randn(3, 37, dim, device=device)], ids(3, k, high=37, device=device))


def test_everything_of_a_layer_at_once(device):
    """Hidden states, position ids (one axis, and three before the batch), a mask, K and V stored as [B, L, H, D]."""
    kept_idx = ids(2, 9, high=21, device=device)
    hidden = torch.randn(2, 21, 48, device=device).bfloat16()
    positions, axes = torch.arange(42, device=device).reshape(2, 21), torch.randint(99, (3, 2, 21)).to(device)
    kv = [torch.randn(2, 21, 4, 16, device=device).half().transpose(1, 2) for _ in range(2)]
    tensors = [hidden, positions, axes.movedim(1, 0), positions > 20, *kv]
    check(tensors, kept_idx, dims=[1, 1, 2, 1, 2, 2])
    check(tensors, kept_idx.int(), dims=[1, 1, 2, 1, 2, 2])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_list_per_head(device, dtype, index_dtype):
    kv = [torch.randn(2, 5, 40, d).to(device, dtype) for d in (8, 12)]
    check(kv, ids(2, 5, 17, high=40, device=device).to(index_dtype))


def test_more_tensors_than_one_launch_takes(device):
    tensors = [torch.randn(2, 30, d, device=device) for d in range(1, 40)]
    check(tensors, ids(2, 11, high=30, device=device))
    assert tokred.gather_tokens([], torch.zeros(2, 3, dtype=torch.int64, device=device)) == []


@pytest.mark.parametrize("row_dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64])
def test_any_dtype(device, row_dtype):
    x = torch.randn(2, 13, 5).mul(9).to(row_dtype).to(device)
    check([x, x[:, :, 0]], ids(2, 6, high=13, device=device))


def test_tensors_of_different_length(device):
    """Each tensor has its own number of tokens: an id may be outside of one and inside of another."""
    kept_idx = torch.tensor([[0, 4, 9]], device=device)
    out = check([torch.ones(1, 5, 2, device=device), torch.ones(1, 10, 2, device=device)], kept_idx)
    assert out[0][0, 2].sum() == 0 and out[1][0, 2].sum() == 2
    check([torch.ones(1, 0, 2, device=device)], kept_idx)


def test_views(device):
    base = torch.randn(2, 40, 64, device=device)
    kept_idx = ids(2, 15, high=20, device=device)
    check([base[:, :, 1:18], base[:, ::2], base[:1].expand(2, 40, 64), base.transpose(0, 1)[:2]], kept_idx)
    check([base[:, 3:, :0]], kept_idx)
    check([base[:0]], kept_idx[:0])


def test_large_output(device, simt):
    slots = 290 if simt else 2900
    x = torch.randn(1, 3000, 1024, device=device)
    check([x, x[:, :, 1:]], ids(1, slots, high=3000, device=device))


def test_offsets_beyond_2_31(device):
    x = torch.empty(2**32 + 4096, dtype=torch.uint8, device=device).as_strided((1, 3, 64), (0, 2**31 + 7, 1))
    x[:] = torch.arange(64, device=device) + torch.tensor([[0], [1], [2]], device=device)
    check([x], torch.tensor([[2, 0, 1]], device=device))
    heads = torch.empty(2**32 + 4096, dtype=torch.uint8, device=device).as_strided((1, 2, 3, 8), (0, 2**31 + 7, 64, 1))
    heads[:] = torch.arange(48, device=device).reshape(1, 2, 3, 8)
    check([heads], torch.tensor([[[2, 0], [1, 1]]], device=device))


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 0), (0, 4), (5, 7), (21, 0), (10, 11)])
def test_spans(device, first, last):
    """Both ends are kept; ids count from the first token behind keep_first and may not reach keep_last."""
    kept_idx = ids(2, 9, high=21 - first - last, device=device)
    options = {"keep_first": first, "keep_last": last}
    hidden, positions = torch.randn(2, 21, 48, device=device), torch.arange(42, device=device).reshape(2, 21)
    kv = torch.randn(2, 21, 4, 16, device=device).transpose(1, 2)
    out = check([hidden, positions, kv], kept_idx, dims=[1, 1, 2], **options)
    assert_close(out[0][:, :first], hidden[:, :first], rtol=0, atol=0)
    assert_close(out[0][:, first + 9 :], hidden[:, 21 - last :], rtol=0, atol=0)
    listed = torch.where((kept_idx >= 0) & (kept_idx < 21 - first - last), kept_idx + first, -1)
    assert_close(out[0][:, first : first + 9], reference([hidden], listed)[0], rtol=0, atol=0)
    check([kv, kv], ids(2, 4, 5, high=21 - first - last, device=device), **options)
    check([hidden, hidden[:, :20, :8].repeat(1, 2, 1)], kept_idx, **options)  # each tensor ends where it ends
    check([hidden], kept_idx[:, :0], **options)


def test_axes_first(device):
    """Position ids of three axes and their cos and sin, as M-RoPE has them."""
    kept_idx = ids(2, 9, high=21, device=device)
    axes, cos = torch.randint(99, (3, 2, 21)).to(device), torch.randn(3, 2, 21, 8, device=device)
    hidden = torch.randn(2, 21, 4, device=device)
    for options in ({}, {"keep_first": 2, "keep_last": 1}):
        out = check([hidden, axes, cos], kept_idx, dims=[1, -2, -2], **options)
        for axis in range(3):
            assert_close(out[1][axis], reference([axes[axis]], kept_idx, **options)[0])
    out = [torch.empty(2, 3, 9, 8, device=device).transpose(0, 1)]
    tokred.gather_tokens([cos], kept_idx, dims=-2, out=out)
    assert_close(out, reference([cos], kept_idx, dims=-2), rtol=0, atol=0)
    cos = cos.requires_grad_()
    tokred.gather_tokens([cos], kept_idx, dims=-2)[0].sum().backward()
    counts = torch.stack([(kept_idx == token).sum(1) for token in range(21)], 1).float()
    assert_close(cos.grad, counts[None, :, :, None].expand(3, 2, 21, 8))


@given(st.data())
def test_prune_then_gather_agree(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, k = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 50))
    k = min(k, n)
    x, score = torch.randn(2, n, 6, device=device), torch.randn(2, n, device=device)
    x_kept, kept_idx = tokred.prune_topk(x, score, k)
    assert_close(tokred.gather_tokens([x], kept_idx)[0], x_kept, rtol=0, atol=0)


def test_out(device):
    x, kept_idx = torch.randn(2, 9, 4, device=device), ids(2, 5, high=9, device=device)
    out = [torch.full((2, 5, 4), float("nan"), device=device)]
    assert tokred.gather_tokens([x], kept_idx, out=out)[0] is out[0]
    assert_close(out, reference([x], kept_idx), rtol=0, atol=0)
    spans = {"keep_first": 2, "keep_last": 1}
    tokred.gather_tokens([x], kept_idx[:, :2].contiguous(), **spans, out=out)
    assert_close(out, reference([x], kept_idx[:, :2], **spans), rtol=0, atol=0)


def test_gradients_equal_reference(device, dtype):
    kept_idx = torch.tensor([[3, 3, -1, 0, 3, 9], [1, 2, 3, 9, 4, 4]], device=device)
    per_head = torch.tensor([[3, 3], [-1, 0], [4, 1]], device=device).expand(2, 3, 2).contiguous()
    for lists, shape, dim in ((kept_idx, (2, 5, 7), 1), (kept_idx, (2, 3, 5, 7), 2), (per_head, (2, 3, 5, 7), 2)):
        grads = []
        for function in (tokred.gather_tokens, reference):
            torch.manual_seed(1)
            x = torch.randn(shape).to(device, dtype).requires_grad_()
            positions = torch.zeros(shape[: dim + 1], dtype=torch.int64, device=device)
            out = function([positions, x], lists, dims=dim)[1]
            (out * torch.randn(out.shape).to(device, dtype)).sum().backward()
            grads.append(x.grad)
        assert_close(grads[0], grads[1])


def test_gradients_with_spans(device):
    """An end's row has its gradient from the end and from nowhere else."""
    kept_idx = torch.tensor([[1, 1, -1, 0], [2, 5, 9, 0]], device=device)
    for shape, dim in (((2, 8, 7), 1), ((2, 3, 8, 7), 2)):
        grads = []
        for function in (tokred.gather_tokens, reference):
            torch.manual_seed(1)
            x = torch.randn(shape, device=device).requires_grad_()
            out = function([x], kept_idx, dims=dim, keep_first=3, keep_last=2)[0]
            (out * torch.randn(out.shape, device=device)).sum().backward()
            grads.append(x.grad)
        assert_close(grads[0], grads[1])


def test_backward_is_deterministic(device, threads):
    x = torch.randn(2, 6, 50, device=device)
    kept_idx = torch.randint(0, 6, (2, 300)).to(device)
    grad = torch.randn(2, 300, 50, device=device)

    def backward():
        leaf = x.clone().requires_grad_()
        tokred.gather_tokens([leaf], kept_idx)[0].backward(grad)
        return leaf.grad

    first, *rest = threads(backward)
    for other in rest:
        assert torch.equal(first, other)


def test_vmap(device):
    x, kept_idx = torch.randn(2, 3, 9, 4, device=device), ids(3, 5, high=9, device=device)
    mapped = torch.vmap(lambda a: tokred.gather_tokens([a], kept_idx)[0])(x)
    for i in range(2):
        assert_close(mapped[i], tokred.gather_tokens([x[i]], kept_idx)[0], rtol=0, atol=0)
    options = {"dims": -2, "keep_first": 1, "keep_last": 2}
    axes = torch.randint(99, (2, 4, 3, 9)).to(device)
    mapped = torch.vmap(lambda a: tokred.gather_tokens([a], kept_idx, **options)[0])(axes)
    for i in range(2):
        assert_close(mapped[i], tokred.gather_tokens([axes[i]], kept_idx, **options)[0])


X = torch.zeros(2, 6, 4)
IDX = torch.zeros(2, 3, dtype=torch.int64)
ERRORS = {
    "expected kept_idx of dtype int64 or int32, got float32": lambda d: ([X.to(d)], IDX.float().to(d), {}),
    "expected kept_idx of shape [batch_size, k] or [batch_size, num_heads, k], got [2]": (
        lambda d: ([X.to(d)], IDX[:, 0].contiguous().to(d), {"dims": 1})
    ),
    "expected kept_idx contiguous, got strides [1, 2]": lambda d: ([X.to(d)], IDX.T.contiguous().T.to(d), {}),
    "expected the token dimension of tensors[0] to be 1 or 2, got 3": lambda d: ([X.to(d)], IDX.to(d), {"dims": 3}),
    "expected one token dimension per tensor (1), got 2": lambda d: ([X.to(d)], IDX.to(d), {"dims": [1, 1]}),
    "expected tensors[0] with more than 2 dimensions, got shape [2, 6]": (
        lambda d: ([X[:, :, 0].to(d)], IDX.to(d), {"dims": 2})
    ),
    "expected tensors[1] of shape [batch_size, num_tokens, ...] with the leading sizes of kept_idx [2, 3], got [1, 6, 4]": (
        lambda d: ([X.to(d), X[:1].to(d)], IDX.to(d), {})
    ),
    "expected tensors[0] of shape [batch_size, num_heads, num_tokens, ...] for a list per head, got token dimension 1": (
        lambda d: ([X.to(d)], IDX[:, None].to(d), {"dims": 1})
    ),
    "expected tensors[0] contiguous after its token dimension, got strides [24, 4, 2]": (
        lambda d: ([X.to(d)[:, :, ::2]], IDX.to(d), {})
    ),
    "expected keep_first and keep_last >= 0, got 2 and -1": (
        lambda d: ([X.to(d)], IDX.to(d), {"keep_first": 2, "keep_last": -1})
    ),
    "expected keep_first + keep_last in [0, 5], the tokens of tensors[1], got 3 + 3": (
        lambda d: ([X.to(d), X[:, :5].to(d)], IDX.to(d), {"keep_first": 3, "keep_last": 3})
    ),
    "expected out[0] of shape of the gathered tensor = [2, 3, 4], got [2, 2, 4]": (
        lambda d: ([X.to(d)], IDX.to(d), {"out": [X[:, :2].clone().to(d)]})
    ),
    "expected out[0] of dtype float32, got float16": (
        lambda d: ([X.to(d)], IDX.to(d), {"out": [X[:, :3].half().clone().to(d)]})
    ),
    "expected one out tensor per tensor (1), got 2": (
        lambda d: ([X.to(d)], IDX.to(d), {"out": [X[:, :3].clone().to(d)] * 2})
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    tensors, kept_idx, options = ERRORS[message](device)
    with pytest.raises(RuntimeError) as caught:
        tokred.gather_tokens(tensors, kept_idx, **options)
    assert f"gather_tokens: {message}" in str(caught.value)
