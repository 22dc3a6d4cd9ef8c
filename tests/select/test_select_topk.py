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

module = importlib.import_module("tokred.select.select_topk")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    meta = {"device": "meta"}  # floors look at shapes and dtypes alone
    score, mask = torch.empty(8, 576, **meta), torch.empty(8, 576, dtype=torch.bool, **meta)
    assert floor(score, 192) == (8 * 576 * 4 + 8 * 192 * 8, 0)  # scores, lists
    assert floor(score, 192, drop_mask=mask, return_num_kept=True) == (8 * 576 * 5 + 8 * 192 * 8 + 8 * 4, 0)
    heads, k = torch.empty(2, 8, 1000, dtype=torch.bfloat16, **meta), torch.empty(2, 8, dtype=torch.int64, **meta)
    moved = 16 * (1000 * 2 + 8) + 16 * (100 * 8 + 4)  # scores and counts in, lists and counts out
    assert floor(heads, k, max_k=100) == (moved, 0)
    assert floor(heads, k, max_k=100, complement=True) == (moved + 16 * 900 * 8, 0)
    # Packed, 3 rows of 10 tokens together: bounds 4 * 4; lists and counts.
    cu_seqlens = torch.empty(4, dtype=torch.int32, **meta)
    packed = floor(torch.empty(10, **meta), 4, cu_seqlens=cu_seqlens, max_seqlen=4)
    assert packed == (40 + 16 + 3 * 4 * 8 + 3 * 4, 0)


def check(score, k, **options):
    """Everything exact."""
    actual = tokred.select_topk(score, k, **options)
    assert_close(actual, reference(score, k, **options), name="select_topk")
    return actual


def everything(score, k, **options):
    """Both orders, with the rest and the counts."""
    for order in ("index", "score"):
        check(score, k, order=order, complement=True, return_num_kept=True, **options)


def planted(*shape, device):
    """Scores with many ties, some infinite, some NaN, zeros of both signs."""
    score = torch.randn(*shape).mul(3).round() / 3
    score[torch.rand(*shape) < 0.02] = float("nan")
    score[torch.rand(*shape) < 0.02] = float("inf")
    score[torch.rand(*shape) < 0.02] = -float("inf")
    score[score == 0] *= torch.where(torch.rand(int((score == 0).sum())) < 0.5, -1.0, 1.0)
    return score.to(device)


# One less, equal, one more than a vector, a warp, the items of a warp's row; then the sizes at which the kernels change
# their plan: a sample first on the CPU (209), a warp's row (1024), sampled pivots (4096), a block's row (8192), two chunks
# and more.
SIZES = [1, 2, 15, 17, 31, 32, 33, 197, 208, 209, 255, 257, 577, 1023, 1024, 1025, 4095, 4097, 8192, 8193, 33001]


@pytest.mark.parametrize("num_tokens", SIZES)
def test_sizes_and_counts(device, num_tokens, simt):
    for k in {0, 1, num_tokens // 40, num_tokens // 2, num_tokens - 1, num_tokens}:
        if simt and num_tokens > 4097 and k not in (1, num_tokens // 40, num_tokens // 2):
            continue
        check(torch.randn(3, num_tokens, device=device), k)


@pytest.mark.parametrize("num_tokens", [33, 577, 1100, 5003, 9000])
@pytest.mark.parametrize(
    "kind", ["constant", "few", "bf16 softmax", "sorted", "reversed", "nan", "inf", "periodic", "one end"]
)
def test_hard_scores(device, num_tokens, kind, simt):
    score = hard_scores(kind, 2, num_tokens)
    counts = (1, num_tokens // 9 + 1) if simt and num_tokens > 1100 else (1, 7, num_tokens // 2, num_tokens - 1)
    for k in counts:
        everything(score.to(device), k)


def test_pivot_that_too_few_reach(device):
    """Wide rows whose sample misleads: the tokens that are sampled are the best ones, and nearly the only good ones."""
    num_tokens = 20_000
    score = torch.zeros(2, num_tokens)
    stride = num_tokens // 1024
    group = torch.arange(1024)
    places = group * stride + group * 40503 % (stride - 3)
    score[0, (places[:, None] + torch.arange(4)).flatten()] = 1 + torch.rand(4096)
    score[1] = score[0].bfloat16().float()
    everything(score.to(device), 600)
    everything(score.to(device), 6000)


def test_sample_that_misleads(device):
    """The CPU's search starts between scores of a sample: here all of it is larger, or smaller, or the same."""
    num_tokens, step = 640, 40
    places = [i * step + ((i * 2654435769 % 2**32) * step >> 32) for i in range(16)]
    for outlier in (9.0, -9.0, 0.25):
        score = torch.randn(3, num_tokens)
        score[:, places] = outlier
        for k in (1, 16, 17, 320, 623, 624, 640):
            check(score.to(device), k)


def test_denormal_and_zero_order(device):
    """Denormal scores are numbers like others, whatever the flush mode of the thread."""
    score = torch.tensor([[0.0, 1e-45, -1e-45, 1e-40, -0.0, 3e-45]], device=device)
    assert tokred.select_topk(score, 3).tolist() == [[1, 3, 5]]
    assert tokred.select_topk(score, 5, order="score").tolist() == [[3, 5, 1, 0, 4]]


@pytest.mark.parametrize("num_tokens", [1, 9, 300, 1500, 5003, 9001])
def test_forced_and_excluded(device, num_tokens, simt):
    score = planted(4, num_tokens, device=device)
    keep = torch.rand(4, num_tokens).lt(0.3).to(device)
    drop = torch.rand(4, num_tokens).lt(0.4).to(device)
    keep[1], drop[2], keep[3], drop[3] = True, True, True, True
    counts = (0, 1, num_tokens // 4, num_tokens // 2, num_tokens)
    for k in {num_tokens // 4, num_tokens} if simt and num_tokens > 1500 else set(counts):
        everything(score, k, keep_mask=keep)
        everything(score, k, drop_mask=drop)
        everything(score, k, keep_mask=keep, drop_mask=drop, keep_first=2, keep_last=num_tokens // 8)


@pytest.mark.parametrize("num_tokens", [5, 200, 1030, 9001])
def test_windows(device, num_tokens, simt):
    score = planted(2, 3, num_tokens, device=device)
    for first, last in ((0, 1), (1, 0), (4, 64), (3, 10**9), (10**9, 0), (num_tokens // 2, num_tokens // 2 + 1)):
        for k in {num_tokens // 3} if simt and num_tokens > 1030 else {0, 1, num_tokens // 3, num_tokens}:
            everything(score, k, keep_first=first, keep_last=last)
    kept = tokred.select_topk(score, num_tokens // 2, keep_first=1, keep_last=1)
    assert (kept[..., 0] == 0).all() and (kept[..., -1] == num_tokens - 1).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [40, 1200, 9001])
def test_count_per_row(device, num_tokens, index_dtype, simt):
    score = planted(3, 4, num_tokens, device=device)
    k = torch.randint(0, num_tokens // 2, (3, 4)).to(index_dtype)
    k[0, 0], k[0, 1], k[0, 2] = 0, -7, 2**31 - 1
    drop = torch.rand(3, 4, num_tokens).lt(0.7).to(device)
    for max_k in (num_tokens // 3,) if simt and num_tokens > 1200 else (0, num_tokens // 3, num_tokens):
        everything(score, k.to(device), max_k=max_k)
        everything(score, k.to(device), max_k=max_k, keep_first=3, keep_last=4)
        everything(score, k.to(device), max_k=max_k, drop_mask=drop)
    check(score[:, 0], k[:, 0].contiguous().to(device), max_k=9)


@pytest.mark.parametrize("lens", [[5, 0, 700, 33, 1], [10, 8192, 0, 9500, 3]])
def test_ragged_equals_dense(device, lens, simt):
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    score = planted(sum(lens), device=device)
    keep, drop = score > 1.2, score < -1
    windows = {"keep_first": 1, "keep_last": 2}
    for max_seqlen in (max(lens), None):
        everything(score, 8, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **windows)
    options = {"keep_mask": keep, "drop_mask": drop, "cu_seqlens": cu_seqlens, **windows}
    kept_idx, num_kept, rest_idx = check(score, 8, max_seqlen=max(lens), complement=True, **options)
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        k = min(8, length)
        alone = tokred.select_topk(
            score[None, part],
            k,
            keep_mask=keep[None, part],
            drop_mask=drop[None, part],
            complement=True,
            return_num_kept=True,
            **windows,
        )
        assert_close(kept_idx[b, :k], alone[0][0])
        assert num_kept[b] == alone[1][0]
        assert_close(rest_idx[b, :length], alone[2][0])
    k = torch.tensor([3, 4, 900, 0, 5], device=device)
    everything(score, k, max_k=max(lens) // 2, cu_seqlens=cu_seqlens)
    everything(score, max(lens) + 5, cu_seqlens=cu_seqlens)  # more than any sequence has
    heads = torch.stack([score, score.flip(0)])
    everything(heads, 8, cu_seqlens=cu_seqlens, max_seqlen=max(lens), drop_mask=torch.stack([drop, keep]))
    everything(heads, torch.stack([k, k.flip(0)], 1), max_k=9, cu_seqlens=cu_seqlens)
    check(score, 8, cu_seqlens=cu_seqlens, max_seqlen=20, complement=True)  # longer ones are cut


@pytest.mark.parametrize("k", [4096, 4097, 9000, 20000])
def test_long_lists(device, k, simt):
    """Lists beyond what a block holds: completed by binary search, sorted in runs that are merged."""
    num_tokens = 20_001
    score = planted(2, num_tokens, device=device)
    score[1, ::2] = 0.5
    everything(score, k)
    if k == 9000 or not simt:
        everything(score, torch.tensor([k // 3, k], device=device), max_k=k, drop_mask=score < -1)
        cu_seqlens = torch.tensor([0, 7, 40], dtype=torch.int32, device=device)
        everything(score[0, :40].contiguous(), k, cu_seqlens=cu_seqlens, max_seqlen=33)


def test_rows_too_long_for_chunks(device, simt):
    """Candidates of many chunks that no block holds: the row is read anew."""
    score = planted(1, 70_000, device=device)
    for k in (3000,) if simt else (3000, 30_000, 69_999):
        everything(score, k)
        check(score, k, keep_first=4, keep_last=64)
    check(score, 9000)


def test_views(device):
    base = torch.randn(4, 3, 120, device=device)
    mask = base > 0.5
    everything(base[:, 1:, 7:90], 9)
    everything(base.transpose(0, 1), 9, keep_mask=mask.transpose(0, 1))
    everything(base[:, :1].expand(4, 3, 120), 9, drop_mask=mask[:, 0][:, None].expand(4, 3, 120))
    everything(base[:, 0, :50], 9, keep_mask=mask[::2].repeat(2, 1, 1)[:, 2, 70:])
    for dtype in (torch.float16, torch.bfloat16):
        everything(base.to(dtype)[..., 1:], 30)


def test_offsets_beyond_2_31(device):
    score = torch.empty(2**31 + 99, dtype=torch.bfloat16, device=device).as_strided((2, 33), (2**31 + 7, 1))
    score.copy_(torch.randn(2, 33))
    everything(score, 5)
    heads = torch.empty(2**31 + 99, dtype=torch.bfloat16, device=device).as_strided((1, 2, 33), (5, 2**31 + 7, 1))
    heads.copy_(torch.randn(1, 2, 33))
    mask = torch.empty(2**31 + 99, dtype=torch.bool, device=device).as_strided((1, 2, 33), (5, 2**31 + 7, 1))
    mask.copy_(torch.rand(1, 2, 33) < 0.3)
    everything(heads, 5, keep_mask=mask)


def test_bad_offsets_read_nothing_out_of_bounds(device):
    score = torch.randn(30, device=device)
    cu_seqlens = torch.tensor([0, -5, 2**30, 10, 30], dtype=torch.int32, device=device)
    kept_idx, num_kept, rest_idx = tokred.select_topk(score, 4, cu_seqlens=cu_seqlens, complement=True)
    assert (kept_idx < 30).all() and (num_kept <= 4).all() and (rest_idx < 30).all()


@given(st.data())
def test_any_row(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    n = len(row)
    k = data.draw(st.integers(0, n))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    keep, drop = (torch.tensor([data.draw(flags)], device=device) for _ in range(2))
    options = {"keep_mask": keep, "drop_mask": drop, "keep_first": data.draw(st.integers(0, 3))}
    options["keep_last"] = data.draw(st.integers(0, 3))
    score = torch.tensor([row], device=device)
    kept_idx, num_kept, rest_idx = check(score, k, complement=True, return_num_kept=True, **options)
    count = int(num_kept[0])
    kept, rest = kept_idx[0, :count], rest_idx[0, : n - count]
    assert (kept.diff() > 0).all() and (kept_idx[0, count:] == -1).all()
    assert (rest.diff() > 0).all() and (rest_idx[0, n - count :] == -1).all()
    assert torch.cat([kept, rest]).sort().values.tolist() == list(range(n))
    assert not drop[0, kept].any() and count == min(k, int((~drop).sum()))
    ordered = check(score, k, order="score", **options)[0, :count]
    assert ordered.sort().values.tolist() == kept.tolist()
    value = [-float("inf") if x != x else x for x in score[0, ordered].tolist()]
    assert value == sorted(value, reverse=True)
    everything(score, torch.tensor([k], device=device), max_k=n, **options)


def test_row_is_independent_of_its_batch(device, threads):
    score = torch.randn(9, 5, 600, device=device).bfloat16()
    alone = [tokred.select_topk(score[b : b + 1], 50, order="score", keep_last=3) for b in range(9)]
    for result in threads(lambda: tokred.select_topk(score, 50, order="score", keep_last=3)):
        assert_close(result, torch.cat(alone))


def test_empty(device):
    score = torch.randn(2, 3, 5, device=device)
    everything(score[:0], 3)
    everything(score[:, :0], 3)
    everything(score[..., :0], 0)
    everything(score, 0)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert tokred.select_topk(score[0, 0], 2, cu_seqlens=none)[0].shape == (0, 2)
    assert tokred.select_topk(score[0], 2, cu_seqlens=none, complement=True)[2].shape == (0, 3, 5)


def test_returns(device):
    score = torch.randn(2, 6, device=device)
    k = torch.tensor([1, 2], device=device)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device=device)
    assert isinstance(tokred.select_topk(score, 2), torch.Tensor)
    assert isinstance(tokred.select_topk(score, 2, keep_first=1, order="score"), torch.Tensor)
    assert [tuple(x.shape) for x in tokred.select_topk(score, 2, complement=True)] == [(2, 2), (2, 4)]
    assert [tuple(x.shape) for x in tokred.select_topk(score, k, max_k=3)] == [(2, 3), (2,)]
    assert [tuple(x.shape) for x in tokred.select_topk(score[0], 2, cu_seqlens=cu_seqlens)] == [(1, 2), (1,)]
    assert torch.ops.tokred.select_topk(score, 2).shape == (2, 2)


def test_score_that_requires_grad(device):
    score = torch.randn(2, 6, device=device, requires_grad=True)
    for kept_idx in (tokred.select_topk(score, 2), tokred.select_topk(score, 2, order="score")):
        assert not kept_idx.requires_grad
    score.gather(1, kept_idx).sum().backward()
    assert score.grad.sum() == 4


def test_vmap(device):
    score, k = torch.randn(2, 11, 3, device=device), torch.tensor([[1, 4], [2, 0], [9, 3]], device=device)
    mapped = torch.vmap(lambda s: tokred.select_topk(s, 4), in_dims=2)(score)
    counted = torch.vmap(lambda s, n: tokred.select_topk(s, n, max_k=5, complement=True), in_dims=(2, 0))(score, k)
    for i in range(3):
        row = score[..., i].contiguous()
        assert_close(mapped[i], tokred.select_topk(row, 4))
        assert_close([c[i] for c in counted], tokred.select_topk(row, k[i], max_k=5, complement=True))
    cu_seqlens = torch.tensor([0, 11], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="select_topk: a packed input has no batch dimension"):
        torch.vmap(lambda s: tokred.select_topk(s, 4, cu_seqlens=cu_seqlens))(score[..., 0].contiguous())


ERRORS = {
    "expected k in [0, 6], got 7": lambda s: tokred.select_topk(s, 7),
    "expected k in [0, 6], got -1": lambda s: tokred.select_topk(s, -1),
    "expected max_k in [0, 6], got 7": lambda s: tokred.select_topk(s, torch.ones(2, dtype=torch.int32), max_k=7),
    "expected max_k with a tensor k, and only then, got a tensor k without max_k": (
        lambda s: tokred.select_topk(s, torch.ones(2, dtype=torch.int32))
    ),
    "expected max_k with a tensor k, and only then, got an int k with max_k": (
        lambda s: tokred.select_topk(s, 2, max_k=3)
    ),
    "expected k of shape [batch_size] = [2], got [3]": lambda s: tokred.select_topk(s, s[0, :3].long(), max_k=3),
    "expected k of shape [batch_size, num_heads] = [2, 1], got [2]": (
        lambda s: tokred.select_topk(s[:, None], s[:, 0].long(), max_k=3)
    ),
    "expected k of dtype int64 or int32, got float32": (lambda s: tokred.select_topk(s, s[:, 0].contiguous(), max_k=3)),
    "expected score of shape [batch_size, num_tokens] or [batch_size, num_heads, num_tokens], got [6]": (
        lambda s: tokred.select_topk(s[0], 2)
    ),
    "expected score of shape [total_tokens] or [num_heads, total_tokens] (with cu_seqlens), got [1, 2, 6]": (
        lambda s: tokred.select_topk(s[None], 2, cu_seqlens=torch.tensor([0, 6], device=s.device).int())
    ),
    "expected score of dtype float32, float16 or bfloat16, got int64": lambda s: tokred.select_topk(s.long(), 2),
    "expected score contiguous in its last dimension, got strides [1, 2]": (
        lambda s: tokred.select_topk(s.T.contiguous().T, 2)
    ),
    "expected keep_mask of dtype bool, got float32": lambda s: tokred.select_topk(s, 2, keep_mask=s),
    "expected drop_mask of shape of score = [2, 6], got [2, 3]": (
        lambda s: tokred.select_topk(s, 2, drop_mask=s[:, :3] > 0)
    ),
    "expected keep_mask contiguous in its last dimension, got strides [1, 2]": (
        lambda s: tokred.select_topk(s, 2, keep_mask=(s > 0).T.contiguous().T)
    ),
    "expected keep_first >= 0, got -1": lambda s: tokred.select_topk(s, 2, keep_first=-1),
    "expected keep_last >= 0, got -2": lambda s: tokred.select_topk(s, 2, keep_last=-2),
    "expected order 'index' or 'score', got 'size'": lambda s: tokred.select_topk(s, 2, order="size"),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda s: tokred.select_topk(s[0], 2, cu_seqlens=torch.tensor([0, 6], device=s.device))
    ),
    "expected cu_seqlens of shape [batch_size + 1], got []": (
        lambda s: tokred.select_topk(s[0], 2, cu_seqlens=torch.tensor(0, device=s.device).int())
    ),
    "expected max_seqlen in [0, 6], got 7": (
        lambda s: tokred.select_topk(s[0], 2, cu_seqlens=torch.tensor([0, 6], device=s.device).int(), max_seqlen=7)
    ),
    "expected k >= 0, got -2": (
        lambda s: tokred.select_topk(s[0], -2, cu_seqlens=torch.tensor([0, 6], device=s.device).int())
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 6, device=device))
    assert f"select_topk: {message}" in str(caught.value)
