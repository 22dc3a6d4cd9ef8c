# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The reference runs in float64 on the same (rounded) inputs, so the tolerance is that of float32 arithmetic alone, for
every input dtype: logits of magnitude s carry an error of about s * 2^-24 * sqrt(head_dim), which the exponential turns
into a relative one; 2e-5 covers s up to 50."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.score.attn_received").reference
floor = importlib.import_module("tokred.score.attn_received").floor
INF, NAN = float("inf"), float("nan")


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes, dtypes and the kind of device

    q, k = meta(1, 32, 64, 128), meta(1, 8, 16384, 128)  # two passes over q and k; sums per key and lse per query
    moved = 2 * 256 * (32 * 64 + 8 * 16384) + 4 * 32 * (16384 + 64)
    assert floor(q, k) == (moved, 2 * 2 * 32 * 64 * 16384 * 128)
    q, k, lse = meta(1, 2, 3, 8), meta(1, 1, 3, 8), meta(1, 2, 3, dtype=torch.float32)
    # lse given: one pass, and it is read; causal: 1 + 2 + 3 of 9 pairs
    assert floor(q, k, lse=lse, causal=True) == (16 * (6 + 3) + 24 + 4 * 2 * (3 + 3), 2 * 2 * 6 * 8)
    assert floor(q, k, causal=True, q_start=-1)[1] == 2 * 2 * 2 * (0 + 1 + 2) * 8
    assert floor(q, k, window=1)[1] == 2 * 2 * 2 * (2 + 3 + 2) * 8
    assert floor(q, k, window=1, causal=True)[1] == 2 * 2 * 2 * (1 + 2 + 2) * 8
    extra = {"sink": meta(2, dtype=torch.float32), "key_bias": meta(1, 1, 3, dtype=torch.float32)}
    assert floor(q, k, **extra)[0] == floor(q, k)[0] + 8 + 12
    # Packed: two sequences of 5 queries and 7 keys. Paged: two rows of three pages.
    q, k, cu = meta(10, 4, 8), meta(14, 2, 8), meta(3, dtype=torch.int32)
    moved = 2 * 16 * (10 * 4 + 14 * 2) + 12 + 12 + 4 * 4 * (14 + 10)
    assert floor(q, k, cu_seqlens=cu, cu_seqlens_k=cu) == (moved, 2 * 2 * 2 * 4 * 5 * 7 * 8)
    q, k, table = meta(2, 4, 5, 8), meta(99, 16, 2, 8), meta(2, 3, dtype=torch.int32)
    moved = 2 * 16 * (2 * 4 * 5 + 2 * 2 * 48) + 24 + 4 * 2 * 4 * (48 + 5)
    assert floor(q, k, page_table=table) == (moved, 2 * 2 * 2 * 4 * 5 * 48 * 8)
    # The CPU keeps a block's logits: one pass. Diagonals: another one, 2 + 3 of 6 pairs; 3 sums.
    q, k = torch.empty(1, 1, 2, 4), torch.empty(1, 1, 3, 4)
    assert floor(q, k, causal=True, return_diagonal=True) == (2 * 4 * (8 + 12) + 4 * (3 + 3 + 2), 2 * 2 * 5 * 4)
    assert floor(q, k) == (4 * (8 + 12) + 4 * (3 + 2), 2 * 2 * 3 * 4)


def make(device, dtype, batch_size, heads, q_len, kv_len, head_dim, gain=2.0):
    num_q_heads, num_kv_heads = heads
    q = gain * torch.randn(batch_size, num_q_heads, q_len, head_dim)
    k = torch.randn(batch_size, num_kv_heads, kv_len, head_dim)
    return q.to(device, dtype), k.to(device, dtype)


def check(q, k, **options):
    actual = tokred.attn_received(q, k, **options)
    assert all(out.dtype == torch.float32 and out.is_contiguous() for out in actual)
    assert_close(actual, reference(q.double(), k.double(), **options), rtol=2e-5, atol=2e-6, name="attn_received")
    return actual


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len", [0, 1, 2, 31, 33, 64, 65, 150])
def test_sizes(device, q_len, causal):
    for kv_len in (0, 1, 16, 31, 32, 33, 63, 64, 65, 127, 129, 197):
        check(*make(device, torch.float32, 1, (2, 1), q_len, kv_len, 8), causal=causal)


@pytest.mark.parametrize("head_dim", [1, 15, 40, 48, 64, 72, 80, 90, 96, 128, 160, 192, 256])
def test_head_dims(device, dtype, head_dim):
    check(*make(device, dtype, 2, (2, 2), 37, 75, head_dim), causal=True)


@pytest.mark.parametrize("num_tokens", [197, 577, 729])
def test_odd_sizes(device, dtype, num_tokens, simt):
    if simt and num_tokens > 197 and dtype != torch.bfloat16:
        return
    received, _ = check(*make(device, dtype, 1, (1, 1) if simt else (2, 2), num_tokens, num_tokens, 64))
    check(*make(device, dtype, 1, (1, 1), num_tokens, num_tokens // 3, 72), causal=True)
    assert_close(received.sum(-1), torch.full_like(received[..., 0], num_tokens), rtol=1e-5, name="mass")


# One split of the keys and more on CUDA; on the CPU fewer rows per tile beyond 8,192 keys, a second product beyond 32,768.
@pytest.mark.parametrize("kv_len", [1023, 1024, 1025, 3100, 9000, 33000])
def test_long_keys(device, dtype, kv_len, simt):
    if simt and (kv_len > 4000 or dtype == torch.float16):
        return
    for causal in (False, True):
        q, k = make(device, dtype, 1, (2, 1), 9 if simt else 17, kv_len, 40)
        check(q, k, causal=causal)
        check(q, k, causal=causal, q_start=700, reduce="max")


def test_many_rows_cut_into_tasks(device, threads, simt):
    q, k = make(device, torch.float32, 1, (2, 1), 300 if simt else 900, 150, 16)
    weight = torch.randn(1, 2, q.shape[2], device=device)
    for reduce in ("sum", "max"):
        first, *rest = threads(lambda reduce=reduce: check(q, k, q_weight=weight, reduce=reduce))
        for other in rest:
            assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_gqa_equals_repeated_keys(device, dtype, group):
    q, k = make(device, dtype, 2, (2 * group, 2), 33, 70, 64)
    for causal in (False, True):
        grouped = check(q, k, causal=causal)
        repeated = check(q, k.repeat_interleave(group, 1), causal=causal)
        assert_close(grouped, repeated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 7, 8, 31, 64, 200, 2**40])
def test_window(device, dtype, window, causal, simt):
    if simt and dtype != torch.bfloat16:
        return
    q, k = make(device, dtype, 1, (4, 2), 70, 150, 40)
    received, lse = check(q, k, window=window, causal=causal)
    if window >= 150:  # no window, to the bit
        assert_close((received, lse), tokred.attn_received(q, k, causal=causal), rtol=0, atol=0)
    for start in (-40, 33, 151) if simt else (-40, -3, 0, 33, 149, 151, 400):
        check(q, k, window=window, causal=causal, q_start=start)


@pytest.mark.parametrize("window", [3, 40, 1200])
def test_window_in_long_keys(device, dtype, window, simt):
    """A row sees keys of one split, of two, or none of them; on the CPU, of some panels."""
    q, k = make(device, dtype, 1, (2, 1), 9, 2600 if simt else 40000, 8)
    for start in (1020,) if simt else (900, 1020, 1024, 2599):
        check(q, k, window=window, q_start=start)
        check(q, k, window=window, causal=True, q_start=start, reduce="max")


def test_window_edges(device):
    """Equal logits: a query gives each of the n keys that it sees 1 / n, and its lse is log n."""
    q, k = torch.zeros(1, 1, 3, 8, device=device), torch.ones(1, 1, 10, 8, device=device)
    received, lse = tokred.attn_received(q, k, window=2, q_start=1)  # positions 1, 2 and 3 of 0 to 9
    assert_close(lse[0, 0].exp(), torch.tensor([4.0, 5.0, 5.0], device=device), rtol=1e-6)
    fourth, fifth = 1 / 4, 1 / 5
    expected = [fourth + fifth, *3 * [fourth + 2 * fifth], 2 * fifth, fifth, 0, 0, 0, 0]
    assert_close(received[0, 0], torch.tensor(expected, device=device), rtol=1e-6)
    received, lse = tokred.attn_received(q, k, window=2, q_start=1, causal=True)
    assert_close(lse[0, 0].exp(), torch.tensor([2.0, 3.0, 3.0], device=device), rtol=1e-6)
    expected = [1 / 2 + 1 / 3, 1 / 2 + 2 / 3, 2 / 3, 1 / 3, 0, 0, 0, 0, 0, 0]
    assert_close(received[0, 0], torch.tensor(expected, device=device), rtol=1e-6)
    received, lse = tokred.attn_received(q, k, window=0)  # the last three positions: each its own key
    assert received[0, 0].tolist() == 7 * [0] + 3 * [1]


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0, 1e6])
def test_softcap(device, dtype, softcap):
    q, k = make(device, dtype, 2, (4, 2), 45, 130, 64, gain=6)
    check(q, k, softcap=softcap)
    check(q, k, softcap=softcap, causal=True, reduce="max")
    near = 1e-3 * q  # where 1 - exp(-2 x) would lose its digits
    check(near, k, softcap=softcap)
    if softcap == 0.5:
        p = tokred.attn_received(q, k, softcap=softcap, reduce="max")[0]
        assert p.max() <= math.exp(1) / 130 * (1 + 1e-5)  # logits lie within 1 of each other


def test_sink(device, dtype, simt):
    for kv_len in (0, 20, 1030 if simt else 2100):
        if simt and kv_len > 20 and dtype != torch.bfloat16:
            return
        q, k = make(device, dtype, 1, (4, 2), 9, kv_len, 24)
        sink = torch.tensor([-3.0, 0.0, 4.0, 90.0], device=device)
        received, lse = check(q, k, sink=sink)
        check(q, k, sink=sink, causal=True, reduce="max")
        assert (lse >= sink[:, None] - 1e-4).all() and (received.sum(-1) < 9).all()
        none = torch.full((4,), -INF, device=device)
        assert_close(tokred.attn_received(q, k, sink=none), tokred.attn_received(q, k), rtol=1e-6, atol=0)
        extended = torch.logaddexp(tokred.attn_received(q, k)[1], sink[:, None])
        assert_close(tokred.attn_received(q, k, lse=extended)[0], received, rtol=2e-5, atol=1e-6)
    q, k = make(device, torch.float32, 1, (3, 1), 5, 9, 16)
    received, lse = tokred.attn_received(q, k, sink=torch.tensor([NAN, INF, 0.0], device=device))
    assert lse[0, :2].isnan().all() and received[0, :2].isnan().all() and received[0, 2].isfinite().all()
    # A query that sees no key has its sink alone.
    received, lse = check(q, k, sink=torch.tensor([1.0, 2.0, 3.0], device=device), causal=True, q_start=-3)
    assert lse[0, :, :3].tolist() == [3 * [1.0], 3 * [2.0], 3 * [3.0]]


@pytest.mark.parametrize("bias_heads", [1, 2, 6])
def test_key_bias(device, dtype, bias_heads, simt):
    if simt and dtype == torch.float16:
        return
    q, k = make(device, dtype, 2, (6, 2), 21, 70 if simt else 150, 40)
    bias = torch.randn(2, bias_heads, k.shape[2], device=device)
    bias[0, 0, ::4] = -INF
    for causal in (False, True):
        received, _ = check(q, k, key_bias=bias, causal=causal)
        assert (received[0, 0, ::4] == 0).all()
        check(q, k, key_bias=bias, causal=causal, reduce="max")
        check(q, k, key_bias=bias[:1, :, 5:6].expand(2, bias_heads, k.shape[2]).contiguous(), causal=causal)
    check(q, k, key_bias=bias[:, :1].expand(2, bias_heads, k.shape[2]), window=9)
    lse = tokred.attn_received(q, k, key_bias=bias)[1]
    check(q, k, key_bias=bias, lse=lse)


def test_key_bias_is_log_size_and_padding(device):
    q, k = make(device, torch.float32, 2, (4, 2), 33, 40, 24)
    size = torch.randint(1, 5, (40,))
    received, lse = check(q, k, key_bias=size.float().log().expand(2, 1, 40).contiguous().to(device))
    repeated, lse_repeated = tokred.attn_received(q, k.repeat_interleave(size.to(device), 2))
    owner = torch.arange(40).repeat_interleave(size).to(device)
    assert_close(received, torch.zeros_like(received).index_add(2, owner, repeated), rtol=1e-5, atol=1e-6)
    assert_close(lse, lse_repeated, rtol=1e-5, atol=1e-6)
    lens = torch.tensor([17, 40], device=device)
    padding = torch.zeros(2, 1, 40, device=device)
    padding.masked_fill_(torch.arange(40, device=device) >= lens[:, None, None], -INF)
    received, lse = check(q, k, key_bias=padding)
    for b, n in enumerate(lens.tolist()):
        alone = tokred.attn_received(q[b : b + 1], k[b : b + 1, :, :n])
        assert_close((received[b : b + 1, :, :n], lse[b : b + 1]), alone, rtol=1e-5, atol=1e-6)
        assert (received[b, :, n:] == 0).all()


def test_bias_of_minus_infinity_for_all(device):
    q, k = make(device, torch.float32, 2, (4, 2), 33, 70, 24)
    bias = torch.zeros(2, 1, 70, device=device)
    bias[1] = -INF
    received, lse = check(q, k, key_bias=bias)
    assert (lse[1] == -INF).all() and (received[1] == 0).all() and (lse[0] > -INF).all()
    bias[0, 0, 5], bias[1, 0, 6] = NAN, INF
    received, lse = check(q, k, key_bias=bias, window=3, q_start=0)
    assert lse[0, 0].isnan().nonzero().flatten().tolist() == list(range(2, 9))
    assert lse[1, 0].isnan().nonzero().flatten().tolist() == list(range(3, 10))


@pytest.mark.parametrize("q_start", [-100, -7, 0, 5, 40, 59, 60, 100, 1 << 30, -(1 << 30)])
def test_q_start(device, q_start):
    q, k = make(device, torch.float32, 1, (4, 2), 35, 60, 24)
    received, lse = check(q, k, causal=True, q_start=q_start)
    sees = torch.arange(35, device=device) + q_start >= 0
    assert ((lse > -INF) == sees).all()
    assert_close(received.sum(-1), sees.sum().float().expand(1, 4), name="one unit from each query that sees a key")
    check(q, k, causal=True, q_start=q_start, reduce="max")
    assert_close(tokred.attn_received(q, k, q_start=q_start), tokred.attn_received(q, k), rtol=0, atol=0)  # not causal


def check_diagonals(q, k, **options):
    return check(q, k, causal=True, return_diagonal=True, **options)


# Bands of 192 diagonals (16-bit) or 32 (float32), tiles of 64 or 32 queries: below, at, above; more queries than keys.
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 50), (33, 32), (64, 191), (65, 193), (130, 130), (9, 400)])
def test_diagonals(device, dtype, q_len, kv_len):
    q, k = make(device, dtype, 2, (4, 2), q_len, kv_len, 40)
    received, _, diagonal = check_diagonals(q, k)
    assert_close(diagonal.sum(-1), received.sum(-1), rtol=1e-5, name="mass")


@pytest.mark.parametrize("head_dim", [16, 72, 96, 128, 160, 192, 256])
def test_diagonals_of_head_dims(device, dtype, head_dim, simt):
    if not simt or dtype != torch.float16:
        check_diagonals(*make(device, dtype, 1, (1, 1), 70, 210, head_dim))


def test_diagonals_by_hand(device):
    """Equal logits: query i of n spreads 1 / (i + 1) over its distances 0 .. i."""
    q, k = torch.zeros(1, 1, 100, 8, device=device), torch.randn(1, 1, 100, 8, device=device)
    share = 1 / torch.arange(1, 101, dtype=torch.float64)
    expected = share.flip(0).cumsum(0).flip(0).float().to(device)
    assert_close(tokred.attn_received(q, k, causal=True, return_diagonal=True)[2][0, 0], expected, rtol=1e-5)
    assert_close(check_diagonals(q[:, :, :0], k)[2], torch.zeros(1, 1, 100, device=device))
    assert check_diagonals(q, k[:, :, :0])[2].shape == (1, 1, 0)
    assert check_diagonals(q[:0], k[:0])[2].shape == (0, 1, 100)
    assert not check_diagonals(q, k[:, :, :3])[2][0, 0, 3:].any()


def test_diagonals_take_all_options(device, dtype, simt):
    if simt and dtype == torch.float16:
        return
    q, k = make(device, dtype, 2, (6, 2), 40, 110, 24)
    weight, bias = torch.randn(2, 6, 40, device=device), torch.randn(2, 6, 110, device=device)
    bias[:, :, 5:9] = -INF
    options = {"window": 80, "softcap": 5.0, "sink": torch.randn(6, device=device), "q_weight": weight, "scale": 0.3}
    assert not check_diagonals(q, k, **options)[2][..., 81:].any()
    for heads in (1, 2, 6):
        check_diagonals(q, k, key_bias=bias[:, :heads], **options)
    lse = tokred.attn_received(q, k, causal=True)[1]
    lse[0, 1, 3], lse[1, 2, 9] = -INF, NAN
    diagonal = check_diagonals(q, k, lse=lse)[2]
    assert diagonal[1, 2, :80].isnan().all() and diagonal[0].isfinite().all()


def test_diagonals_do_not_depend_on_batch_or_threads(device, dtype, threads):
    q, k = make(device, dtype, 3, (2, 1), 70, 210, 16)

    def run():
        return tokred.attn_received(q, k, causal=True, return_diagonal=True)

    first, *rest = threads(run)
    for other in rest:
        assert_close(other, first, rtol=0, atol=0)
    alone = tokred.attn_received(q[2:], k[2:], causal=True, return_diagonal=True)
    assert_close([x[2:] for x in first], list(alone), rtol=0, atol=0)
    assert_close(list(first[:2]), list(tokred.attn_received(q, k, causal=True)), rtol=0, atol=0)


def test_diagonals_of_views_read_nothing_else(device, dtype):
    padded = torch.full((1, 2, 150, 50), NAN, device=device, dtype=dtype)
    view = padded[:, :, 7:140, 3:43]
    view.copy_(torch.randn(1, 2, 133, 40))
    check_diagonals(view[:, :, -70:], view)


def test_windows_are_slices(device):
    """Windows of queries, each with its position, add up to all queries; so do weights of 0 and 1."""
    q, k = make(device, torch.bfloat16, 2, (4, 2), 90, 110, 64)
    whole, lse = check(q, k, causal=True)
    parts = [check(q[:, :, a:b], k, causal=True, q_start=20 + a) for a, b in ((0, 7), (7, 64), (64, 90))]
    assert_close(sum(p[0] for p in parts), whole, rtol=1e-5, atol=1e-5)
    assert_close(torch.cat([p[1] for p in parts], -1), lse, rtol=1e-5, atol=1e-6)
    window = (torch.arange(90, device=device) >= 64).float().expand(2, 4, 90)
    assert_close(
        check(q, k, causal=True, q_weight=window)[0], check(q[:, :, 64:], k, causal=True)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_given_lse(device, dtype, reduce):
    q, k = make(device, dtype, 2, (4, 2), 45, 130, 64)
    for causal in (False, True):
        received, lse = check(q, k, causal=causal, reduce=reduce)
        again, returned = check(q, k, causal=causal, reduce=reduce, lse=lse)
        assert_close(again, received, rtol=1e-5, atol=1e-6)
        assert_close(returned, lse, rtol=0, atol=0)
        assert returned.data_ptr() != lse.data_ptr()
    # The lse of all keys with a span of them: the span's part of the row's attention.
    span = check(q, k[:, :, 30:99], lse=tokred.attn_received(q, k)[1], reduce=reduce)[0]
    assert_close(span, tokred.attn_received(q, k, reduce=reduce)[0][..., 30:99], rtol=1e-5, atol=1e-6)
    strided = torch.randn(4, 2, 90, device=device)[..., 20:65].transpose(0, 1)
    strided[0, 1, 3] = -INF  # contributes nothing
    check(q, k, lse=strided, reduce=reduce)


def test_weights(device):
    q, k = make(device, torch.float32, 2, (4, 4), 50, 70, 32)
    weight = torch.randn(2, 4, 50, device=device)
    for causal in (False, True):
        check(q, k, q_weight=weight, causal=causal)
        check(q, k, q_weight=weight, causal=causal, reduce="max")
        check(q, k, q_weight=weight[:1, :1].expand(2, 4, 50), causal=causal)
    received = check(q, k, q_weight=-weight.abs(), reduce="max")[0]
    assert (received == 0).all()  # 0 takes part in the maximum
    top = check(q, k, reduce="max")[0]
    assert (top <= check(q, k)[0] * (1 + 1e-5)).all() and (top > 0).all()


def test_scale_and_large_logits(device, dtype):
    q, k = make(device, dtype, 1, (2, 2), 40, 90, 64)
    for scale in (1e-6, 1.0, 3.0):
        actual = tokred.attn_received(q, k, scale=scale)
        expected = reference(q.double(), k.double(), scale=scale)
        # Logits of up to 300 carry an error of 300 * 2^-24 * 8 into the exponential.
        assert_close(actual, expected, rtol=2e-4, atol=2e-5)
    equal = torch.ones_like(q)
    assert_close(check(equal, torch.ones_like(k))[0], torch.full((1, 2, 90), 40 / 90, device=device), rtol=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_nan_and_inf_stay_with_what_they_touch(device, reduce):
    q, k = make(device, torch.bfloat16, 1, (2, 1), 40, 150, 16)
    clean = check(q, k, causal=True, q_start=60, reduce=reduce)
    q[0, 1, 20, 3] = NAN  # a query of head 1 at position 80: NaN for the keys it sees
    received, lse = check(q, k, causal=True, q_start=60, reduce=reduce)
    assert lse[0, 1].isnan().nonzero().tolist() == [[20]] and not lse[0, 0].isnan().any()
    assert received[0, 1].isnan().nonzero().flatten().tolist() == list(range(81))
    assert_close(received[0, 0], clean[0][0, 0], rtol=0, atol=0)
    q[0, 1, 20, 3] = 1
    k[0, 0, 90] = NAN  # a key at position 90: seen by queries from 30 on
    received, lse = check(q, k, causal=True, q_start=60, reduce=reduce)
    assert lse[0].isnan().nonzero()[:, 1].tolist() == 2 * list(range(30, 40))
    k[0, 0, 90] = 1
    weight = torch.ones(1, 2, 40, device=device)
    weight[0, 0, 5], weight[0, 0, 6] = NAN, INF
    received, lse = check(q, k, causal=True, q_start=60, q_weight=weight, reduce=reduce)
    assert not lse.isnan().any() and received[0, 0, :66].isnan().all()
    assert (received[0, 0, 66] == INF) and received[0, 0, 67:].isfinite().all()
    given = lse.clone()
    given[0, 0, 7] = NAN
    check(q, k, causal=True, q_start=60, lse=given, reduce=reduce)


def test_infinite_logits(device):
    q, k = torch.ones(1, 1, 3, 16, device=device), torch.randn(1, 1, 40, 16, device=device)
    q[0, 0, 2] *= -1
    q, k = q.half(), k.half()
    k[0, 0, 7, 0] = INF  # logits +inf, +inf, -inf
    received, lse = check(q, k)
    assert lse[0, 0].isnan().tolist() == [True, True, False] and received.isnan().all()
    received, lse = check(q[:, :, 2:], k)  # -inf alone: no attention
    assert received[0, 0, 7] == 0 and received.isfinite().all()
    received, lse = check(q[:, :, 2:], k[:, :, 7:8].expand(1, 1, 5, 16))
    assert (lse == -INF).all() and (received == 0).all()


def test_nan_outside_of_the_views_is_not_read(device, dtype):
    q = torch.full((1, 2, 80, 40), NAN, device=device, dtype=dtype)
    k = torch.full((1, 2, 100, 40), NAN, device=device, dtype=dtype)
    q[:, :, 3:36] = torch.randn(1, 2, 33, 40)
    k[:, :, 5:76] = torch.randn(1, 2, 71, 40)
    received, _ = check(q[:, :, 3:36, :24], k[:, :, 5:76, :24])
    assert received.isfinite().all()


def test_views(device, dtype):
    q, k = make(device, dtype, 2, (4, 2), 21, 50, 64)
    expected = check(q, k, causal=True)
    blhd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert_close(tokred.attn_received(*blhd, causal=True), expected, rtol=0, atol=0)
    odd = [torch.zeros(*x.shape[:3], 67, device=device, dtype=dtype)[..., 1:65].copy_(x) for x in (q, k)]  # misaligned
    assert_close(tokred.attn_received(*odd, causal=True), expected, rtol=0, atol=0)
    check(q[:, :, ::3], k[:, :, ::2])
    check(q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1))


def test_offsets_beyond_2_31(device, dtype):
    big = torch.empty(2**32 + 4096, dtype=dtype, device=device)
    k = big.as_strided((1, 1, 2, 16), (0, 0, 2**31 + 16, 1))
    k.copy_(torch.randn(k.shape))
    check(torch.randn(1, 1, 5, 16, device=device).to(dtype), k)
    check(k, torch.randn(1, 1, 5, 16, device=device).to(dtype))
    pages = big.as_strided((2, 1, 1, 16), (2**31 + 16, 16, 16, 1))
    pages.copy_(torch.randn(pages.shape))
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    check(torch.randn(1, 1, 5, 16, device=device).to(dtype), pages, page_table=table)
    heads = big.as_strided((1, 2, 5, 16), (0, 2**31 + 16, 16, 1))
    heads.copy_(torch.randn(heads.shape))
    check(heads, heads, causal=True)


def test_row_is_independent_of_its_batch(device, dtype, threads):
    q, k = make(device, dtype, 5, (4, 2), 70, 140, 64)
    alone = [tokred.attn_received(q[b : b + 1], k[b : b + 1], causal=True) for b in range(5)]
    expected = tuple(torch.cat([a[i] for a in alone]) for i in range(2))
    for result in threads(lambda: tokred.attn_received(q, k, causal=True)):
        assert_close(result, expected, rtol=0, atol=0)
    many = tokred.attn_received(q[:1].repeat(300, 1, 1, 1)[:, :, :2], k[:1, :, :8].repeat(300, 1, 1, 1))
    assert_close(many[0], many[0][:1].expand(300, -1, -1), rtol=0, atol=0)  # more tasks than one slab takes


# Rows of a key head that the CPU multiplies with keys where they lie: up to 4 of bfloat16 (with AVX-512's instruction),
# 8 of float16, 24 others.
@pytest.mark.parametrize("q_len", [1, 2, 3, 4, 5, 8, 9, 16, 24, 25])
def test_few_queries(device, dtype, q_len, simt):
    if simt and q_len not in (1, 5):
        return
    kv_len = 70 if simt else 600
    q, k = make(device, dtype, 2, (2, 2), q_len, kv_len, 72)
    sink, weight = torch.randn(2, device=device), torch.randn(2, 2, q_len, device=device)
    bias = torch.randn(2, 1, kv_len, device=device)
    bias[:, :, ::3] = -INF
    for options in (
        {},
        {"causal": True},
        {"causal": True, "q_start": kv_len // 2, "reduce": "max"},
        {"window": 9, "q_start": kv_len // 3, "softcap": 3.0},
        {"sink": sink, "softcap": 5.0},
        {"key_bias": bias, "q_weight": weight},
        {"key_bias": bias, "q_weight": weight, "sink": sink, "causal": True, "window": 300, "reduce": "max"},
    ):
        received, lse = check(q, k, **options)
        if "sink" not in options:
            assert_close(check(q, k, **options, lse=lse)[0], received, rtol=1e-5, atol=1e-6)
    grouped = check(q, k[:, :1], key_bias=bias, causal=True)  # twice the rows
    assert_close(check(q, k[:, :1].expand(-1, 2, -1, -1), key_bias=bias, causal=True), grouped, rtol=1e-5, atol=1e-6)
    q[0, 0, q_len // 2, 3] = k[1, 1, 50, 70] = NAN
    check(q, k)


@pytest.mark.parametrize("head_dim", [1, 8, 16, 31, 32, 40, 48, 63, 64, 80, 100, 256])
def test_few_queries_of_any_depth(device, dtype, head_dim, simt):
    for q_len in (1, 3) if simt else (1, 3, 6, 12):
        for kv_len in (1, 7, 16, 33):
            check(*make(device, dtype, 1, (1, 1), q_len, kv_len, head_dim))


def test_few_queries_have_one_result(device, dtype, threads, simt):
    """However the keys lie, whatever shares the call, on however many threads."""
    if simt and dtype != torch.bfloat16:
        return
    for q_len in (1, 5) if simt else (1, 2, 5, 9, 25):
        lens = [40, 1] if simt else [150, 40, 0, 600]
        q, pages, table, kv_lens, dense = paged(device, dtype, 16, lens, q_len, head_dim=64)
        table[0, 1] = -1
        dense[0] = torch.cat([dense[0][:, :, :16], dense[0][:, :, 32:]], 2)  # without that page
        alone = [tokred.attn_received(q[b : b + 1], k) for b, k in enumerate(dense)]
        for received, lse in threads(lambda: tokred.attn_received(q, pages, page_table=table, kv_lens=kv_lens)):  # noqa: B023
            for b, n in enumerate(lens):
                if b > 0:
                    assert_close((received[b : b + 1, :, :n], lse[b : b + 1]), alone[b], rtol=0, atol=0)
            seen = torch.cat([received[:1, :, :16], received[:1, :, 32 : lens[0]]], 2)
            assert_close((seen, lse[:1]), alone[0], rtol=1e-5, atol=1e-7)
            assert (received[0, :, 16:32] == 0).all()
        flat = torch.cat([k[0].transpose(0, 1) for k in dense])
        cu_k = torch.tensor([0, *(k.shape[2] for k in dense)]).cumsum(0).int().to(device)
        layout = {"cu_seqlens": q_len * torch.arange(len(lens) + 1, dtype=torch.int32, device=device)}
        queries = q.transpose(1, 2).flatten(0, 1)
        for result in threads(lambda: tokred.attn_received(queries, flat, cu_seqlens_k=cu_k, **layout)):  # noqa: B023
            expected = [torch.cat([a[i][0] for a in alone], 1) for i in range(2)]
            assert_close(result, tuple(expected), rtol=0, atol=0)


def test_one_query_over_more_keys_than_a_tile_keeps(device, dtype, simt):
    if simt:
        return
    for q_len, kv_len in ((1, 70000), (1, (1 << 20) + 5), (4, 300000)):
        q, k = make(device, dtype, 1, (1, 1), q_len, kv_len, 8)
        check(q, k, q_start=kv_len - 3, causal=True)


def test_keys_are_read_where_they_lie_or_copied(device, dtype, simt):
    """Whole panels of keys, side by side and far apart, at even and odd addresses."""
    if simt and dtype != torch.bfloat16:
        return
    for kv_len in (64,) if simt else (64, 1024):
        q, k = make(device, dtype, 1, (2, 1), 30, kv_len, 64)
        expected = check(q, k)
        for width, first in ((96, 16), (66, 2), (66, 1), (65, 0), (67, 3)):
            place = torch.full((1, 1, kv_len, width), NAN, device=device, dtype=dtype)
            view = place[..., first : first + 64].copy_(k)
            assert_close(tokred.attn_received(q, view), expected, rtol=0, atol=0)


@given(st.data())
def test_any_shape(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = data.draw
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    q_len, kv_len, head_dim = draw(st.integers(0, 70)), draw(st.integers(0, 140)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    q, k = make(device, dtype, draw(st.integers(0, 2)), (group * kv_heads, kv_heads), q_len, kv_len, head_dim)
    start = draw(st.one_of(st.none(), st.integers(-80, 160)))
    options = {
        "causal": draw(st.booleans()),
        "q_start": start,
        "window": draw(st.one_of(st.none(), st.integers(0, 90))),
    }
    options["softcap"] = draw(st.sampled_from([None, 3.0, 50.0]))
    options["reduce"] = draw(st.sampled_from(["sum", "sum", "max"]))
    heads = draw(st.sampled_from([None, 1, kv_heads, group * kv_heads]))
    if heads is not None:
        options["key_bias"] = torch.randn(q.shape[0], heads, kv_len, device=device).log()  # NaN turns -inf
        options["key_bias"].nan_to_num_(nan=-INF, neginf=-INF)
    options["q_weight"] = torch.randn(q.shape[:3], device=device) if draw(st.booleans()) else None
    options["sink"] = torch.randn(q.shape[1], device=device) if draw(st.booleans()) else None
    received, lse = check(q, k, **options)
    if options["q_weight"] is None and options["sink"] is None and options["reduce"] == "sum":
        seeing = (lse > -INF).sum(-1).float()
        assert_close(received.sum(-1), seeing, rtol=1e-5, atol=1e-5, name="one unit from each query that sees a key")


def packed(device, dtype, lens_q, lens_k=None, heads=(4, 2), head_dim=24, tail=0):
    """Packed q and k, and the spans of their sequences."""
    lens_k = lens_q if lens_k is None else lens_k
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int().to(device) for lens in (lens_q, lens_k))
    q = torch.randn(sum(lens_q) + tail, heads[0], head_dim).to(device, dtype)
    k = torch.randn(sum(lens_k) + tail, heads[1], head_dim).to(device, dtype)
    spans = [tuple(int(x) for x in (*cu_q[b : b + 2], *cu_k[b : b + 2])) for b in range(len(lens_q))]
    return q, k, {"cu_seqlens": cu_q, "cu_seqlens_k": None if lens_k is lens_q else cu_k}, spans


LENGTHS = {
    "self": ([5, 0, 33, 70, 64, 1], None),
    "cross": ([3, 9, 0, 40, 2], [20, 0, 7, 90, 1]),
    "none": ([], None),
    "empty": ([0, 0], [0, 5]),
    "many": (13 * [3, 16, 0], None),  # more than a warp searches at once
}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 6, "softcap": 3.0, "reduce": "max"}])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_is_each_sequence_alone(device, dtype, lengths, options, simt):
    if simt and (dtype == torch.float16 or (lengths == "many" and (options or dtype == torch.float32))):
        return
    q, k, layout, spans = packed(device, dtype, *LENGTHS[lengths])
    received, lse = check(q, k, **layout, **options)
    for max_seqlen in (0, 128):  # a hint: nothing depends on it
        assert_close(
            tokred.attn_received(q, k, **layout, **options, max_seqlen=max_seqlen), (received, lse), rtol=0, atol=0
        )
    for a, b, c, d in spans:
        alone = tokred.attn_received(q[None, a:b].transpose(1, 2), k[None, c:d].transpose(1, 2), **options)
        assert_close((received[None, :, c:d], lse[None, :, a:b]), alone, rtol=0, atol=0)


def test_packed_long_sequences_are_split_as_if_alone(device, dtype, simt):
    if simt and dtype == torch.float16:
        return
    lens = ([20, 1, 150, 2], [1100, 5, 1030, 0]) if simt else ([20, 1, 600, 2], [40000, 1030, 1100, 0])
    q, k, layout, spans = packed(device, dtype, *lens, heads=(2, 1), head_dim=8)
    for options in ({"sink": torch.randn(2, device=device)}, {"causal": True}):
        if simt and options.get("causal", False) != (dtype == torch.float32):
            continue
        received, lse = check(q, k, **layout, **options)
        for a, b, c, d in spans:
            alone = tokred.attn_received(q[None, a:b].transpose(1, 2), k[None, c:d].transpose(1, 2), **options)
            assert_close((received[None, :, c:d], lse[None, :, a:b]), alone, rtol=0, atol=0)


def test_bits_do_not_depend_on_what_shares_a_block(device):
    """One long sequence among short ones, which choose smaller blocks on CUDA than it would alone."""
    q, k, layout, _ = packed(device, torch.bfloat16, [250, *12 * [1]], [253, *12 * [1]], heads=(1, 1))
    for options in ({"window": 6}, {"causal": True}):
        received, lse = check(q, k, **layout, **options)
        alone = tokred.attn_received(q[None, :250].transpose(1, 2), k[None, :253].transpose(1, 2), **options)
        assert_close((received[None, :, :253], lse[None, :, :250]), alone, rtol=0, atol=0)


def test_packed_companions(device):
    """lse, weights, biases and views of packed tokens."""
    q, k, layout, _ = packed(device, torch.float32, [5, 0, 33, 17], [9, 3, 0, 40])
    weight = torch.randn(4, q.shape[0], device=device)
    for heads in (1, 2, 4):
        bias = torch.randn(heads, k.shape[0], device=device)
        received, lse = check(q, k, **layout, key_bias=bias, q_weight=weight)
        given = lse.repeat_interleave(2, 1)[:, ::2].contiguous()
        assert_close(
            check(q, k, **layout, key_bias=bias, q_weight=weight, lse=given)[0], received, rtol=1e-5, atol=1e-5
        )
    odd = torch.zeros(q.shape[0], 4, 27, device=device)[..., 2:26].copy_(q)
    assert_close(tokred.attn_received(odd, k, **layout), tokred.attn_received(q, k, **layout), rtol=0, atol=0)
    headed = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(tokred.attn_received(q, headed, **layout), tokred.attn_received(q, k, **layout), rtol=0, atol=0)
    check(q, k, **layout, causal=True, q_start=2)


def test_tokens_behind_the_last_sequence(device):
    q, k, layout, _ = packed(device, torch.float32, [5, 70], tail=80)
    q[75:], k[75:] = NAN, NAN
    received, lse = check(q, k, **layout)
    assert (received[:, 75:] == 0).all() and (lse[:, 75:] == -INF).all() and received.isfinite().all()


# Beyond both ends and falling, but no two sequences overlap: blocks of both would write the same results.
BAD_OFFSETS = [[7, 7, 7, 7], [-5, 3, 3, 2**31 - 1], [5, 2, 2**31 - 1, 100], [-(2**31), 2**31 - 1, 30, 20]]


@pytest.mark.parametrize("bad", BAD_OFFSETS)
def test_bad_cu_seqlens_read_nothing_out_of_bounds(device, bad):
    q, k, *_ = packed(device, torch.bfloat16, [20])
    cu_seqlens = torch.tensor(bad, dtype=torch.int32, device=device)
    received, lse = tokred.attn_received(q, k, cu_seqlens=cu_seqlens)
    assert received.shape == (4, 20) and lse.shape == (4, 20)


def paged(device, dtype, page_size, lens, q_len=33, heads=(4, 2), head_dim=24, spare=5):
    """Paged k with its table, and the same k as one dense tensor per row."""
    max_pages = -(-max(lens) // page_size)
    pages = torch.randn(len(lens) * max_pages + spare, page_size, heads[1], head_dim).to(device, dtype)
    table = torch.randperm(pages.shape[0])[: len(lens) * max_pages].view(len(lens), max_pages).int().to(device)
    q = torch.randn(len(lens), heads[0], q_len, head_dim).to(device, dtype)
    dense = [pages[row.long()].flatten(0, 1)[:n].transpose(0, 1)[None] for row, n in zip(table, lens)]
    return q, pages, table, torch.tensor(lens, dtype=torch.int32, device=device), dense


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 6, "softcap": 3.0, "reduce": "max"}])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_paged_is_dense(device, dtype, page_size, options, simt):
    if simt and dtype == torch.float16:
        return
    if simt and options and page_size not in (16, 128):
        return
    q, pages, table, lens, dense = paged(device, dtype, page_size, [150, 1, 0, 97])
    received, lse = check(q, pages, page_table=table, kv_lens=lens, **options)
    for b, k in enumerate(dense):
        alone = tokred.attn_received(q[b : b + 1], k, **options)
        assert_close((received[b : b + 1, :, : k.shape[2]], lse[b : b + 1]), alone, rtol=0, atol=0)
        assert (received[b, :, k.shape[2] :] == 0).all()


def test_paged_snapkv_window(device, dtype, simt):
    """The last queries over long rows of different lengths, split as if dense."""
    if simt and dtype == torch.float16:
        return
    lens = [1100, 5] if simt else [9000, 40000]
    q, pages, table, lens, dense = paged(device, dtype, 16, lens, q_len=3 if simt else 64, head_dim=8)
    bias = torch.randn(2, 2, table.shape[1] * 16, device=device)
    received, lse = check(q, pages, page_table=table, kv_lens=lens, causal=True, key_bias=bias)
    for b, k in enumerate(dense):
        n = k.shape[2]
        alone = tokred.attn_received(q[b : b + 1], k, causal=True, key_bias=bias[b : b + 1, :, :n])
        assert_close((received[b : b + 1, :, :n], lse[b : b + 1]), alone, rtol=0, atol=0)


def test_keys_on_no_page_are_not_seen(device, dtype, simt):
    if simt and dtype != torch.bfloat16:
        return
    q, pages, table, lens, _ = paged(device, dtype, 16, [150, 97])
    table[0, 3], table[1, 0], table[1, 5] = -1, pages.shape[0], 2**31 - 1
    for options in ({}, {"causal": True, "softcap": 2.0}, {"reduce": "max", "sink": torch.zeros(4, device=device)}):
        received, _ = check(q, pages, page_table=table, kv_lens=lens, **options)
        assert (received[0, :, 48:64] == 0).all() and (received[1, :, :16] == 0).all()
        check(q, pages, page_table=table, **options)  # all pages full
    q[0, 1, 7] = NAN  # stays with the keys that its query sees
    received, lse = check(q, pages, page_table=table, kv_lens=lens)
    assert (received[0, 1, 48:64] == 0).all() and received[0, 1, :48].isnan().all() and received[0, 0].isfinite().all()
    nothing = torch.full_like(table, -1)
    received, lse = check(q, pages, page_table=nothing)
    assert (received == 0).all() and (lse == -INF).all()
    bias = torch.randn(2, 1, table.shape[1] * 16, device=device)
    check(q[:, :2], pages, page_table=table, kv_lens=lens, key_bias=bias)


def test_pages_that_no_row_has_are_not_read(device):
    q, pages, table, lens, _ = paged(device, torch.bfloat16, 16, [150, 97])
    expected = tokred.attn_received(q, pages, page_table=table, kv_lens=lens)
    used = torch.zeros(pages.shape[0], dtype=torch.bool, device=device)
    used[table.flatten().long()] = True
    pages[~used] = NAN
    pages[table[1, 6].long(), 1:] = NAN  # past position 96
    pages[table[1, 7:].long()] = NAN
    assert_close(tokred.attn_received(q, pages, page_table=table, kv_lens=lens), expected, rtol=0, atol=0)


@pytest.mark.parametrize("lens", [[-5, 160], [161, 2**31 - 1], [0, 0]])
def test_kv_lens_are_clamped(device, lens):
    q, pages, table, _, _ = paged(device, torch.float32, 16, [150, 97])
    check(q, pages, page_table=table, kv_lens=torch.tensor(lens, dtype=torch.int32, device=device), causal=True)


def test_paged_views_and_empty(device):
    q, pages, table, lens, _ = paged(device, torch.bfloat16, 16, [150, 97], head_dim=64)
    expected = check(q, pages, page_table=table, kv_lens=lens)
    nhd = pages.transpose(1, 2).contiguous().transpose(1, 2)  # stored [num_pages, num_kv_heads, page_size, head_dim]
    assert_close(tokred.attn_received(q, nhd, page_table=table, kv_lens=lens), expected, rtol=0, atol=0)
    odd = torch.zeros(*pages.shape[:3], 67, device=device, dtype=pages.dtype)[..., 1:65].copy_(pages)
    assert_close(tokred.attn_received(q, odd, page_table=table, kv_lens=lens), expected, rtol=0, atol=0)
    assert check(q, pages, page_table=table[:, :0])[0].shape == (2, 4, 0)
    assert check(q[:0], pages, page_table=table[:0])[0].shape == (0, 4, 160)
    assert (check(q, pages[:0], page_table=table)[0] == 0).all()
    assert check(q[:, :, :0], pages, page_table=table, kv_lens=lens)[1].shape == (2, 4, 0)


@given(st.data())
def test_any_layout(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    heads = draw(st.sampled_from([(2, 1), (3, 3), (6, 2)]))
    options = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([None, 0, 5, 40]))}
    options |= {"q_start": draw(st.sampled_from([None, -3, 20])), "softcap": draw(st.sampled_from([None, 3.0]))}
    options["sink"] = torch.randn(heads[0], device=device) if draw(st.booleans()) else None
    bias_heads = draw(st.sampled_from([None, 1, *heads]))
    if draw(st.booleans()):
        lens = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), max_size=5))
        q, k, layout, _ = packed(
            device, dtype, [a for a, _ in lens], [b for _, b in lens], heads, tail=draw(st.integers(0, 3))
        )
        bias = None if bias_heads is None else torch.randn(bias_heads, k.shape[0], device=device)
    else:
        lens = draw(st.lists(st.integers(0, 90), min_size=1, max_size=3))
        q, k, table, lens, _ = paged(
            device, dtype, draw(st.sampled_from([1, 16])), [*lens, 1], draw(st.integers(0, 40)), heads
        )
        layout = {"page_table": table, "kv_lens": draw(st.sampled_from([None, lens]))}
        columns = table.shape[1] * k.shape[1]
        bias = None if bias_heads is None else torch.randn(q.shape[0], bias_heads, columns, device=device)
    check(q, k, **layout, **options, key_bias=bias)


def test_empty(device):
    q, k = make(device, torch.float32, 2, (4, 2), 5, 7, 16)
    for reduce in ("sum", "max"):
        received, lse = check(q[:, :, :0], k, reduce=reduce)
        assert (received == 0).all() and received.shape == (2, 4, 7) and lse.shape == (2, 4, 0)
        received, lse = check(q, k[:, :, :0], reduce=reduce)
        assert received.shape == (2, 4, 0) and (lse == -INF).all()
        assert check(q[:0], k[:0], reduce=reduce)[0].shape == (0, 4, 7)
        assert check(q[:, :0], k, reduce=reduce)[0].shape == (2, 0, 7)
        assert check(q[:, :0], k[:, :0], reduce=reduce)[0].shape == (2, 0, 7)
    assert_close(check(q, k[:, :, :0], lse=torch.ones(2, 4, 5, device=device))[1], torch.ones(2, 4, 5, device=device))


def test_backward_says_what_to_do(device):
    q, k = make(device, torch.float32, 1, (2, 2), 5, 7, 16)
    received, _ = tokred.attn_received(q.requires_grad_(), k)
    with pytest.raises(RuntimeError, match=r"attn_received: has no gradient; detach q and k, or compute softmax"):
        received.sum().backward()


def test_autocast_casts_q_and_k_only(device):
    q, k = make(device, torch.float32, 1, (2, 2), 20, 30, 16)
    weight = torch.rand(1, 2, 20, device=device)
    lse = tokred.attn_received(q, k)[1]
    expected = tokred.attn_received(q.bfloat16(), k.bfloat16(), lse=lse, q_weight=weight)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = tokred.attn_received(q, k, lse=lse, q_weight=weight)
    assert_close(actual, expected, rtol=0, atol=0)


def test_vmap(device):
    q, k = torch.randn(3, 2, 4, 6, 8, device=device), torch.randn(2, 2, 9, 3, 8, device=device)
    weight = torch.rand(2, 4, 6, device=device)
    bias, sink = torch.randn(2, 1, 9, device=device), torch.randn(4, device=device)
    for options in ({}, {"q_weight": weight, "causal": True}, {"key_bias": bias, "sink": sink}):
        mapped = torch.vmap(lambda a, b, o=options: tokred.attn_received(a, b, **o), in_dims=(0, 3))(q, k)
        for i in range(3):
            alone = tokred.attn_received(q[i], k[:, :, :, i], **options)
            assert_close([m[i] for m in mapped], alone, rtol=0, atol=0)


def test_vmap_of_layouts(device):
    q, pages, table, lens, _ = paged(device, torch.float32, 16, [50, 20], q_len=5)
    queries = torch.stack([q, 2 * q])
    mapped = torch.vmap(lambda x: tokred.attn_received(x, pages, page_table=table, kv_lens=lens))(queries)
    for i in range(2):
        alone = tokred.attn_received(queries[i], pages, page_table=table, kv_lens=lens)
        assert_close([m[i] for m in mapped], alone, rtol=0, atol=0)
    q, k, layout, _ = packed(device, torch.float32, [3, 4])
    with pytest.raises(RuntimeError, match="attn_received: a packed input has no batch dimension"):
        torch.vmap(lambda x: tokred.attn_received(x, k, **layout))(torch.stack([q, q]))


def test_layouts_have_no_gradient_and_autocast(device):
    q, pages, table, lens, _ = paged(device, torch.float32, 16, [50, 20], q_len=5)
    flat, k, layout, _ = packed(device, torch.float32, [3, 4])
    for x, y, options in ((q, pages, {"page_table": table, "kv_lens": lens}), (flat, k, layout)):
        expected = tokred.attn_received(x.bfloat16(), y.bfloat16(), **options)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert_close(tokred.attn_received(x, y, **options), expected, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=r"attn_received: has no gradient; detach q and k"):
            tokred.attn_received(x.requires_grad_(), y, **options)[0].sum().backward()


def test_inference_and_no_grad(device):
    q, k = make(device, torch.float32, 1, (2, 2), 40, 30, 16)
    expected = tokred.attn_received(q, k)
    with torch.inference_mode():
        assert_close(tokred.attn_received(q, k), expected, rtol=0, atol=0)


NO_DIAGONALS = 'expected dense q and k, causal=True, q_start=None and reduce="sum" with return_diagonal, got '


def diagonals(q, k, **options):
    return tokred.attn_received(q, k, return_diagonal=True, **options)


ERRORS = {
    NO_DIAGONALS + 'causal=False, q_start=None, reduce="sum"': lambda q, k, r: diagonals(q, k),
    NO_DIAGONALS + 'causal=True, q_start=2, reduce="max"': (
        lambda q, k, r: diagonals(q, k, causal=True, q_start=2, reduce="max")
    ),
    NO_DIAGONALS + 'packed or paged ones, causal=True, q_start=None, reduce="sum"': (
        lambda q, k, r: diagonals(q, k, causal=True, page_table=torch.zeros(2, 1, dtype=torch.int32, device=q.device))
    ),
    "expected q of shape [batch_size, num_q_heads, q_len, head_dim], got [4, 5, 16]": (
        lambda q, k, r: tokred.attn_received(q[0], k)
    ),
    "expected k of shape [batch_size, num_kv_heads, kv_len, head_dim] with the batch_size and head_dim of q [2, 4, 5, 16], "
    "got [1, 2, 7, 16]": lambda q, k, r: tokred.attn_received(q, k[:1]),
    "expected num_q_heads to be a multiple of num_kv_heads, got 3 and 2": lambda q, k, r: tokred.attn_received(
        q[:, :3], k
    ),
    "expected head_dim in [1, 256], got 0": lambda q, k, r: tokred.attn_received(q[..., :0], k[..., :0]),
    "expected head_dim in [1, 256], got 272": (
        lambda q, k, r: tokred.attn_received(q.repeat(1, 1, 1, 17), k.repeat(1, 1, 1, 17))
    ),
    "expected q of dtype float32, float16 or bfloat16, got float64": lambda q, k, r: tokred.attn_received(
        q.double(), k
    ),
    "expected k of q's dtype float32, got float16": lambda q, k, r: tokred.attn_received(q, k.half()),
    "expected q contiguous in its last dimension, got strides [320, 80, 1, 5]": (
        lambda q, k, r: tokred.attn_received(q.mT.contiguous().mT, k)
    ),
    "expected k contiguous in its last dimension, got strides [224, 112, 1, 7]": (
        lambda q, k, r: tokred.attn_received(q, k.mT.contiguous().mT)
    ),
    "expected lse of shape [batch_size, num_q_heads, q_len] = [2, 4, 5], got [2, 4, 4]": (
        lambda q, k, r: tokred.attn_received(q, k, lse=r[..., :4])
    ),
    "expected lse of dtype float32, got float16": lambda q, k, r: tokred.attn_received(q, k, lse=r.half()),
    "expected q_weight contiguous in its last dimension, got strides [20, 1, 4]": (
        lambda q, k, r: tokred.attn_received(q, k, q_weight=r.mT.contiguous().mT)
    ),
    'expected reduce to be "sum" or "max", got "mean"': lambda q, k, r: tokred.attn_received(q, k, reduce="mean"),
    "expected scale > 0 and finite, got 0": lambda q, k, r: tokred.attn_received(q, k, scale=0.0),
    "expected scale > 0 and finite, got nan": lambda q, k, r: tokred.attn_received(q, k, scale=NAN),
    "expected window >= 0, got -1": lambda q, k, r: tokred.attn_received(q, k, window=-1),
    "expected softcap > 0 and finite, got 0": lambda q, k, r: tokred.attn_received(q, k, softcap=0.0),
    "expected softcap > 0 and finite, got inf": lambda q, k, r: tokred.attn_received(q, k, softcap=INF),
    "expected sink of shape [num_q_heads] = [4], got [2, 4]": (
        lambda q, k, r: tokred.attn_received(q, k, sink=r[..., 0].contiguous())
    ),
    "expected sink of dtype float32, got float16": lambda q, k, r: tokred.attn_received(q, k, sink=r[0, :, 0].half()),
    "expected sink contiguous, got strides [5]": lambda q, k, r: tokred.attn_received(q, k, sink=r[0, :, 0]),
    "expected sink or lse, not both: a given lse is the whole denominator": (
        lambda q, k, r: tokred.attn_received(q, k, lse=r, sink=r[0, :, 0].contiguous())
    ),
    "expected key_bias of shape [batch_size, heads, kv_len] with batch_size 2 and kv_len 7, got [2, 4, 5]": (
        lambda q, k, r: tokred.attn_received(q, k, key_bias=r)
    ),
    "expected key_bias with 4 (query heads), 2 (kv heads) or 1 heads, got [2, 3, 7]": (
        lambda q, k, r: tokred.attn_received(q, k, key_bias=k.sum(-1)[:, [0, 1, 1]])
    ),
    "expected key_bias of dtype float32, got float16": (
        lambda q, k, r: tokred.attn_received(q, k, key_bias=k.sum(-1).half())
    ),
    "expected key_bias contiguous in its last dimension, got strides [14, 1, 2]": (
        lambda q, k, r: tokred.attn_received(q, k, key_bias=k.sum(-1).mT.contiguous().mT)
    ),
}


def lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


LAYOUT_ERRORS = {
    "expected cu_seqlens or page_table, not both": {"page_table": torch.zeros(2, 3, dtype=torch.int32)},
    "expected cu_seqlens with cu_seqlens_k": {"cu_seqlens": None, "cu_seqlens_k": lengths(0, 3, 10)},
    "expected page_table with kv_lens; a key_bias of -inf hides dense keys": {
        "cu_seqlens": None,
        "kv_lens": lengths(1),
    },
    "expected q of shape [total_q, num_q_heads, head_dim] (with cu_seqlens), got [1, 10, 4, 16]": {
        "q": lambda q: q[None]
    },
    "expected k of shape [total_k, num_kv_heads, head_dim] (with cu_seqlens) with the head_dim of q [10, 4, 16], got "
    "[10, 2, 8]": {"k": lambda k: k[..., :8]},
    "expected cu_seqlens of shape [batch_size + 1], got [0]": {"cu_seqlens": lengths()},
    "expected cu_seqlens of dtype int32, got int64": {"cu_seqlens": lengths(0, 3, 10, dtype=torch.int64)},
    "expected cu_seqlens contiguous, got strides [2]": {"cu_seqlens": lengths(0, 1, 3, 4, 10)[::2]},
    "expected cu_seqlens_k of shape [batch_size + 1] = [3], got [2]": {"cu_seqlens_k": lengths(0, 10)},
    "expected cu_seqlens_k, or as many keys as queries, got [10, 4, 16] and [8, 2, 16]": {"k": lambda k: k[:8]},
    "expected max_seqlen >= 0, got -1": {"max_seqlen": -1},
    "expected lse of shape [num_q_heads, total_q] = [4, 10], got [10, 4]": {"lse": torch.zeros(10, 4)},
    "expected key_bias of shape [heads, total_k] with total_k 10, got [1, 1, 10]": {"key_bias": torch.zeros(1, 1, 10)},
    "expected key_bias with 4 (query heads), 2 (kv heads) or 1 heads, got [3, 10]": {"key_bias": torch.zeros(3, 10)},
}


@pytest.mark.parametrize("message", LAYOUT_ERRORS)
def test_packed_errors(device, message):
    q, k, layout, _ = packed(device, torch.float32, [3, 7], head_dim=16)
    call = {"q": q, "k": k, "cu_seqlens": layout["cu_seqlens"]}
    for name, value in LAYOUT_ERRORS[message].items():
        call[name] = value(call[name]) if callable(value) else value
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    with pytest.raises(RuntimeError) as caught:
        tokred.attn_received(**moved)
    assert f"attn_received: {message}" in str(caught.value)


PAGED_ERRORS = {
    "expected q of shape [batch_size, num_q_heads, q_len, head_dim], got [4, 5, 24]": {"q": lambda q: q[0]},
    "expected k of shape [num_pages, page_size, num_kv_heads, head_dim] (with page_table) with the head_dim of q "
    "[2, 4, 5, 24], got [13, 16, 2, 8]": {"k": lambda k: k[..., :8]},
    "expected k with page_size 1, 16, 32, 64 or 128, got 8": {"k": lambda k: k[:, :8]},
    "expected num_q_heads to be a multiple of num_kv_heads, got 3 and 2": {"q": lambda q: q[:, :3]},
    "expected page_table of shape [batch_size, max_pages] with batch_size 2, got [1, 4]": {
        "page_table": lambda t: t[:1]
    },
    "expected page_table of dtype int32, got int64": {"page_table": lambda t: t.long()},
    "expected page_table contiguous, got strides [1, 2]": {"page_table": lambda t: t.mT.contiguous().mT},
    "expected kv_lens of shape [batch_size] = [2], got [1]": {"kv_lens": lambda n: n[:1]},
    "expected kv_lens of dtype int32, got int64": {"kv_lens": lambda n: n.long()},
}


@pytest.mark.parametrize("message", PAGED_ERRORS)
def test_paged_errors(device, message):
    q, pages, table, lens, _ = paged(device, torch.float32, 16, [50, 60], q_len=5)
    call = {"q": q, "k": pages, "page_table": table, "kv_lens": lens}
    for name, change in PAGED_ERRORS[message].items():
        call[name] = change(call[name])
    with pytest.raises(RuntimeError) as caught:
        tokred.attn_received(**call)
    assert f"attn_received: {message}" in str(caught.value)


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    q, k = make(device, torch.float32, 2, (4, 2), 5, 7, 16)
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](q, k, torch.rand(2, 4, 5, device=device))
    assert f"attn_received: {message}" in str(caught.value)
