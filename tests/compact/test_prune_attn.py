# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.compact.prune_attn")
reference, floor, TOLERANCE = module.reference, module.floor, module.TOLERANCE
prune_attn = tokred.prune_attn


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes and dtypes alone

    x, q, k = meta(8, 576, 1024), meta(8, 16, 1, 64), meta(8, 16, 577, 64)
    flops = 2 * 8 * 16 * 577 * 64
    keys, rows = 8 * 16 * 577 * 128, 2 * 8 * 192 * 2048
    assert floor(x, q, k, 192, first_key=1) == (keys + 8 * 16 * 128 + rows + 8 * 192 * 8, flops)
    scored = floor(x, q, k, 192, first_key=1, return_score=True, return_num_kept=True)
    assert scored == (keys + 8 * 16 * 128 + rows + 8 * 192 * 8 + 8 * 4 + 8 * 576 * 4, flops)
    # Packed, 2 rows of at most 4: at most all 10 tokens of 16 + 8 bytes; bounds 2 * 3 * 4; lists and counts.
    x, q, k, others = meta(10, 8), meta(2, 4, 1, 16), meta(12, 2, 16), [meta(10, dtype=torch.int64)]
    cu_seqlens = meta(3, dtype=torch.int32)
    packed = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens, "others": others}
    moved = 2 * 4 * 32 + 12 * 2 * 32 + 24 + 2 * 8 * 24 + 2 * 4 * 8 + 2 * 4
    assert floor(x, q, k, 4, first_key=1, **packed) == (moved, 2 * 4 * 12 * 16)


def select(x, score, num_keep, options):
    """What prune_topk makes of the scores."""
    names = ("keep_mask", "drop_mask", "keep_first", "keep_last", "cu_seqlens", "others")
    given = {name: options[name] for name in names if name in options}
    return tokred.prune_topk(x, score, num_keep, **given, return_num_kept=True)


def check(x, q, k, num_keep, **options):
    """The scores against the definition in float64; all that follows from them exactly."""
    x_kept, kept_idx, num_kept, score, *others = prune_attn(
        x, q, k, num_keep, **options, return_num_kept=True, return_score=True
    )
    exact = reference(x, q.double(), k.double(), num_keep, **options, return_score=True, return_num_kept=True)[3]
    rtol, atol = TOLERANCE[q.dtype]
    assert_close(score, exact.float(), rtol=rtol, atol=atol, name="score")
    again = select(x, score, num_keep, options)
    assert_close((x_kept, kept_idx, num_kept, *others), again, rtol=0, atol=0, name="prune_attn")
    if not options.keys() & {"cu_seqlens", "others"}:  # the plain overload does the same
        assert_close(prune_attn(x, q, k, num_keep, **options), (x_kept, kept_idx), rtol=0, atol=0)
    return x_kept, kept_idx, num_kept, score


def inputs(device, num_tokens, dtype=torch.float32, batch=2, heads=(4, 2), head_dim=32, extra=0, dim=3):
    x = torch.randn(batch, num_tokens, dim)
    q, k = torch.randn(batch, heads[0], 1, head_dim), torch.randn(batch, heads[1], num_tokens + extra, head_dim)
    return x.to(device), q.to(device, dtype), k.to(device, dtype)


# One less, equal, one more than a warp, a stretch of a sum; then the sizes at which the kernels change their plan: keys
# that 256 threads rank (2048), one block's row (4096), chunks of a longer one (8192).
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 197, 511, 513, 577, 1025, 2047, 2049, 4095, 4097, 9001])
def test_sizes_and_counts(device, num_tokens, simt):
    long = num_tokens > 1100
    x, q, k = inputs(device, num_tokens, batch=1 if long else 2, heads=(2, 1) if long else (4, 2), head_dim=8)
    for num_keep in {0, 1, num_tokens // 3, num_tokens - 1, num_tokens}:
        if simt and long and num_keep != num_tokens // 3:
            continue
        check(x, q, k, num_keep)


@pytest.mark.parametrize("head_dim", [1, 7, 8, 40, 64, 65, 72, 96, 128, 160, 200, 256])
def test_head_dims(device, dtype, head_dim):
    check(*inputs(device, 45, dtype, head_dim=head_dim), 11)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (28, 4), (40, 2), (130, 2)])
def test_groups(device, dtype, heads):
    check(*inputs(device, 20, dtype, heads=heads, head_dim=16), 6)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("num_tokens", [50, 4300])
def test_reductions(device, reduce, num_tokens):
    x, q, k = inputs(device, num_tokens, extra=2, head_dim=16)
    check(x, q, k, 13, reduce=reduce, first_key=1, scale=0.7)
    check(x, q, k, 13, reduce=reduce, scale=-0.3)


def test_one_launch_and_two(device):
    """66 rows are enough for one launch, a row of that many keys alone is not: its bits are the same."""
    x, q, k = inputs(device, 257, batch=66, heads=(1, 1), head_dim=256)
    k = k[:1].expand(66, -1, -1, -1)  # less to draw
    whole = prune_attn(x, q, k, 60, return_score=True)
    alone = check(x[65:], q[65:], k[65:], 60)
    assert_close([out[65:] for out in whole], [alone[0], alone[1], alone[3]], rtol=0, atol=0)


def test_as_much_as_a_block_holds(device):
    """Of shared memory: logits of all heads, and the staged queries of the deepest heads beside them."""
    check(*inputs(device, 2047, batch=1, heads=(5, 1), head_dim=8), 600)
    check(*inputs(device, 320, batch=1, heads=(42, 1), head_dim=200), 100)
    check(*inputs(device, 3, batch=1, heads=(8000, 1), head_dim=2), 2)  # more heads than it holds


def test_several_blocks_copy(device):
    x, q, k = inputs(device, 577, torch.bfloat16, batch=1, heads=(16, 16), head_dim=64, dim=400)
    check(x, q, k, 144)


def test_long_keys_and_few_tokens(device):
    """The visual tokens in the middle of a long prompt."""
    x, q, k = inputs(device, 60, extra=4100, batch=1, head_dim=16)
    check(x, q, k, 20, first_key=35)
    check(x, q, k, 20, first_key=4100, drop_mask=torch.rand(1, 60).lt(0.5).to(device))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [40, 4200])
def test_key_bias(device, heads, num_tokens):
    x, q, k = inputs(device, num_tokens, heads=(4, 2), head_dim=16, extra=1)
    bias = torch.randn(2, heads, num_tokens + 1, device=device)
    bias[0, 0, 3:9] = -torch.inf
    bias[1, heads - 1] = -torch.inf  # a head, or all, that see nothing
    score = check(x, q, k, 9, key_bias=bias, first_key=1)[3]
    assert heads > 1 or not score[1].any()
    check(x, q, k, 9, key_bias=bias[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2)[:, ::2])  # by strides
    alone = check(x[:, 6:], q, k[:, :, 6:], 9, key_bias=bias[..., 6:])
    hidden = torch.cat([torch.full_like(bias[..., :6], -torch.inf), bias[..., 6:]], -1)
    drop = (torch.arange(num_tokens, device=device) < 6).repeat(2, 1)
    assert_close(prune_attn(x, q, k, 9, key_bias=hidden, drop_mask=drop)[0], alone[0])


def test_masks_and_ends(device):
    x, q, k = inputs(device, 300)
    keep, drop = (torch.rand(2, 300).lt(p).to(device) for p in (0.3, 0.4))
    keep[1], drop[0, :200] = True, True
    for num_keep in (0, 7, 60, 150, 300):
        check(x, q, k, num_keep, keep_mask=keep)
        check(x, q, k, num_keep, drop_mask=drop, keep_last=3)
        check(x, q, k, num_keep, keep_mask=keep, drop_mask=drop, keep_first=2, keep_last=4)


def test_ties_go_to_the_lowest_index(device):
    """Repeated keys tie to the last bit, wherever they lie."""
    x, q, _ = inputs(device, 700, head_dim=64)
    k = torch.randn(2, 2, 10, 64, device=device)[:, :, torch.arange(700) % 10]
    kept_idx, _, score = check(x, q, k, 75)[1:]
    for row, kept in zip(score, kept_idx):
        assert row.unique().numel() == 10
        best = row[:10].argmax()
        assert kept[kept % 10 == best].numel() == 70  # all of the best, and the first 5 of the next
        rest = kept[kept % 10 != best]
        assert (rest // 10).tolist() == [0, 1, 2, 3, 4]


def test_nan_and_infinity(device):
    for num_tokens in (40, 4200):
        x, q, k = inputs(device, num_tokens, torch.bfloat16)
        k[0, 0, 5] = torch.nan  # of a head: every score is NaN
        k[1, 1, 7] = torch.inf
        q[1, :, :, 0] = 100.0
        score = check(x, q, k, 6)[3]
        assert score[0].isnan().all()
        assert prune_attn(x, q, k, 6)[1][0].tolist() == list(range(6))
        q, k = q.nan_to_num(0, 0, 0), k.nan_to_num(0, 0, 0)
        big = check(x, 1000 * q, 1000 * k, 6, reduce="max")[3]  # logits far beyond what an exponential holds
        assert big.isfinite().all() and (big.amax(1) == 1).all()


def ends(lens, device):
    return torch.tensor([0, *lens], device=device).cumsum(0).int()


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_packed_equals_dense(device, dtype, extra):
    lens = [5, 0, 700, 33, 1]
    cu_seqlens, cu_seqlens_k = ends(lens, device), ends([n + extra for n in lens], device)
    total, total_k = sum(lens), sum(lens) + 5 * extra
    x, q, k = inputs(device, total, dtype, batch=1)
    q, k = torch.randn(5, 4, 1, 32).to(device, dtype), torch.randn(total_k, 2, 32).to(device, dtype)
    bias, keep = torch.randn(4, total_k, device=device), torch.rand(total).lt(0.1).to(device)
    options = {"cu_seqlens": cu_seqlens, "others": [keep, torch.arange(total, device=device)], "keep_last": 1}
    options |= {"cu_seqlens_k": cu_seqlens_k} if extra else {}
    options |= {"key_bias": bias, "keep_mask": keep, "first_key": extra}
    for max_seqlen in (700 + extra, None):
        x_kept, kept_idx, num_kept, score = check(x[0], q, k, 8, **options, max_seqlen=max_seqlen)
    for b, length in enumerate(lens):
        part, part_k = (slice(*cu[b : b + 2].tolist()) for cu in (cu_seqlens, cu_seqlens_k))
        count = min(8, length)
        alone = prune_attn(
            x[:, part],
            q[b : b + 1],
            k[None, part_k].transpose(1, 2),
            count,
            key_bias=bias[None, :, part_k],
            keep_mask=keep[None, part],
            first_key=extra,
            keep_last=1,
            return_score=True,
        )
        assert num_kept[b] == count
        expected = (x_kept[b : b + 1, :count], kept_idx[b : b + 1, :count], score[None, part])
        assert_close(alone, expected, rtol=0, atol=0)
    check(x[0], q, k, 900, **options)  # more than any sequence has
    check(x[0], q, k, 5000, **options)  # or a block lists


def test_tokens_of_no_sequence_and_without_a_key(device):
    x, q, k = inputs(device, 30, batch=1)
    q, k = q.expand(2, -1, -1, -1), k[0].transpose(0, 1)
    cu_seqlens, cu_seqlens_k = (torch.tensor(e, dtype=torch.int32, device=device) for e in ([0, 10, 24], [0, 8, 30]))
    options = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "return_score": True}
    score = prune_attn(x[0], q, k, 4, **options)[3]
    assert (score[:8] > 0).all() and not score[8:10].any() and (score[10:24] > 0).all() and not score[24:].any()
    score = prune_attn(x[0], q, k, 4, **options, max_seqlen=5)[3]  # what lies beyond is not looked at
    for first in (0, 10):
        assert_close(score[first : first + 5].sum(), torch.ones((), device=device))
    assert not score[5:10].any() and not score[15:].any()


def test_bad_offsets_read_nothing_out_of_bounds(device):
    x, q, k = inputs(device, 30, batch=1)
    q, k = q.expand(3, -1, -1, -1), k[0].transpose(0, 1)
    cu_seqlens = torch.tensor([-5, 10, 20, 2**30], dtype=torch.int32, device=device)
    x_kept, kept_idx, num_kept = prune_attn(x[0], q, k, 4, cu_seqlens=cu_seqlens)
    assert (kept_idx < 30).all() and (num_kept <= 4).all() and torch.isfinite(x_kept).all()


def test_views(device, dtype):
    x, q, k = inputs(device, 40, dtype, head_dim=24, dim=64)
    expected = check(x, q, k, 9)
    blhd = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(check(x, q, blhd, 9), expected, rtol=0, atol=0)
    odd = torch.randn(2, 2, 40, 25, device=device, dtype=dtype)[..., 1:]  # misaligned rows
    odd.copy_(k)
    assert_close(check(x, q, odd, 9), expected, rtol=0, atol=0)
    many = torch.randn(2, 4, 5, 24, device=device, dtype=dtype)
    many[:, :, 3] = q[:, :, 0]
    assert_close(check(x, many[:, :, 3:4], k, 9), expected, rtol=0, atol=0)
    check(x[:, ::2, 1:18], q, k[:, :, 1::2], 9)
    check(x[:1].expand(2, -1, -1), q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), 9)


def test_companions(device):
    x, q, k = inputs(device, 40)
    check(x, q, k, 7, others=[torch.randn(2, 40, n, device=device) for n in range(15)])
    check(x.long(), q, k, 7, others=[])


def test_offsets_beyond_2_31(device):
    memory = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=device)
    k = memory.as_strided((2, 1, 3, 8), (16, 8, 2**31 + 64, 1))
    k.copy_(torch.randn(2, 1, 3, 8))
    x = memory.as_strided((2, 3, 4), (100, 2**30 + 7, 1), 1000)
    x.copy_(torch.arange(24).reshape(2, 3, 4))
    check(x, torch.randn(2, 2, 1, 8).to(device, torch.bfloat16), k, 2)


@given(st.data())
def test_any_scores(data):
    """Logits that are given exactly: one channel, whole keys, a query of 1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 60.0, -300.0, -float("inf"), float("inf"), float("nan")])
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    n = len(row)
    masks = [torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))]) for _ in range(2)]
    bias = torch.tensor(row).reshape(1, 1, n).to(device)
    zeros = torch.zeros(1, 1, n, 4, device=device)
    x, num_keep = torch.randn(1, n, 2, device=device), data.draw(st.integers(0, n))
    keep, drop = (mask.to(device) for mask in masks)
    check(x, zeros[:, :, :1], zeros, num_keep, key_bias=bias, keep_mask=keep, drop_mask=drop, reduce="sum")


def test_row_is_independent_of_threads(device, threads):
    x, q, k = inputs(device, 3000, torch.bfloat16, heads=(6, 3), extra=1)
    first, *rest = threads(lambda: prune_attn(x, q, k, 50, first_key=1, return_score=True))
    for other in rest:
        assert_close(other, first, rtol=0, atol=0)


def test_empty(device):
    x, q, k = inputs(device, 5)
    assert prune_attn(x[:0], q[:0], k[:0], 3)[0].shape == (0, 3, 3)
    assert prune_attn(x[:, :0], q, k[:, :, :0], 0)[1].shape == (2, 0)
    assert prune_attn(x[:, :0], q, k, 0, return_score=True)[2].shape == (2, 0)
    assert prune_attn(x[:, :, :0], q, k, 2)[0].shape == (2, 2, 0)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert prune_attn(x[0], q[:0], k[0].transpose(0, 1), 2, cu_seqlens=none)[1].shape == (0, 2)
    zeros = torch.zeros(3, dtype=torch.int32, device=device)
    x_kept, kept_idx, num_kept = prune_attn(x[0], q, k[0].transpose(0, 1), 2, cu_seqlens=zeros, max_seqlen=0)
    assert not x_kept.any() and (kept_idx == -1).all() and not num_kept.any()


def test_gradients_equal_reference(device, dtype):
    cu_seqlens = torch.tensor([0, 4, 30], dtype=torch.int32, device=device)
    _, q, k = inputs(device, 15)
    for packed in (False, True):
        grads = []
        for function in (prune_attn, reference):
            torch.manual_seed(1)
            x, other = torch.randn(2, 15, 4).to(device, dtype), torch.randn(2, 15, 2, 3).to(device, dtype)
            x, other = x.requires_grad_(), other.requires_grad_()
            companions = [other.flatten(0, 1) if packed else other, (x > 0)[..., 0].flatten(0, int(packed))]
            if packed:
                keys = k.transpose(1, 2).flatten(0, 1)
                out = function(x.flatten(0, 1), q, keys, 6, cu_seqlens=cu_seqlens, others=companions)
            else:
                out = function(x, q, k, 6, others=companions)
            weight = torch.randn(out[0].shape).to(device, dtype)
            ((out[0] * weight).sum() + (out[-1][0] ** 2).sum()).backward()
            grads.append((x.grad, other.grad))
        assert_close(grads[0], grads[1])
    x = torch.randn(2, 15, 4, device=device, requires_grad=True)
    learned = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    prune_attn(x, *learned, 3)[0].sum().backward()
    assert x.grad.sum() == 2 * 3 * 4 and all(t.grad is None for t in learned)
    x_kept, _, score = prune_attn(x, *learned, 3, keep_first=3, return_score=True)
    assert x_kept.requires_grad and not score.requires_grad
    x.grad = None
    x_kept.sum().backward()
    assert x.grad[..., 0].tolist() == [[1.0] * 3 + [0.0] * 12] * 2


def test_vmap(device):
    x, q, k = (torch.randn(3, *t.shape, device=device) for t in inputs(device, 11))
    mapped = torch.vmap(lambda *a: prune_attn(*a, 4, return_score=True), in_dims=(0, 0, 1))(x, q, k.transpose(0, 1))
    for i in range(3):
        expected = prune_attn(x[i], q[i], k[i], 4, return_score=True)
        assert_close([m[i] for m in mapped], list(expected), rtol=0, atol=0)
    plain = torch.vmap(lambda a: prune_attn(a, q[0], k[0], 4)[1])(x)
    assert_close(plain[2], prune_attn(x[2], q[0], k[0], 4)[1])
    cu_seqlens = torch.tensor([0, 5, 11], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="prune_attn: a packed input has no batch dimension"):
        torch.vmap(lambda a: prune_attn(a, q[0], k[0, 0].transpose(0, 1), 4, cu_seqlens=cu_seqlens)[0])(x[:, 0])


def test_autocast_casts_queries_and_keys_alone(device):
    x, q, k = inputs(device, 50)
    bias = torch.randn(2, 1, 50, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        x_kept, _, score = prune_attn(x, q, k, 9, key_bias=bias, return_score=True)
    assert x_kept.dtype == torch.float32
    expected = prune_attn(x, q.bfloat16(), k.bfloat16(), 9, key_bias=bias, return_score=True)
    assert_close((x_kept, score), (expected[0], expected[2]), rtol=0, atol=0)


def cu(x, *values):
    return torch.tensor(values or (0, 2, 6), device=x.device).int()


def flat(k):
    return k[0].transpose(0, 1)


ERRORS = {
    "expected num_keep in [0, 6], got 7": lambda x, q, k: prune_attn(x, q, k, 7),
    "expected num_keep >= 0, got -1": lambda x, q, k: prune_attn(x[0], q, flat(k), -1, cu_seqlens=cu(x)),
    "expected x of shape [batch_size, num_tokens, dim], got [6, 4]": lambda x, q, k: prune_attn(x[0], q, k, 2),
    "expected q of shape [batch_size, num_q_heads, 1, head_dim] with batch_size 2, got [2, 4, 2, 8]": (
        lambda x, q, k: prune_attn(x, q.expand(-1, -1, 2, -1), k, 2)
    ),
    "expected q of shape [batch_size, num_q_heads, 1, head_dim] with batch_size 1, got [2, 4, 1, 8]": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, cu_seqlens=cu(x, 0, 6))
    ),
    "expected k of shape [batch_size, num_kv_heads, kv_len, head_dim] with batch_size 2, got [1, 2, 6, 8]": (
        lambda x, q, k: prune_attn(x, q, k[:1], 2)
    ),
    "expected k of shape [total_tokens, num_kv_heads, head_dim] (with cu_seqlens), got [2, 2, 6, 8]": (
        lambda x, q, k: prune_attn(x[0], q, k, 2, cu_seqlens=cu(x))
    ),
    "expected k of the dtype of q (float32), got bfloat16": lambda x, q, k: prune_attn(x, q, k.bfloat16(), 2),
    "expected q of dtype float32, float16 or bfloat16, got int64": lambda x, q, k: prune_attn(x, q.long(), k, 2),
    "expected q with head_dim in [1, 256], got 264": (
        lambda x, q, k: prune_attn(x, q.repeat(1, 1, 1, 33), k.repeat(1, 1, 1, 33), 2)
    ),
    "expected k with the head_dim 8 of q, got [2, 2, 6, 7]": lambda x, q, k: prune_attn(x, q, k[..., :7], 2),
    "expected q contiguous in its last dimension, got strides [64, 16, 16, 2]": (
        lambda x, q, k: prune_attn(x, q.repeat(1, 1, 1, 2)[..., ::2], k, 2)
    ),
    "expected k contiguous in its last dimension, got strides [192, 96, 16, 2]": (
        lambda x, q, k: prune_attn(x, q, k.repeat(1, 1, 1, 2)[..., ::2], 2)
    ),
    "expected num_q_heads to be a multiple of num_kv_heads, got 3 and 2": (
        lambda x, q, k: prune_attn(x, q[:, :3], k, 2)
    ),
    'expected reduce to be "mean", "sum" or "max", got "min"': lambda x, q, k: prune_attn(x, q, k, 2, reduce="min"),
    "expected a finite scale, got inf": lambda x, q, k: prune_attn(x, q, k, 2, scale=float("inf")),
    "expected first_key >= 0, got -1": lambda x, q, k: prune_attn(x, q, k, 2, first_key=-1),
    "expected k with first_key + num_tokens (1 + 6) keys or more, got 6": (
        lambda x, q, k: prune_attn(x, q, k, 2, first_key=1)
    ),
    "expected key_bias of dtype float32, got bfloat16": (
        lambda x, q, k: prune_attn(x, q, k, 2, key_bias=k[..., 0].bfloat16())
    ),
    "expected key_bias of shape [batch_size, heads, kv_len] with batch_size 2 and kv_len 6, got [2, 6]": (
        lambda x, q, k: prune_attn(x, q, k, 2, key_bias=x[..., 0].contiguous())
    ),
    "expected key_bias of shape [heads, total_k] with total_k 6, got [1, 2, 6]": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, key_bias=k[:1, :, :, 0].contiguous(), cu_seqlens=cu(x))
    ),
    "expected key_bias with 4 (query heads), 2 (kv heads) or 1 heads, got [2, 3, 6]": (
        lambda x, q, k: prune_attn(x, q, k, 2, key_bias=x.transpose(1, 2)[:, :3].contiguous())
    ),
    "expected key_bias contiguous in its last dimension, got strides [96, 48, 8]": (
        lambda x, q, k: prune_attn(x, q, k, 2, key_bias=k[..., 0])
    ),
    "expected keep_mask of shape [batch_size, num_tokens] = [2, 6], got [2, 3]": (
        lambda x, q, k: prune_attn(x, q, k, 2, keep_mask=x[:, :3, 0].contiguous() > 0)
    ),
    "expected drop_mask of dtype bool, got float32": lambda x, q, k: prune_attn(x, q, k, 2, drop_mask=x[..., 0]),
    "expected keep_first >= 0, got -1": lambda x, q, k: prune_attn(x, q, k, 2, keep_first=-1),
    "expected keep_last >= 0, got -3": lambda x, q, k: prune_attn(x, q, k, 2, keep_last=-3),
    "expected cu_seqlens with cu_seqlens_k": lambda x, q, k: prune_attn(x, q, k, 2, cu_seqlens_k=cu(x)),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, cu_seqlens=cu(x).long())
    ),
    "expected cu_seqlens_k of shape [batch_size + 1] = [3], got [2]": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, cu_seqlens=cu(x), cu_seqlens_k=cu(x, 0, 6))
    ),
    "expected cu_seqlens_k of dtype int32, got int64": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, cu_seqlens=cu(x), cu_seqlens_k=cu(x).long())
    ),
    "expected cu_seqlens_k, or as many keys as tokens and first_key 0, got 5 keys, 6 tokens and first_key 0": (
        lambda x, q, k: prune_attn(x[0], q, flat(k)[:5], 2, cu_seqlens=cu(x))
    ),
    "expected cu_seqlens_k, or as many keys as tokens and first_key 0, got 6 keys, 6 tokens and first_key 1": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, cu_seqlens=cu(x), first_key=1)
    ),
    "expected max_seqlen in [0, 6], got 7": (
        lambda x, q, k: prune_attn(x[0], q, flat(k), 2, cu_seqlens=cu(x), max_seqlen=7)
    ),
    "expected at most 15 companions in others, got 16": lambda x, q, k: prune_attn(x, q, k, 2, others=[x] * 16),
    "expected others[0] of shape [batch_size, num_tokens, ...] with the sizes of x [2, 6, 4], got [2, 5, 4]": (
        lambda x, q, k: prune_attn(x, q, k, 2, others=[x[:, :5]])
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    x, q, k = torch.randn(2, 6, 4), torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8)
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](*(t.to(device) for t in (x, q, k)))
    assert f"prune_attn: {message}" in str(caught.value)
