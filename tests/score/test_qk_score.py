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

module = importlib.import_module("tokred.score.qk_score")
reference, floor, TOLERANCE = module.reference, module.floor, module.TOLERANCE
score = tokred.qk_score


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes and dtypes alone

    q, k = meta(1, 32, 1, 128), meta(1, 8, 32768, 128)
    flops = 2 * 32 * 32768 * 128
    # K is 64 MiB; q; a float per query head and key, or per key.
    assert floor(q, k) == (2**26 + 32 * 256 + 32 * 32768 * 4, flops)
    weight, lens = meta(1, 1, 32, dtype=torch.float32), meta(1, dtype=torch.int32)
    moved = 2**26 + 32 * 256 + 128 + 4 + 32768 * 4
    assert floor(q, k, head_weight=weight, sum_heads=True, kv_lens=lens) == (moved, flops)
    pages, table = meta(99, 16, 8, 128), meta(1, 2048, dtype=torch.int32)
    channels = meta(8, 24, dtype=torch.int64)
    moved = 2**26 + 32 * 256 + 2048 * 4 + 8 * 24 * 8 + 32 * 32768 * 4
    assert floor(q, pages, page_table=table, channels=channels) == (moved, flops)


def check(q, k, **options):
    actual = score(q, k, **options)
    assert actual.dtype == torch.float32
    rtol, atol = TOLERANCE[q.dtype]
    assert_close(actual, reference(q, k, **options), rtol=rtol, atol=atol, name="score")
    return actual


def qk(device, dtype=torch.float32, batch=2, q_heads=4, kv_heads=2, kv_len=90, dim=64, q_len=1):
    q, k = torch.randn(batch, q_heads, q_len, dim), torch.randn(batch, kv_heads, kv_len, dim)
    return q.to(device, dtype), k.to(device, dtype)


def pages_of(k, page_size, spare=3):
    """Dense [batch, heads, kv_len, dim] as shuffled pages and their table; spare pages and tails hold NaN."""
    batch, heads, kv_len, dim = k.shape
    per_row = -(-kv_len // page_size)
    padded = F.pad(k, (0, 0, 0, per_row * page_size - kv_len), value=float("nan"))
    place = torch.randperm(batch * per_row + spare)[: batch * per_row].to(k.device)
    pages = k.new_full((batch * per_row + spare, page_size, heads, dim), float("nan"))
    pages[place] = padded.unflatten(2, (per_row, page_size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return pages, place.view(batch, per_row).int()


def lens_of(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("kv_len", [1, 7, 8, 15, 16, 17, 63, 64, 65, 255, 257, 511, 512, 513, 1100])
def test_lengths(device, kv_len):
    q, k = qk(device, kv_len=kv_len, dim=32)
    check(q, k)
    check(q, k, sum_heads=True)


@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 31, 40, 64, 72, 80, 96, 128, 160, 192, 256])
def test_head_dims(device, dtype, dim):
    check(*qk(device, dtype, dim=dim, batch=1, kv_len=33), scale=dim**-0.5)


@pytest.mark.parametrize(
    ("group", "q_len"), [(1, 1), (1, 16), (3, 1), (3, 7), (7, 2), (16, 1), (16, 2), (33, 1), (33, 5)]
)
def test_groups_and_queries(device, dtype, group, q_len):
    """33 heads of 5 queries are more rows than are held at a time."""
    q, k = qk(device, dtype, q_heads=2 * group, kv_len=20, dim=16, q_len=q_len)
    check(q, k, relu=True)
    weight = torch.randn(2, q_len, 2 * group, device=device)
    check(q, k, sum_heads=True, relu=True, head_weight=weight, scale=0.3)


def test_many_rows_of_float32_256(device):
    q, k = qk(device, batch=1, q_heads=40, kv_heads=1, kv_len=20, dim=256, q_len=2)
    check(q, k)
    check(q, k, sum_heads=True, scale=0.1)


def test_long_rows_take_larger_blocks(device, simt):
    q, k = qk(device, torch.bfloat16, batch=1, q_heads=3, kv_heads=3, kv_len=30000 if simt else 300000, dim=8)
    check(q, k)


def test_relu_and_scale(device, dtype):
    q, k = qk(device, dtype)
    plain, positive = check(q, k, scale=-0.5), check(q, k, scale=-0.5, relu=True)
    assert_close(positive, plain.relu(), rtol=0, atol=0)
    assert_close(score(q, k, scale=-2.0), 4 * plain, rtol=0, atol=0)


def test_one_hot_queries_pick_channels(device, dtype):
    """Exact: a product with one 1 is the key's value; wrong rows or channels show."""
    q = torch.eye(64, device=device, dtype=dtype)[:8].view(1, 4, 2, 64)
    k = torch.arange(2 * 50 * 64, device=device).remainder(251).to(dtype).view(1, 2, 50, 64)
    expected = torch.stack([k[:, h // 2, :, 2 * h : 2 * h + 2].transpose(1, 2) for h in range(4)], 1).float()
    assert_close(score(q, k), expected, rtol=0, atol=0)
    assert_close(score(q, k, sum_heads=True), expected.sum(1), rtol=0, atol=0)


@pytest.mark.parametrize("sum_heads", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_paged_equals_dense(device, dtype, page_size, sum_heads):
    q, k = qk(device, dtype, kv_len=150)
    lens = lens_of([150, 97], device)
    dense = check(q, k, kv_lens=lens, sum_heads=sum_heads)
    pages, table = pages_of(k, page_size)
    paged = check(q, pages, page_table=table, kv_lens=lens, sum_heads=sum_heads)
    assert_close(paged[..., :150], dense, rtol=0, atol=0)
    assert (paged[..., 150:] == -torch.inf).all()
    heads_first = pages.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(score(q, heads_first, page_table=table, kv_lens=lens, sum_heads=sum_heads), paged, rtol=0, atol=0)


@pytest.mark.parametrize("sum_heads", [False, True])
def test_pages_out_of_range(device, sum_heads):
    q, k = qk(device, kv_len=96)
    pages, table = pages_of(k, 16)
    table[0, 1], table[0, 4], table[1, 0], table[1, 5] = -1, pages.shape[0], 2**31 - 1, -(2**31)
    found = check(q, pages, page_table=table, sum_heads=sum_heads)
    assert torch.equal(
        (found[0] == -torch.inf).view(-1, 6, 16).all(-1).all(0).cpu(), torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    )
    assert (check(q, pages, page_table=torch.full_like(table, -1), sum_heads=sum_heads) == -torch.inf).all()
    assert (check(q, pages[:0], page_table=table, sum_heads=sum_heads) == -torch.inf).all()


@pytest.mark.parametrize("sum_heads", [False, True])
@pytest.mark.parametrize("lens", [[0, 90], [-5, 1], [91, 1000], [31, 32]])
def test_kv_lens(device, lens, sum_heads):
    q, k = qk(device)
    valid = torch.arange(90) < torch.tensor(lens)[:, None]
    k[~valid[:, None].expand(2, 2, 90)] = float("nan")  # is not read
    found = check(q, k.nan_to_num(), kv_lens=lens_of(lens, device), sum_heads=sum_heads)
    assert_close(score(q, k, kv_lens=lens_of(lens, device), sum_heads=sum_heads), found, rtol=0, atol=0)
    assert torch.equal((found == -torch.inf).view(2, -1, 90).all(1).cpu(), ~valid)


@pytest.mark.parametrize("shared", [True, False])
def test_channels(device, dtype, shared):
    q, k = qk(device, dtype, q_heads=6, dim=72)
    channels = torch.stack([torch.randperm(72)[:24], torch.randperm(72)[:24]]).to(device)
    channels = channels[0] if shared else channels
    found = check(q, k, channels=channels)
    rows = channels.expand(2, 24)
    packed_q = torch.cat([q[:, 3 * h : 3 * h + 3, :, rows[h]] for h in range(2)], 1)
    packed_k = torch.stack([k[:, h, :, rows[h]] for h in range(2)], 1)
    assert_close(found, score(packed_q, packed_k), rtol=2e-5, atol=2e-5)
    noise = torch.tensor([-1, 72, 2**40, -(2**40)], device=device).expand(*channels.shape[:-1], 4)
    again = torch.cat([noise, channels.flip(-1), channels], -1)
    assert_close(score(q, k, channels=again), found, rtol=0, atol=0)
    assert_close(score(q, k, channels=channels.int()), found, rtol=0, atol=0)
    check(q, k, channels=channels, sum_heads=True, relu=True)
    assert (check(q, k, channels=channels[..., :0].contiguous()) == 0).all()


def test_dsa_indexer(device, dtype):
    """sum_h w[t, h] relu(q_h . k_j) with 64 heads on one key head, as its formula says."""
    q, k = qk(device, dtype, q_heads=64, kv_heads=1, kv_len=70, dim=128, q_len=2)
    w = torch.randn(2, 2, 64, device=device)
    index = torch.einsum("bhtd,bjd->bthj", q.double(), k[:, 0].double()).relu()
    expected = (w.double()[..., None] * index * 128**-0.5).sum(2)
    found = score(q, k, relu=True, head_weight=w, sum_heads=True, scale=128**-0.5)
    assert_close(found, expected, rtol=2e-5, atol=5e-5)


def test_nan_and_inf(device, dtype):
    q, k = qk(device, dtype, kv_len=40)
    q[0, 1, 0, 3] = float("nan")
    k[1, 0, 17, 5] = float("nan")
    found = score(q, k, relu=True)
    nan = torch.zeros_like(found, dtype=torch.bool)
    nan[0, 1] = nan[1, :2, :, 17] = True
    assert torch.equal(found.isnan(), nan)
    summed = score(q, k, sum_heads=True)
    assert torch.equal(summed.isnan(), nan.any(1))
    if dtype != torch.float32:
        q, k = torch.ones_like(q), k.nan_to_num()
        k[0, 1, 5, 0] = float("inf")  # its products with rows that only fill a tile up would be NaN
        assert score(q, k, sum_heads=True)[0, 0, 5] == torch.inf
        assert (score(q, k)[0, 2:, 0, 5] == torch.inf).all()


def test_threads_and_batch_do_not_change_bits(device, dtype, threads):
    q, k = qk(device, dtype, batch=3, q_heads=8, kv_len=603, dim=24)
    for sum_heads in (False, True):
        first, *rest = threads(lambda sum_heads=sum_heads: score(q, k, sum_heads=sum_heads))
        for other in rest:
            assert_close(other, first, rtol=0, atol=0)
        for b in range(3):
            alone = score(q[b : b + 1], k[b : b + 1, :, :550], sum_heads=sum_heads)
            assert_close(alone, first[b : b + 1, ..., :550], rtol=0, atol=0)


def test_views(device, dtype):
    """BLHD by strides, rows at odd addresses, odd strides, a batch that repeats."""
    q, k = qk(device, dtype)
    expected = check(q, k)
    blhd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    odd = [F.pad(x, (1, 2))[..., 1:-2] for x in (q, k)]
    for other in (blhd, odd, (q, odd[1]), (odd[0], k)):
        assert_close(score(*other), expected, rtol=0, atol=0)
    check(q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1))


def test_empty(device):
    q, k = qk(device)
    assert score(q[:0], k[:0]).shape == (0, 4, 1, 90)
    assert score(q[:, :, :0], k).shape == (2, 4, 0, 90)
    assert score(q, k[:, :, :0]).shape == (2, 4, 1, 0)
    assert score(q, k[:, :, :0], sum_heads=True).shape == (2, 1, 0)
    table = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert score(q, k.transpose(1, 2)[:, :16], page_table=table).shape == (2, 4, 1, 0)


def test_offsets_beyond_2_31(device):
    huge = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=device)
    x = huge.as_strided((1, 1, 3, 64), (0, 0, 2**31 + 7, 1))
    x[:] = torch.randn(1, 1, 3, 64)
    q = torch.randn(1, 2, 1, 64, device=device).bfloat16()
    expected = score(q, x.contiguous())
    assert_close(score(q, x), expected, rtol=0, atol=0)
    pages = huge.as_strided((3, 1, 1, 64), (2**31 + 7, 64, 64, 1))
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    assert_close(score(q, pages, page_table=table), expected, rtol=0, atol=0)


@given(st.data())
def test_any_shape(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    kv_heads, group, kv_len = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(0, 200))
    batch, dim, q_len = draw(st.integers(1, 3)), draw(st.integers(1, 140)), draw(st.integers(1, 5))
    q, k = qk(device, dtype, batch, kv_heads * group, kv_heads, kv_len, dim, q_len)
    options = {"relu": draw(st.booleans()), "sum_heads": draw(st.booleans()), "scale": dim**-0.5}
    if options["sum_heads"] and draw(st.booleans()):
        options["head_weight"] = torch.randn(batch, q_len, kv_heads * group, device=device)
    if draw(st.booleans()):
        options["kv_lens"] = torch.randint(-2, kv_len + 3, (batch,)).int().to(device)
    if draw(st.booleans()):
        heads = () if draw(st.booleans()) else (kv_heads,)
        options["channels"] = torch.randint(-2, dim + 2, (*heads, draw(st.integers(0, 9)))).to(device)
    check(q, k, **options)


def test_no_gradient(device):
    q, k = qk(device)
    with pytest.raises(RuntimeError, match="qk_score: has no gradient; compute q @ k"):
        score(q.requires_grad_(), k).sum().backward()


def test_autocast_casts_q_and_k(device):
    q, k = qk(device)
    weight = torch.randn(2, 1, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = score(q, k, head_weight=weight, sum_heads=True)
    assert_close(found, score(q.bfloat16(), k.bfloat16(), head_weight=weight, sum_heads=True), rtol=0, atol=0)


def test_vmap(device):
    q, k = (torch.stack([x, 2 * x, -x]) for x in qk(device))
    lens, channels = lens_of([50, 90], device), torch.tensor([3, 5, 8], device=device)
    mapped = torch.vmap(lambda q, k: score(q, k, kv_lens=lens, channels=channels))(q, k)
    for i in range(3):
        assert_close(mapped[i], score(q[i], k[i], kv_lens=lens, channels=channels), rtol=0, atol=0)
    pages, table = pages_of(k[0], 16)
    mapped = torch.vmap(lambda q: score(q, pages, page_table=table, sum_heads=True))(q)
    assert_close(mapped[1], score(q[1], pages, page_table=table, sum_heads=True), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="qk_score: argument 1 has no batch dimension"):
        torch.vmap(lambda p: score(q[0], p, page_table=table))(torch.stack([pages, pages]))


def _int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


ERRORS = {
    "expected q of shape [batch_size, num_q_heads, q_len, head_dim], got [4, 1, 64]": {"q": lambda q: q[0]},
    "expected q of dtype float32, float16 or bfloat16, got float64": {"q": lambda q: q.double()},
    "expected q with head_dim in [1, 256], got 257": {"q": lambda q: F.pad(q, (0, 193))},
    "expected q with q_len in [0, 16], got 17": {"q": lambda q: q.expand(-1, -1, 17, -1)},
    "expected q contiguous in its last dimension, got strides": {"q": lambda q: torch.cat([q, q], -1)[..., ::2]},
    "expected k of the dtype of q (float32), got float16": {"k": lambda k: k.half()},
    "expected k contiguous in its last dimension, got strides": {"k": lambda k: torch.cat([k, k], -1)[..., ::2]},
    "expected k of shape [batch_size, num_kv_heads, kv_len, head_dim] with batch_size 2, got [1, 2, 90, 64]": {
        "k": lambda k: k[:1]
    },
    "expected k of shape [num_pages, page_size, num_kv_heads, head_dim] (with page_table), got [2, 90, 64]": {
        "k": lambda k: k[0],
        "page_table": lambda _: _int32(2, 3),
    },
    "expected k with the head_dim 64 of q, got [2, 2, 90, 32]": {"k": lambda k: k[..., :32].contiguous()},
    "expected num_q_heads to be a multiple of num_kv_heads, got 3 and 2": {"q": lambda q: q[:, :3]},
    "expected kv_lens of dtype int32, got int64": {"kv_lens": lambda _: torch.zeros(2, dtype=torch.int64)},
    "expected kv_lens of shape [batch_size] = [2], got [3]": {"kv_lens": lambda _: _int32(3)},
    "expected kv_lens contiguous, got strides [2]": {"kv_lens": lambda _: _int32(4)[::2]},
    "expected k with page_size 1, 16, 32, 64 or 128, got 2": {
        "k": lambda k: k.transpose(1, 2)[:, :2],
        "page_table": lambda _: _int32(2, 3),
    },
    "expected page_table of dtype int32, got int64": {
        "k": lambda k: k.transpose(1, 2)[:, :16],
        "page_table": lambda _: torch.zeros(2, 3, dtype=torch.int64),
    },
    "expected page_table contiguous, got strides [6, 2]": {
        "k": lambda k: k.transpose(1, 2)[:, :16],
        "page_table": lambda _: _int32(2, 6)[:, ::2],
    },
    "expected page_table of shape [batch_size, max_pages] with batch_size 2, got [3, 3]": {
        "k": lambda k: k.transpose(1, 2)[:, :16],
        "page_table": lambda _: _int32(3, 3),
    },
    "expected sum_heads with head_weight, got sum_heads=False": {"head_weight": lambda _: torch.zeros(2, 1, 4)},
    "expected head_weight of dtype float32, got float16": {
        "head_weight": lambda _: torch.zeros(2, 1, 4).half(),
        "sum_heads": lambda _: True,
    },
    "expected head_weight of shape [batch_size, q_len, num_q_heads] = [2, 1, 4], got [2, 4, 1]": {
        "head_weight": lambda _: torch.zeros(2, 4, 1),
        "sum_heads": lambda _: True,
    },
    "expected head_weight contiguous, got strides": {
        "head_weight": lambda _: torch.zeros(2, 1, 8)[..., ::2],
        "sum_heads": lambda _: True,
    },
    "expected channels of shape [num_channels] or [num_kv_heads, num_channels] with num_kv_heads 2, got [3, 5]": {
        "channels": lambda _: _int32(3, 5)
    },
    "expected channels of dtype int64 or int32, got float32": {"channels": lambda _: torch.zeros(5)},
    "expected channels contiguous, got strides": {"channels": lambda _: _int32(2, 8)[:, ::2]},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    given = dict(zip("qk", qk(device)))
    for name, change in ERRORS[message].items():
        value = change(given.get(name))
        given[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(RuntimeError) as caught:
        score(given.pop("q"), given.pop("k"), **given)
    assert f"qk_score: {message}" in str(caught.value)
