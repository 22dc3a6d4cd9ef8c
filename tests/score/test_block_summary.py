# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.score.block_summary")
reference, floor = module.reference, module.floor
summary = tokred.block_summary

# Of means: float32 sums of up to 300 values of 1, against float64; then one rounding.
MEAN = {torch.float32: (1e-6, 2e-7), torch.float16: (1e-3, 1e-6), torch.bfloat16: (8e-3, 1e-6)}


def test_floor_by_hand():
    k = torch.empty(2, 8, 1000, 64, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    lens = torch.empty(2, dtype=torch.int32, device="meta")
    row = 128
    assert floor(k, 16) == (16 * 1000 * row + 16 * 63 * row, 0)
    assert floor(k, 16, reduce="minmax", kv_lens=lens) == (16 * 1000 * row + 2 * 16 * 63 * row + 8, 0)
    packed, cu_seqlens = k.view(16000, 1, 64), torch.empty(4, dtype=torch.int32, device="meta")
    assert floor(packed, 10, cu_seqlens=cu_seqlens, max_seqlen=99) == (16000 * row + 3 * 10 * row + 16, 0)


def check(k, block_size, **options):
    """Minimum and maximum exactly, means to rounding."""
    mean = summary(k, block_size, **options)
    rtol, atol = MEAN[k.dtype]
    assert_close(mean, reference(k, block_size, **options), rtol=rtol, atol=atol, name="mean")
    bounds = summary(k, block_size, reduce="minmax", **options)
    assert_close(bounds, reference(k, block_size, reduce="minmax", **options), rtol=0, atol=0, name="minmax")
    assert all(x.dtype == k.dtype for x in (mean, *bounds))
    return mean, *bounds


def draw(device, dtype, *shape):
    return torch.randn(*shape).to(device, dtype)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 9, 16, 64, 300])
@pytest.mark.parametrize("kv_len", [1, 16, 17, 300])
def test_blocks(device, dtype, kv_len, block_size):
    check(draw(device, dtype, 2, 2, kv_len, 24), block_size)


def test_one_block_of_all(device, dtype):
    k = draw(device, dtype, 2, 2, 50, 24)
    for block_size in (50, 51, 2**40, 2**63 - 1):
        assert_close(summary(k, block_size), summary(k, 50), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 17, 40, 63, 64, 72, 80, 128, 200, 320])
def test_head_dims(device, dtype, dim):
    check(draw(device, dtype, 1, 2, 37, dim), 8)


@pytest.mark.parametrize("lens", [[0, 90], [-5, 1], [91, 1000], [32, 33]])
def test_kv_lens(device, dtype, lens):
    k = draw(device, dtype, 2, 2, 90, 24)
    k = k.where((torch.arange(90) < torch.tensor(lens)[:, None]).to(device)[:, None, :, None], torch.nan)
    for found in check(k, 16, kv_lens=int32(lens, device)):
        assert found.isfinite().all()
        assert (found[0, :, -(-max(lens[0], 0) // 16) :] == 0).all()


def test_packed(device, dtype):
    lens = [30, 0, 7, 64, 16]
    cu_seqlens = int32([0, *lens], device).cumsum(0).int()
    k = draw(device, dtype, sum(lens), 2, 40)
    found = check(k, 16, cu_seqlens=cu_seqlens, max_seqlen=64)
    assert found[0].shape == (5, 2, 4, 40)
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        alone = k[start : start + length].transpose(0, 1)[None]
        blocks = -(-length // 16)
        expected = (summary(alone, 16), *summary(alone, 16, reduce="minmax"))
        assert_close(tuple(x[b : b + 1, :, :blocks] for x in found), expected, rtol=0, atol=0)
    check(k, 16, cu_seqlens=cu_seqlens)
    check(k, 16, cu_seqlens=cu_seqlens, max_seqlen=20)  # what is beyond is left out
    by_strides = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(summary(by_strides, 16, cu_seqlens=cu_seqlens, max_seqlen=64), found[0], rtol=0, atol=0)


def test_bad_cu_seqlens_read_nothing_else(device):
    k = draw(device, torch.float32, 10, 1, 8)
    for values in ([-5, 4, 999], [9, 3, 12], [2**31 - 1, -(2**31), 2**31 - 1]):
        assert summary(k, 4, cu_seqlens=int32(values, device)).isfinite().all()


def test_pages_are_blocks(device, dtype):
    pages = draw(device, dtype, 5, 16, 3, 24)
    low, high = summary(pages.transpose(1, 2), 16, reduce="minmax")
    assert_close((low[:, :, 0], high[:, :, 0]), (pages.amin(1), pages.amax(1)), rtol=0, atol=0)


def test_nan_and_inf(device, dtype):
    k = draw(device, dtype, 1, 1, 24, 8)
    k[0, 0, 0, 0] = k[0, 0, 3, 1] = k[0, 0, 7, 2] = torch.nan  # first, middle and last of a block
    k[0, 0, 9, 3], k[0, 0, 10, 4] = torch.inf, -torch.inf
    mean, low, high = check(k, 8)
    expected = torch.zeros(3, 8, dtype=torch.bool, device=device)
    expected[0, :3] = True
    for found in (mean, low, high):
        assert torch.equal(found[0, 0].isnan(), expected)
    assert high[0, 0, 1, 3] == mean[0, 0, 1, 3] == torch.inf
    assert low[0, 0, 1, 4] == -torch.inf


def test_means_add_in_order(device):
    """1e8 + 1 - 1e8 depends on the order: each device gives the sum of the keys in theirs."""
    k = torch.tensor([1.0, 1e8, -1e8, 4.0] * 16, device=device).view(1, 1, 64, 1).repeat(1, 1, 1, 40)
    assert (summary(k, 4) == 1.0).all()  # 1 is lost in 1e8


def test_threads_and_batch_do_not_change_bits(device, dtype, threads):
    k = draw(device, dtype, 3, 2, 700, 72)
    first, *rest = threads(lambda: (summary(k, 32), *summary(k, 32, reduce="minmax")))
    for other in rest:
        assert_close(other, first, rtol=0, atol=0)
    for b in range(3):
        assert_close(summary(k[b : b + 1, :, :320], 32), first[0][b : b + 1, :, :10], rtol=0, atol=0)


def test_views(device, dtype):
    k = draw(device, dtype, 2, 2, 50, 64)
    expected = check(k, 16)
    for other in (k.transpose(1, 2).contiguous().transpose(1, 2), F.pad(k, (1, 2))[..., 1:-2]):
        assert_close(check(other, 16), expected, rtol=0, atol=0)
    check(k[:1].expand(2, -1, -1, -1), 16)


def test_empty(device):
    k = draw(device, torch.float32, 2, 2, 50, 8)
    assert summary(k[:0], 16).shape == (0, 2, 4, 8)
    assert summary(k[:, :0], 16).shape == (2, 0, 4, 8)
    assert summary(k[:, :, :0], 16).shape == (2, 2, 0, 8)
    assert summary(k[..., :0], 16).shape == (2, 2, 4, 0)
    low, high = summary(k[0].transpose(0, 1)[:0], 4, reduce="minmax", cu_seqlens=int32([0, 0], device))
    assert low.shape == high.shape == (1, 2, 0, 8)


def test_offsets_beyond_2_31(device):
    huge = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=device)
    k = huge.as_strided((1, 1, 3, 64), (0, 0, 2**31 + 8, 1))
    k[:] = torch.randn(1, 1, 3, 64)
    assert_close(summary(k, 2), summary(k.contiguous(), 2), rtol=0, atol=0)
    assert_close(summary(k, 1), k.contiguous(), rtol=0, atol=0)


@given(st.data())
def test_any_shape(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    batch, heads, kv_len, dim = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 3), (0, 99), (1, 90)))
    k = draw(device, dtype, batch, heads, kv_len, dim)
    lens = torch.randint(-2, kv_len + 3, (batch,)).int().to(device) if data.draw(st.booleans()) else None
    check(k, data.draw(st.integers(1, 40)), kv_lens=lens)


def test_no_gradient(device):
    k = draw(device, torch.float32, 1, 1, 8, 8).requires_grad_()
    with pytest.raises(RuntimeError, match=r"block_summary: has no gradient; use k\.unflatten"):
        summary(k, 4).sum().backward()


def test_vmap(device):
    k, lens = draw(device, torch.float32, 3, 2, 2, 20, 8), int32([20, 9], device)
    mapped = torch.vmap(lambda k: summary(k, 8, reduce="minmax", kv_lens=lens))(k)
    for i in range(3):
        expected = summary(k[i], 8, reduce="minmax", kv_lens=lens)
        assert_close(tuple(x[i] for x in mapped), expected, rtol=0, atol=0)
    assert_close(torch.vmap(lambda k: summary(k, 8))(k)[1], summary(k[1], 8), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="block_summary: a packed input has no batch dimension"):
        torch.vmap(lambda k: summary(k, 8, cu_seqlens=int32([0, 2], device)))(k[:, 0])


ERRORS = {
    "expected k of shape [batch_size, num_kv_heads, kv_len, head_dim], got [2, 20, 8]": lambda k: summary(k[0], 4),
    "expected k of shape [total_tokens, num_kv_heads, head_dim] (with cu_seqlens), got [2, 2, 20, 8]": (
        lambda k: summary(k, 4, cu_seqlens=int32([0, 20], k.device))
    ),
    "expected k of dtype float32, float16 or bfloat16, got int64": lambda k: summary(k.long(), 4),
    "expected k contiguous in its last dimension, got strides": lambda k: summary(k[..., ::2], 4),
    "expected block_size >= 1, got 0": lambda k: summary(k, 0),
    "expected reduce to be mean or minmax, got max": lambda k: summary(k, 4, reduce="max"),
    "expected cu_seqlens with max_seqlen, got none": lambda k: summary(k, 4, max_seqlen=3),
    "expected max_seqlen in [0, 2], got 3": (
        lambda k: summary(k[0], 4, cu_seqlens=int32([0, 2], k.device), max_seqlen=3)
    ),
    "expected kv_lens or cu_seqlens, got both": (
        lambda k: summary(k[0], 4, cu_seqlens=int32([0, 2], k.device), kv_lens=int32([2], k.device))
    ),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda k: summary(k[0], 4, cu_seqlens=int32([0, 2], k.device).long())
    ),
    "expected cu_seqlens of shape [batch_size + 1], got [0]": (
        lambda k: summary(k[0], 4, cu_seqlens=int32([], k.device))
    ),
    "expected cu_seqlens contiguous, got strides [2]": (
        lambda k: summary(k[0], 4, cu_seqlens=int32([0, 0, 2, 2], k.device)[::2])
    ),
    "expected kv_lens of dtype int32, got int64": lambda k: summary(k, 4, kv_lens=int32([2, 2], k.device).long()),
    "expected kv_lens of shape [batch_size] = [2], got [3]": (
        lambda k: summary(k, 4, kv_lens=int32([2, 2, 2], k.device))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.zeros(2, 2, 20, 8, device=device))
    assert f"block_summary: {message}" in str(caught.value)
