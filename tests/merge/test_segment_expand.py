# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.merge.segment_expand").reference
floor = importlib.import_module("tokred.merge.segment_expand").floor


def test_floor_by_hand():
    y = torch.empty(2, 2048, 640, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    dst_idx = torch.empty(2, 4096, dtype=torch.int64, device="meta")
    assert floor(y, dst_idx) == (2 * 4096 * 8 + 2 * 2048 * 1280 + 2 * 4096 * 1280, 0)  # map, rows in, rows out
    assert floor(y, dst_idx[:, :10]) == (
        2 * 10 * 8 + 2 * 10 * 1280 + 2 * 10 * 1280,
        0,
    )  # ten rows are asked for at most


def check(y, dst_idx):
    """Rows are copies: exact."""
    actual = tokred.segment_expand(y, dst_idx)
    assert actual.dtype == y.dtype
    assert_close(actual, reference(y, dst_idx), rtol=0, atol=0, name="segment_expand")
    return actual


def random_map(batch_size, num_tokens, num_out, device):
    return torch.randint(-2, num_out + 2, (batch_size, num_tokens)).to(device)


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 577])
@pytest.mark.parametrize("num_out", [0, 1, 31, 33])
def test_sizes(device, num_tokens, num_out):
    check(torch.randn(3, num_out, 8, device=device), random_map(3, num_tokens, num_out, device))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 7, 8, 33, 577, 1024])
def test_dims(device, dtype, dim):
    y = torch.randn(2, 6, dim).to(device, dtype)
    check(y, random_map(2, 25, 6, device))
    check(y, random_map(2, 25, 6, device).int())


@pytest.mark.parametrize("row_dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64])
def test_any_dtype(device, row_dtype):
    check(torch.randn(2, 13, 5).mul(9).to(row_dtype).to(device), random_map(2, 30, 13, device))


def test_views(device):
    base = torch.randn(40, 3, 64, device=device)
    dst_idx = random_map(3, 33, 20, device)
    check(base.transpose(0, 1)[:, ::2], dst_idx)
    check(base.transpose(0, 1)[:, 20:, 1:18], dst_idx)
    check(base[:1, :1].expand(3, 20, 64), dst_idx)
    check(base.transpose(0, 1)[:0, :20], dst_idx[:0])


def test_far_ids(device):
    y = torch.ones(1, 3, 2, device=device)
    far = torch.tensor([[2**62, -(2**62), 2**32, -(2**32) + 1, 3, -1, 0]], device=device)
    assert check(y, far)[0, :, 0].tolist() == [0.0] * 6 + [1.0]


def test_large_output(device, simt):
    num_tokens = 290 if simt else 2900
    y = torch.randn(1, 300, 1024, device=device)
    check(y, random_map(1, num_tokens, 300, device))
    check(y[:, :, 1:], random_map(1, num_tokens, 300, device))


def test_offsets_beyond_2_31(device):
    y = torch.empty(2**32 + 4096, dtype=torch.uint8, device=device).as_strided((1, 3, 64), (0, 2**31 + 7, 1))
    y[:] = torch.arange(64, device=device) + torch.tensor([[0], [1], [2]], device=device)
    check(y, torch.tensor([[2, 0, 1, 2]], device=device))
    check(y.transpose(0, 1), torch.tensor([[0], [0], [0]], device=device))


@given(st.integers(0, 50), st.integers(1, 50))
def test_inverse_of_a_permutation(num_dropped, num_tokens):
    """Without collisions, merge and expand undo each other bit for bit, and dropped tokens come back as zeros."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, num_tokens, 6, device=device)
    dst_idx = torch.stack([torch.randperm(num_tokens) for _ in range(2)]).to(device)
    dst_idx[:, :num_dropped] = -1
    for mode in ("mean", "sum", "max"):
        merged, _ = tokred.segment_merge(x, dst_idx, num_tokens, mode=mode)
        assert torch.equal(tokred.segment_expand(merged, dst_idx), x * (dst_idx >= 0)[..., None])


def test_composition(device):
    """Expanding by one map and then by another is expanding by the composed one."""
    y = torch.randn(2, 5, 3, device=device)
    outer, inner = random_map(2, 12, 5, device), random_map(2, 40, 12, device)
    kept = (inner >= 0) & (inner < 12)
    composed = torch.where(kept, outer.gather(1, inner.clamp(0, 11)), -1)
    assert torch.equal(
        tokred.segment_expand(tokred.segment_expand(y, outer), inner), tokred.segment_expand(y, composed)
    )


def test_gradients_equal_reference(device, dtype):
    dst_idx = random_map(2, 60, 7, device)
    grads = []
    for function in (tokred.segment_expand, reference):
        torch.manual_seed(1)
        y = torch.randn(2, 7, 9).to(device, dtype).requires_grad_()
        # The reference adds in its dtype; integers up to 8 make every order and dtype exact.
        (function(y, dst_idx) * torch.randint(-8, 9, (2, 60, 9)).to(device, dtype)).sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)
    y = torch.randn(2, 7, 9, device=device, requires_grad=True)
    tokred.segment_expand(y, dst_idx).sum().backward()  # an expanded gradient, without strides
    count = torch.zeros(2, 8).scatter_add_(
        1, torch.where((dst_idx < 0) | (dst_idx > 6), 7, dst_idx).cpu(), torch.ones(2, 60)
    )
    assert torch.equal(y.grad.cpu(), count[:, :7, None].expand(2, 7, 9))


def test_second_gradient(device):
    """The backward is made of differentiable ops."""
    y = torch.randn(1, 3, 4, device=device, requires_grad=True)
    dst_idx = torch.tensor([[0, 0, 2, -1]], device=device)
    (grad,) = torch.autograd.grad(tokred.segment_expand(y, dst_idx).square().sum(), y, create_graph=True)
    grad.sum().backward()
    assert y.grad[0, :, 0].tolist() == [4.0, 0.0, 2.0]


def test_backward_is_deterministic(device, threads):
    y, grad = torch.randn(2, 6, 50, device=device), torch.randn(2, 300, 50, device=device)
    dst_idx = random_map(2, 300, 6, device)

    def backward():
        leaf = y.clone().requires_grad_()
        tokred.segment_expand(leaf, dst_idx).backward(grad)
        return leaf.grad

    first, *rest = threads(backward)
    for other in rest:
        assert torch.equal(first, other)


def test_vmap(device):
    y, dst_idx = torch.randn(2, 3, 9, 4, device=device), random_map(3, 5, 9, device)
    mapped = torch.vmap(lambda a: tokred.segment_expand(a, dst_idx))(y)
    for i in range(2):
        assert torch.equal(mapped[i], tokred.segment_expand(y[i], dst_idx))


Y, DST = torch.zeros(2, 6, 4), torch.zeros(2, 3, dtype=torch.int64)
ERRORS = {
    "expected y of shape [batch_size, num_out, dim], got [2, 3]": lambda d: (DST.to(d), DST.to(d)),
    "expected y contiguous in its last dimension, got strides [24, 4, 2]": lambda d: (Y.to(d)[:, :, ::2], DST.to(d)),
    "expected dst_idx of shape [batch_size, num_tokens] with batch_size = 2, got [1, 3]": (
        lambda d: (Y.to(d), DST[:1].to(d))
    ),
    "expected dst_idx of dtype int64 or int32, got float32": lambda d: (Y.to(d), DST.float().to(d)),
    "expected dst_idx contiguous, got strides [1, 2]": lambda d: (Y.to(d), DST.T.contiguous().to(d).T),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    y, dst_idx = ERRORS[message](device)
    with pytest.raises(RuntimeError) as caught:
        tokred.segment_expand(y, dst_idx)
    assert f"segment_expand: {message}" in str(caught.value)
