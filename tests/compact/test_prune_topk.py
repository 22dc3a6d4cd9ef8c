# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hard_scores import hard_scores
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.compact.prune_topk").reference
floor = importlib.import_module("tokred.compact.prune_topk").floor


def test_floor_by_hand():
    meta, bf16 = {"device": "meta"}, torch.bfloat16  # floors look at shapes and dtypes alone
    x, score = torch.empty(8, 576, 1024, dtype=bf16, **meta), torch.empty(8, 576, **meta)
    assert floor(x, score, 192) == (8 * 576 * 4 + 2 * 8 * 192 * 2048 + 8 * 192 * 8, 0)  # scores, rows in and out, list
    # Packed, 3 rows of at most 4: at most all 10 tokens of 16 + 8 bytes; bounds 4 * 4; lists and counts.
    x, score, others = torch.empty(10, 8, dtype=bf16, **meta), torch.empty(10, **meta), [torch.empty(10, **meta).long()]
    cu_seqlens = torch.empty(4, dtype=torch.int32, **meta)
    moved = 40 + 16 + 2 * 10 * 24 + 3 * 4 * 8 + 3 * 4
    assert floor(x, score, 4, cu_seqlens=cu_seqlens, others=others) == (moved, 0)


def check(x, score, k, **options):
    """Everything exact: indices are integers and rows are copies."""
    actual = tokred.prune_topk(x, score, k, **options)
    assert_close(actual, reference(x, score, k, **options), rtol=0, atol=0, name="prune_topk")
    return actual


# One less, equal, one more than a vector, a warp, a block; then the sizes at which the kernels change their plan: sampled
# pivots (4096), one block's shared list (4096), registers (32768), chunks beyond.
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 197, 577, 1023, 1025, 4095, 4097, 5003, 33001]


@pytest.mark.parametrize("num_tokens", SIZES)
def test_sizes_and_counts(device, num_tokens, simt):
    for k in {0, 1, num_tokens // 40, num_tokens // 2, num_tokens - 1, num_tokens}:
        if simt and num_tokens > 4097 and k not in (1, num_tokens // 40, num_tokens // 2):
            continue
        check(torch.randn(2, num_tokens, 3, device=device), torch.randn(2, num_tokens, device=device), k)


@pytest.mark.parametrize("num_tokens", [33, 577, 5003])
@pytest.mark.parametrize("kind", ["constant", "few", "bf16 softmax", "sorted", "reversed", "nan", "inf", "periodic"])
def test_hard_scores(device, num_tokens, kind):
    score = hard_scores(kind, 3, num_tokens).to(device)
    x = torch.randn(3, num_tokens, 2, device=device)
    for k in (1, 7, num_tokens // 9 + 1, num_tokens // 2, num_tokens - 1):
        check(x, score, k)


def test_denormal_and_zero_order(device):
    """Denormal scores are numbers like others, whatever the flush mode of the thread."""
    score = torch.tensor([[0.0, 1e-45, -1e-45, 1e-40, -0.0, 2e-45]], device=device)
    x = torch.arange(6.0, device=device).reshape(1, 6, 1)
    assert tokred.prune_topk(x, score, 3)[1].tolist() == [[1, 3, 5]]
    assert tokred.prune_topk(x, score, 4)[1].tolist() == [[0, 1, 3, 5]]
    assert tokred.prune_topk(x, score, 5)[1].tolist() == [[0, 1, 3, 4, 5]]


@pytest.mark.parametrize("num_tokens", [9, 300, 5003])
def test_masks(device, num_tokens):
    score = torch.randn(4, num_tokens).round(decimals=1).to(device)
    x = torch.randn(4, num_tokens, 2, device=device)
    keep = torch.rand(4, num_tokens).lt(0.3).to(device)
    drop = torch.rand(4, num_tokens).lt(0.4).to(device)
    keep[1], drop[2], keep[3], drop[3] = True, True, True, True
    for k in (0, 1, num_tokens // 4, num_tokens // 2, num_tokens):
        check(x, score, k, keep_mask=keep, return_num_kept=True)
        check(x, score, k, drop_mask=drop, return_num_kept=True)
        check(x, score, k, keep_mask=keep, drop_mask=drop, return_num_kept=True)
    score[0, ::2] = float("nan")
    keep[0, ::2] = True  # more forced than k, some of them NaN: numbers first
    check(x, score, num_tokens // 3, keep_mask=keep)


@pytest.mark.parametrize("num_tokens", [9, 300, 5003])
def test_ends_are_kept(device, num_tokens):
    """A prompt in front, text behind: forced like a mask, and counted towards k."""
    score = torch.randn(3, num_tokens).round(decimals=1).to(device)
    x = torch.randn(3, num_tokens, 2, device=device)
    mask = torch.rand(3, num_tokens).lt(0.1).to(device)
    for first, last in ((2, 0), (0, 3), (4, 3)):
        ends = {"keep_first": first, "keep_last": last}
        for k in (7, max(7, num_tokens // 2)):
            kept_idx = check(x, score, k, **ends)[1]
            assert (kept_idx[:, :first] == torch.arange(first, device=device)).all()
            assert (kept_idx[:, k - last :] == torch.arange(num_tokens - last, num_tokens, device=device)).all()
        check(x, score, 3, **ends)  # more are forced than kept, once
    check(x, score, 7, keep_mask=mask, drop_mask=~mask, keep_first=2, keep_last=2, return_num_kept=True)
    check(x, score, num_tokens, keep_first=num_tokens + 5)


@pytest.mark.parametrize("num_axes", [None, 1, 3, 4])
@pytest.mark.parametrize("renumber", [False, True])
def test_position_ids(device, num_axes, renumber):
    lens = [5, 0, 7, 33]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(45, 6, device=device), torch.randn(45, device=device)
    lead = () if num_axes is None else (num_axes,)
    ids = torch.randint(99, (*lead, 45)).to(device)
    options = {"cu_seqlens": cu_seqlens, "position_ids": ids, "renumber": renumber, "keep_first": 1}
    kept_idx, num_kept, positions = check(x, score, 6, **options)[1:]
    again = check(x, score, 6, **options, others=[score])[-1]
    assert_close(again, positions)
    for b, count in enumerate(num_kept.tolist()):
        start = int(cu_seqlens[b])
        kept = torch.arange(count, device=device) if renumber else ids[..., kept_idx[b, :count] + start]
        assert_close(positions[..., b, :count], kept.to(ids.dtype).expand(*lead, count))
        assert not positions[..., b, count:].any()
    dense = {"position_ids": torch.randint(99, (*lead, 3, 15)).to(device).int(), "renumber": renumber}
    check(x.reshape(3, 15, 6), score.reshape(3, 15), 6, **dense)
    check(x.reshape(3, 15, 6), score.reshape(3, 15), 0, **dense, others=[])


def test_long_rows_with_excluded_tokens(device):
    """A row of several chunks: some without a token that may be kept, one row without any."""
    score = torch.randn(3, 33001).round(decimals=2).to(device)
    drop = torch.rand(3, 33001).lt(0.3)
    drop[0, :17000], drop[1], drop[2, 40:] = True, True, True
    check(torch.randn(3, 33001, 1, device=device), score, 300, drop_mask=drop.to(device), return_num_kept=True)
    check(torch.randn(3, 33001, 1, device=device)[:1], score[:1], 300, keep_first=20, keep_last=100)


def test_as_many_companions_as_there_may_be(device):
    others = [torch.randn(2, 40, n, device=device) for n in range(15)]
    check(torch.randn(2, 40, 3, device=device), torch.randn(2, 40, device=device), 7, others=others)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 33, 100])
def test_row_dtypes(device, dim):
    score = torch.randn(2, 19, device=device)
    for row_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool):
        check(torch.randn(2, 19, dim).mul(9).to(row_dtype).to(device), score, 5)


def test_views(device):
    base = torch.randn(2, 40, 64, device=device)
    score = torch.randn(2, 40, device=device)
    check(base[:, :, 1:18], score, 9)  # misaligned rows
    check(base[:, ::2], score[:, :20], 9)
    check(base.transpose(0, 1).contiguous().transpose(0, 1), score, 9)
    check(base[:1].expand(2, 40, 64), score, 9)
    check(base, score[:1].expand(2, 40), 9)


def test_ragged_equals_dense(device):
    lens = [5, 0, 700, 33, 1]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 6, device=device), torch.randn(sum(lens), device=device).round(decimals=1)
    keep, drop = score > 1.2, score < -1
    positions = torch.arange(sum(lens), device=device)
    options = {"keep_mask": keep, "drop_mask": drop, "others": [positions, x.bfloat16().reshape(-1, 2, 3)]}
    for max_seqlen in (700, None):
        actual = check(x, score, 8, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **options)
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        k = min(8, length)
        alone = tokred.prune_topk(
            x[None, part], score[None, part], k, keep_mask=keep[None, part], drop_mask=drop[None, part]
        )
        assert_close(actual[0][b, :k], alone[0][0], rtol=0, atol=0)
        assert_close(actual[1][b, :k], alone[1][0])
    check(x, score, 900, cu_seqlens=cu_seqlens)  # more than any sequence has


def test_long_packed_list(device):
    """More slots than a block keeps in shared memory, for short rows."""
    cu_seqlens = torch.tensor([0, 10, 30], dtype=torch.int32, device=device)
    check(torch.randn(30, 2, device=device), torch.randn(30, device=device), 5000, cu_seqlens=cu_seqlens, max_seqlen=20)


def test_bad_offsets_read_nothing_out_of_bounds(device):
    x, score = torch.randn(30, 2, device=device), torch.randn(30, device=device)
    cu_seqlens = torch.tensor([0, -5, 2**30, 10, 30], dtype=torch.int32, device=device)
    x_kept, kept_idx, num_kept = tokred.prune_topk(x, score, 4, cu_seqlens=cu_seqlens)
    assert (kept_idx < 30).all() and (num_kept <= 4).all() and torch.isfinite(x_kept).all()


def test_offsets_beyond_2_31(device):
    x = torch.empty(2**32 + 4096, dtype=torch.uint8, device=device).as_strided((2, 3, 4), (100, 2**31 + 7, 1))
    x.copy_(torch.arange(24).reshape(2, 3, 4))
    check(x, torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], device=device), 2)
    score = torch.empty(2**31 + 99, dtype=torch.bfloat16, device=device).as_strided((2, 33), (2**31 + 7, 1))
    score.copy_(torch.randn(2, 33))
    check(torch.randn(2, 33, 2, device=device), score, 5)


@given(st.data())
def test_any_row(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    n = len(row)
    k = data.draw(st.integers(0, n))
    masks = [
        torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))], device=device) for _ in range(2)
    ]
    score = torch.tensor([row], device=device)
    _, kept_idx, num_kept = check(
        torch.randn(1, n, 2, device=device), score, k, keep_mask=masks[0], drop_mask=masks[1], return_num_kept=True
    )
    kept = kept_idx[0, : num_kept[0]]
    assert (kept.diff() > 0).all() and (kept_idx[0, num_kept[0] :] == -1).all()
    assert not masks[1][0, kept].any()


def test_row_is_independent_of_its_batch(device, threads):
    x, score = torch.randn(9, 600, 5, device=device), torch.randn(9, 600, device=device).bfloat16()
    alone = [tokred.prune_topk(x[b : b + 1], score[b : b + 1], 50)[1] for b in range(9)]
    for result in threads(lambda: tokred.prune_topk(x, score, 50)[1]):
        assert_close(result, torch.cat(alone))


def test_empty(device):
    x, score = torch.randn(2, 5, 3, device=device), torch.randn(2, 5, device=device)
    assert tokred.prune_topk(x[:0], score[:0], 3)[0].shape == (0, 3, 3)
    assert tokred.prune_topk(x[:, :0], score[:, :0], 0)[1].shape == (2, 0)
    assert tokred.prune_topk(x[:, :, :0], score, 2)[0].shape == (2, 2, 0)
    check(x[:, :, :0], score, 2)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert tokred.prune_topk(x[0], score[0], 2, cu_seqlens=none)[1].shape == (0, 2)


def test_gradients_equal_reference(device, dtype):
    cu_seqlens = torch.tensor([0, 4, 30], dtype=torch.int32, device=device)
    score = torch.randn(2, 15, device=device)
    for packed in (False, True):
        grads = []
        for function in (tokred.prune_topk, reference):
            torch.manual_seed(1)
            x = torch.randn(2, 15, 4).to(device, dtype).requires_grad_()
            other = torch.randn(2, 15, 2, 3).to(device, dtype).requires_grad_()
            if packed:
                out = function(
                    x.flatten(0, 1),
                    score.flatten(),
                    6,
                    cu_seqlens=cu_seqlens,
                    others=[other.flatten(0, 1), score.flatten()],
                )
            else:
                out = function(x, score, 6, others=[other, score])
            weight = torch.randn(out[0].shape).to(device, dtype)
            ((out[0] * weight).sum() + (out[-1][0] ** 2).sum()).backward()
            grads.append((x.grad, other.grad))
        assert_close(grads[0], grads[1])
    for options in ({}, {"others": [score]}):  # trailing arguments that do not have their default value
        x = torch.randn(2, 15, 4, device=device, requires_grad=True)
        tokred.prune_topk(x, score, 3, keep_first=3, **options)[0].sum().backward()
        assert x.grad[..., 0].tolist() == [[1.0] * 3 + [0.0] * 12] * 2
    x = torch.randn(2, 15, 4, device=device, requires_grad=True)
    learned = score.clone().requires_grad_()
    tokred.prune_topk(x, learned, 3)[0].sum().backward()
    assert x.grad.sum() == 2 * 3 * 4 and learned.grad is None


def test_vmap(device):
    x, score = torch.randn(3, 2, 11, 4, device=device), torch.randn(2, 11, 3, device=device)
    mapped = torch.vmap(lambda a, s: tokred.prune_topk(a, s, 4), in_dims=(0, 2))(x, score)
    for i in range(3):
        assert_close([m[i] for m in mapped], tokred.prune_topk(x[i], score[..., i].contiguous(), 4), rtol=0, atol=0)
    ids = torch.arange(66, device=device).reshape(3, 2, 11)  # of the axes; the batch of vmap is that of x
    mapped = torch.vmap(lambda a: tokred.prune_topk(a, score[..., 0], 4, keep_last=1, position_ids=ids)[2])(x)
    for i in range(3):
        expected = tokred.prune_topk(x[i], score[..., 0].contiguous(), 4, keep_last=1, position_ids=ids)[2]
        assert_close(mapped[i], expected)
    none = torch.tensor([0, 11], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="prune_topk: a packed input has no batch dimension"):
        torch.vmap(lambda a: tokred.prune_topk(a, score[0, :, 0].contiguous(), 4, cu_seqlens=none)[0])(x[:, 0])


def test_autocast_leaves_scores_alone(device):
    x, score = torch.randn(2, 50, 4, device=device), torch.randn(2, 50, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        x_kept, kept_idx = tokred.prune_topk(x, score, 9)
    assert x_kept.dtype == torch.float32
    assert_close(kept_idx, reference(x, score, 9)[1])


def test_three_positional_arguments(device):
    x, score = torch.randn(1, 6, 2, device=device), torch.tensor([[0.1, 0.9, 0.2, 0.9, 0.0, 0.9]], device=device)
    x_kept, kept_idx = torch.ops.tokred.prune_topk(x, score, 2)
    assert kept_idx.tolist() == [[1, 3]] and torch.equal(x_kept, x[:, [1, 3]])


ERRORS = {
    "expected k in [0, 6], got 7": lambda x, s: tokred.prune_topk(x, s, 7),
    "expected k in [0, 6], got -1": lambda x, s: tokred.prune_topk(x, s, -1),
    "expected x of shape [batch_size, num_tokens, dim], got [6, 4]": lambda x, s: tokred.prune_topk(x[0], s, 2),
    "expected score of shape [batch_size, num_tokens] = [2, 6], got [6]": lambda x, s: tokred.prune_topk(x, s[0], 2),
    "expected score of dtype float32, float16 or bfloat16, got int64": lambda x, s: tokred.prune_topk(x, s.long(), 2),
    "expected score contiguous in its last dimension, got strides [1, 2]": (
        lambda x, s: tokred.prune_topk(x, s.T.contiguous().T, 2)
    ),
    "expected x contiguous after its token dimension, got strides [48, 8, 2]": (
        lambda x, s: tokred.prune_topk(x.repeat(1, 1, 2)[:, :, ::2], s, 2)
    ),
    "expected keep_mask of dtype bool, got float32": lambda x, s: tokred.prune_topk(x, s, 2, keep_mask=s),
    "expected drop_mask of shape [batch_size, num_tokens] = [2, 6], got [2, 3]": (
        lambda x, s: tokred.prune_topk(x, s, 2, drop_mask=s[:, :3].contiguous() > 0)
    ),
    "expected keep_mask contiguous, got strides [0, 1]": (
        lambda x, s: tokred.prune_topk(x, s, 2, keep_mask=(s[:1] > 0).expand(2, 6))
    ),
    "expected others[0] of shape [batch_size, num_tokens, ...] with the sizes of x [2, 6, 4], got [2, 5]": (
        lambda x, s: tokred.prune_topk(x, s, 2, others=[s[:, :5]])
    ),
    "expected at most 15 companions in others, got 16": lambda x, s: tokred.prune_topk(x, s, 2, others=[s] * 16),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda x, s: tokred.prune_topk(x[0], s[0], 2, cu_seqlens=torch.tensor([0, 6], device=x.device))
    ),
    "expected cu_seqlens of shape [batch_size + 1], got []": (
        lambda x, s: tokred.prune_topk(x[0], s[0], 2, cu_seqlens=torch.tensor(0, device=x.device).int())
    ),
    "expected x of shape [total_tokens, dim] (with cu_seqlens), got [2, 6, 4]": (
        lambda x, s: tokred.prune_topk(x, s, 2, cu_seqlens=torch.tensor([0, 6], device=x.device).int())
    ),
    "expected max_seqlen in [0, 6], got 7": (
        lambda x, s: tokred.prune_topk(
            x[0], s[0], 2, cu_seqlens=torch.tensor([0, 6], device=x.device).int(), max_seqlen=7
        )
    ),
    "expected keep_first >= 0, got -1": lambda x, s: tokred.prune_topk(x, s, 2, keep_first=-1),
    "expected keep_last >= 0, got -3": lambda x, s: tokred.prune_topk(x, s, 2, keep_last=-3),
    "expected position_ids with renumber, got none": lambda x, s: tokred.prune_topk(x, s, 2, renumber=True),
    "expected position_ids of shape [batch_size, num_tokens] = [2, 6], or with axes before it, got [6]": (
        lambda x, s: tokred.prune_topk(x, s, 2, position_ids=s[0])
    ),
    "expected position_ids of shape [total_tokens] = [6], or with axes before it, got [2, 5]": (
        lambda x, s: tokred.prune_topk(
            x[0], s[0], 2, cu_seqlens=torch.tensor([0, 6], device=x.device).int(), position_ids=s[:, :5], renumber=True
        )
    ),
    "expected k >= 0, got -2": (
        lambda x, s: tokred.prune_topk(x[0], s[0], -2, cu_seqlens=torch.tensor([0, 6], device=x.device).int())
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    x, score = torch.randn(2, 6, 4, device=device), torch.randn(2, 6, device=device)
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](x, score)
    assert f"prune_topk: {message}" in str(caught.value)
