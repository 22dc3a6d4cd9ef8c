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

reference = importlib.import_module("tokred.attend.attend_selected").reference
floor = importlib.import_module("tokred.attend.attend_selected").floor
attend = tokred.attend_selected

# Of out: float32 sums of up to 1200 products, in another order and with exp to 2 ulp. float16 and bfloat16: the weights
# are rounded to the dtype before they multiply v (2^-11, 2^-8 each, averaged over the list), and the result once more.
TOLERANCE = {torch.float32: (2e-5, 5e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}
LSE = {"rtol": 2e-6, "atol": 4e-6}  # float32 throughout, whatever the dtype


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes and dtypes alone

    kv, kept_idx = meta(1, 8, 32768, 128), meta(1, 8, 2048, dtype=torch.int64)
    # Listed rows of K and V, 256 bytes each, and the lists; q, out and lse.
    moved = 8 * 2048 * (512 + 8) + 32 * (256 + 256 + 4)
    assert floor(meta(1, 32, 1, 128), kv, kv, kept_idx) == (moved, 2 * 32 * 2048 * 256)
    # One list for all, which each of two kv heads reads, with log sizes; 16 bytes a row.
    q, kv, shared, bias = meta(1, 4, 1, 8), meta(1, 2, 50, 8), meta(1, 1, 10, dtype=torch.int64), meta(1, 1, 50)
    moved = 2 * 10 * 32 + 10 * 8 + 10 * 4 + 4 * (16 + 16 + 4)
    assert floor(q, kv, kv, shared, key_bias=bias) == (moved, 2 * 4 * 10 * 16)
    # Pages: [num_pages, page_size, num_kv_heads, head_dim]; the table is read.
    pages, page_table = meta(9, 16, 2, 8), meta(1, 4, dtype=torch.int32)
    moved = 2 * 10 * 32 + 10 * 8 + 16 + 4 * (16 + 16 + 4)
    assert floor(q, pages, pages, shared, page_table=page_table) == (moved, 2 * 4 * 10 * 16)


def check(q, k, v, kept_idx, **options):
    out, lse = attend(q, k, v, kept_idx, return_lse=True, **options)
    expected, expected_lse = reference(q, k, v, kept_idx, return_lse=True, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    rtol, atol = TOLERANCE[q.dtype]
    assert_close(out, expected, rtol=rtol, atol=atol, name="out")
    assert_close(lse, expected_lse, **LSE, name="lse")
    return out, lse


def qkv(device, dtype=torch.float32, batch=2, q_heads=4, kv_heads=2, kv_len=90, dim=64, dim_v=None, q_len=1):
    q = torch.randn(batch, q_heads, q_len, dim)
    k, v = torch.randn(batch, kv_heads, kv_len, dim), torch.randn(batch, kv_heads, kv_len, dim_v or dim)
    return [x.to(device, dtype) for x in (q, k, v)]


def lists(batch, heads, k, high, device):
    """Distinct positions where there are enough, any order."""
    return torch.rand(batch, heads, max(high, k)).argsort(-1)[..., :k].remainder(high).to(device)


def pages_of(x, page_size, spare=3):
    """Dense [batch, heads, kv_len, dim] as shuffled pages and their table; spare pages and tails hold NaN."""
    batch, heads, kv_len, dim = x.shape
    per_row = -(-kv_len // page_size)
    padded = F.pad(x, (0, 0, 0, per_row * page_size - kv_len), value=float("nan"))
    order = torch.Generator().manual_seed(5)
    place = torch.randperm(batch * per_row + spare, generator=order)[: batch * per_row].to(x.device)
    pages = x.new_full((batch * per_row + spare, page_size, heads, dim), float("nan"))
    pages[place] = padded.unflatten(2, (per_row, page_size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return pages, place.view(batch, per_row).int()


@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 128, 511, 512, 513, 1100])
def test_list_lengths(device, k):
    q, k_all, v_all = qkv(device, kv_len=700, dim=32)
    check(q, k_all, v_all, lists(2, 2, k, 700, device))


@pytest.mark.parametrize(
    "dims", [(1, 1), (3, 5), (8, 8), (15, 17), (40, 40), (64, 128), (72, 80), (128, 64), (192, 128), (256, 256)]
)
def test_head_dims(device, dtype, dims):
    q, k, v = qkv(device, dtype, dim=dims[0], dim_v=dims[1])
    check(q, k, v, lists(2, 2, 70, 90, device))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 24])
@pytest.mark.parametrize("list_heads", ["q", "kv", "1"])
def test_groups_and_list_heads(device, dtype, group, list_heads):
    q, k, v = qkv(device, dtype, q_heads=2 * group, dim=32)
    heads = {"q": 2 * group, "kv": 2, "1": 1}[list_heads]
    check(q, k, v, lists(2, heads, 40, 90, device).int())


@pytest.mark.parametrize("q_len", [2, 5, 33])
def test_several_queries(device, dtype, q_len):
    q, k, v = qkv(device, dtype, q_heads=6, dim=16, q_len=q_len)
    check(q, k, v, lists(2, 2, 40, 90, device), key_bias=torch.randn(2, 6, 90, device=device))


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_paged_equals_dense(device, dtype, page_size):
    q, k, v = qkv(device, dtype, kv_len=150, dim_v=48)
    kept_idx = lists(2, 2, 77, 150, device)
    (pages_k, table), (pages_v, _) = pages_of(k, page_size), pages_of(v, page_size)
    dense = check(q, k, v, kept_idx)
    paged = check(q, pages_k, pages_v, kept_idx, page_table=table)
    assert_close(paged, dense, rtol=0, atol=0)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (pages_k, pages_v)]
    assert_close(check(q, *heads_first, kept_idx, page_table=table), dense, rtol=0, atol=0)


def test_full_list_equals_sdpa(device):
    q, k, v = qkv(device, q_heads=8, kv_len=600, dim=64)
    everything = torch.arange(600, device=device).expand(2, 1, 600).contiguous()
    assert_close(attend(q, k, v, everything), F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=5e-6)


def test_nothing_listed(device, dtype):
    q, k, v = qkv(device, dtype)
    kept_idx = lists(2, 2, 40, 90, device)
    kept_idx[0, 1] = -1
    out, lse = check(q, k, v, kept_idx)
    assert (out[0, 2:] == 0).all()
    assert (lse[0, 2:] == -torch.inf).all()
    out, lse = check(q, k, v, kept_idx[..., :0].contiguous())
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out, lse = check(q, k[:, :, :0], v[:, :, :0], kept_idx)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    long = torch.full((2, 1, 1500), -1, device=device)
    long[1, 0, 1400] = 7  # one entry, in a late split
    check(q, k, v, long)


def test_ids_out_of_range(device):
    q, k, v = qkv(device)
    kept_idx = lists(2, 2, 60, 90, device)
    kept_idx[..., ::3] = torch.tensor(
        [-1, -2, 90, 91, 2**31, 2**31 + 5, 2**40, -(2**40), 2**32, 2**62], device=device
    ).repeat(2)
    out, lse = check(q, k, v, kept_idx)
    kept = kept_idx[(kept_idx >= 0) & (kept_idx < 90)].view(2, 2, 40)
    assert_close((out, lse), attend(q, k, v, kept, return_lse=True), rtol=2e-6, atol=1e-6)


def test_pages_out_of_range(device):
    q, k, v = qkv(device, kv_len=96)
    (pages_k, table), (pages_v, _) = pages_of(k, 16), pages_of(v, 16)
    table[0, 1], table[0, 4], table[1, 0], table[1, 5] = -1, pages_k.shape[0], 2**31 - 1, -(2**31)
    kept_idx = lists(2, 2, 96, 96, device)
    check(q, pages_k, pages_v, kept_idx, page_table=table)
    out, lse = check(q, pages_k[:0], pages_v[:0], kept_idx, page_table=table)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_duplicates_count_twice(device):
    q, k, v = qkv(device)
    kept_idx = lists(2, 2, 20, 90, device)
    twice = torch.cat([kept_idx, kept_idx[..., :7]], -1)
    bias = torch.zeros(2, 2, 90, device=device).scatter(2, kept_idx[..., :7], 2.0**0.5)
    bias = bias.where(bias == 0, torch.tensor(2.0).log().to(device))
    _, lse = check(q, k, v, twice)
    assert_close(attend(q, k, v, kept_idx, key_bias=bias, return_lse=True)[1], lse, **LSE)


@pytest.mark.parametrize("dim", [64, 63])
def test_nothing_else_is_read(device, dtype, dim):
    """NaN in rows that no list names, in unused pages and beyond kv_lens."""
    q, k, v = qkv(device, dtype, dim=dim)
    kept_idx = lists(2, 2, 33, 90, device)
    lens = torch.tensor([60, 90], dtype=torch.int32, device=device)
    named = torch.zeros(2, 2, 91, dtype=torch.bool, device=device).scatter(2, kept_idx, True)[..., :90]
    named &= torch.arange(90, device=device) < lens[:, None, None]
    k, v = (x.where(named[..., None], torch.full_like(x, float("nan"))) for x in (k, v))
    out, _ = check(q, k, v, kept_idx, kv_lens=lens)
    assert out.isfinite().all()
    (pages_k, table), (pages_v, _) = pages_of(k, 16), pages_of(v, 16)
    assert_close(attend(q, pages_k, pages_v, kept_idx, page_table=table, kv_lens=lens), out, rtol=0, atol=0)
    bias = torch.full((2, 2, 90), float("nan"), device=device).where(~named, torch.tensor(0.0, device=device))
    assert_close(attend(q, k, v, kept_idx, kv_lens=lens, key_bias=bias), out, rtol=0, atol=0)


@pytest.mark.parametrize("lens", [[0, 90], [-5, 1], [91, 1000], [31, 32]])
def test_kv_lens(device, lens):
    q, k, v = qkv(device)
    check(q, k, v, lists(2, 2, 70, 90, device), kv_lens=torch.tensor(lens, dtype=torch.int32, device=device))


@pytest.mark.parametrize("bias_heads", ["q", "kv", "1"])
@pytest.mark.parametrize("list_heads", ["q", "kv", "1"])
def test_key_bias(device, bias_heads, list_heads):
    q, k, v = qkv(device, q_heads=6, dim=16)
    heads = {"q": 6, "kv": 2, "1": 1}
    bias = torch.randn(2, heads[bias_heads], 90, device=device)
    bias[0, :, ::4] = -torch.inf
    kept_idx = lists(2, heads[list_heads], 70, 90, device)
    check(q, k, v, kept_idx, key_bias=bias, scale=0.7)
    check(q, k, v, kept_idx, key_bias=bias[:, :1].expand(2, heads[bias_heads], 90))
    (pages_k, table), (pages_v, _) = pages_of(k, 16), pages_of(v, 16)
    check(q, pages_k, pages_v, kept_idx, page_table=table, key_bias=F.pad(bias, (0, 6)))


def test_log_size_equals_repeated_tokens(device):
    q, k, v = qkv(device, kv_len=30)
    size = torch.randint(1, 5, (30,))
    repeated = torch.arange(30).repeat_interleave(size).expand(2, 1, -1).contiguous().to(device)
    once = torch.arange(30, device=device).expand(2, 1, 30).contiguous()
    log_size = size.float().log().expand(2, 1, 30).to(device)
    assert_close(
        attend(q, k, v, once, key_bias=log_size, return_lse=True), attend(q, k, v, repeated, return_lse=True), **LSE
    )


def test_all_masked_by_bias(device):
    q, k, v = qkv(device)
    out, lse = check(q, k, v, lists(2, 2, 40, 90, device), key_bias=torch.full((2, 1, 90), -torch.inf, device=device))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_large_and_equal_logits(device):
    q, k, v = qkv(device)
    kept_idx = lists(2, 2, 60, 90, device)
    check(q, 0 * k, v, kept_idx)
    out, lse = attend(
        q, k, v, kept_idx, scale=40.0, return_lse=True
    )  # a softmax of one or two keys, lse in the thousands
    expected, expected_lse = reference(q, k, v, kept_idx, scale=40.0, return_lse=True)
    assert_close(lse, expected_lse, rtol=2e-6)
    assert_close(out, expected, rtol=2e-3, atol=2e-3)  # logits of 1000 carry an error of 1e-4


def test_nan_spreads_to_its_rows_only(device):
    q, k, v = qkv(device, kv_len=700)
    kept_idx = lists(2, 2, 600, 700, device)
    q[0, 0, 0, 3] = float("nan")
    k[1, 1, kept_idx[1, 1, 5], 0] = float("nan")
    out, lse = attend(q, k, v, kept_idx, return_lse=True)
    nan = torch.tensor([[[True], [False], [False], [False]], [[False], [False], [True], [True]]], device=device)
    assert torch.equal(lse.isnan(), nan)
    assert torch.equal(out.isnan(), nan[..., None].expand_as(out))


def test_halves_merge_by_lse(device):
    q, k, v = qkv(device, kv_len=1300)
    kept_idx = lists(2, 2, 1200, 1300, device)
    whole, whole_lse = attend(q, k, v, kept_idx, return_lse=True)
    parts = [attend(q, k, v, half.contiguous(), return_lse=True) for half in (kept_idx[..., :500], kept_idx[..., 500:])]
    lse = torch.stack([p[1] for p in parts])
    merged = ((lse - lse.logsumexp(0)).exp()[..., None] * torch.stack([p[0] for p in parts])).sum(0)
    assert_close(merged, whole, atol=2e-6)
    assert_close(lse.logsumexp(0), whole_lse, **LSE)


def test_threads_and_batch_do_not_change_bits(device, dtype, threads):
    q, k, v = qkv(device, dtype, batch=3, q_heads=8, kv_len=1500, dim=72)
    kept_idx = lists(3, 2, 1203, 1500, device)
    first, *rest = threads(lambda: attend(q, k, v, kept_idx, return_lse=True))
    for other in rest:
        assert_close(other, first, rtol=0, atol=0)
    for b in range(3):
        alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], kept_idx[b : b + 1], return_lse=True)
        assert_close(alone, tuple(x[b : b + 1] for x in first), rtol=0, atol=0)


def test_views(device, dtype):
    """BLHD by strides, rows at odd addresses, odd strides, a batch that repeats."""
    kept_idx = lists(2, 2, 40, 90, device)
    q, k, v = qkv(device, dtype)
    expected = check(q, k, v, kept_idx)
    blhd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_close(check(*blhd, kept_idx), expected, rtol=0, atol=0)
    odd = [F.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v)]
    assert_close(check(*odd, kept_idx), expected, rtol=0, atol=0)
    assert_close(check(q, odd[1], v, kept_idx), expected, rtol=0, atol=0)
    assert_close(check(q, k, odd[2], kept_idx), expected, rtol=0, atol=0)
    check(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v[..., ::2].contiguous(), kept_idx)


def test_empty(device):
    q, k, v = qkv(device)
    kept_idx = lists(2, 2, 5, 90, device)
    assert attend(q[:0], k[:0], v[:0], kept_idx[:0]).shape == (0, 4, 1, 64)
    out, lse = attend(q[:, :, :0], k, v, kept_idx, return_lse=True)
    assert out.shape == (2, 4, 0, 64)
    assert lse.shape == (2, 4, 0)


def test_offsets_beyond_2_31(device):
    huge = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=device)
    x = huge.as_strided((1, 1, 3, 64), (0, 0, 2**31 + 7, 1))
    x[:] = torch.randn(1, 1, 3, 64)
    q = torch.randn(1, 2, 1, 64, device=device).bfloat16()
    kept_idx = torch.tensor([[[2, 0]]], device=device)
    compact = x.contiguous()
    assert_close(attend(q, x, x, kept_idx), attend(q, compact, compact, kept_idx), rtol=0, atol=0)
    pages = huge.as_strided((3, 1, 1, 64), (2**31 + 7, 64, 64, 1))
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    assert_close(
        attend(q, pages, pages, kept_idx, page_table=table), attend(q, compact, compact, kept_idx), rtol=0, atol=0
    )


@given(st.data())
def test_any_shape(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    kv_heads, group, kv_len = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 200))
    q, k, v = qkv(
        device,
        dtype,
        draw(st.integers(1, 3)),
        kv_heads * group,
        kv_heads,
        kv_len,
        draw(st.integers(1, 90)),
        draw(st.integers(1, 90)),
        draw(st.integers(1, 4)),
    )
    heads = draw(st.sampled_from([1, kv_heads, kv_heads * group]))
    kept_idx = torch.randint(-5, kv_len + 5, (q.shape[0], heads, draw(st.integers(0, 150)))).to(device)
    bias_heads = draw(st.sampled_from([None, 1, kv_heads, kv_heads * group]))
    bias = None if bias_heads is None else torch.randn(q.shape[0], bias_heads, kv_len, device=device)
    check(q, k, v, kept_idx, key_bias=bias)


def test_out_buffers(device, dtype):
    q, k, v = qkv(device, dtype, q_len=2)
    kept_idx = lists(2, 2, 40, 90, device)
    out = q.new_full((2, 2, 4, 64), float("nan")).transpose(1, 2)  # [batch, q_len, heads, dim] by strides
    lse = torch.full((2, 4, 2), float("nan"), device=device)
    returned = attend(q, k, v, kept_idx, out=(out, lse), return_lse=True)
    assert returned[0] is out
    assert returned[1] is lse
    assert_close((out, lse), attend(q, k, v, kept_idx, return_lse=True), rtol=0, atol=0)
    assert attend(q, k, v, kept_idx, out=(out, lse)) is out
    with pytest.raises(RuntimeError, match="out= does not support automatic differentiation"):
        attend(q.requires_grad_(), k, v, kept_idx, out=(out, lse))


def test_out_overload_contract(device):
    q, k, v = qkv(device)
    kept_idx = lists(2, 2, 40, 90, device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    op = torch.ops.tokred.attend_selected.out
    torch.library.opcheck(op, (q, k, v, kept_idx), {"out": out, "lse": lse})
    compiled = torch.compile(lambda *a: attend(*a, out=(out, lse)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v, kept_idx).clone(), attend(q, k, v, kept_idx), rtol=0, atol=0)


def test_no_gradient(device):
    q, k, v = qkv(device)
    out = attend(q.requires_grad_(), k, v, lists(2, 2, 5, 90, device))
    with pytest.raises(RuntimeError, match="attend_selected: has no gradient; gather the keys"):
        out.sum().backward()


def test_autocast_casts_q_k_v_only(device):
    q, k, v = qkv(device)
    kept_idx, bias = lists(2, 2, 40, 90, device), torch.randn(2, 1, 90, device=device)
    with torch.autocast(device, torch.bfloat16):
        out, lse = attend(q, k, v, kept_idx, key_bias=bias, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), kept_idx, key_bias=bias, return_lse=True)
    assert_close((out, lse), expected, rtol=0, atol=0)


def test_vmap(device):
    q, k, v = (torch.stack([x, 2 * x, -x]) for x in qkv(device))
    kept_idx = lists(2, 2, 40, 90, device)
    mapped = torch.vmap(lambda q, k, v: attend(q, k, v, kept_idx, return_lse=True))(q, k, v)
    for i in range(3):
        expected = attend(q[i], k[i], v[i], kept_idx, return_lse=True)
        assert_close(tuple(x[i] for x in mapped), expected, rtol=0, atol=0)
    (pages_k, table), (pages_v, _) = pages_of(k[0], 16), pages_of(v[0], 16)
    mapped = torch.vmap(lambda q: attend(q, pages_k, pages_v, kept_idx, page_table=table))(q)
    assert_close(mapped[1], attend(q[1], pages_k, pages_v, kept_idx, page_table=table), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="paged k and v have no batch dimension"):
        torch.vmap(lambda p: attend(q[0], p, pages_v, kept_idx, page_table=table))(torch.stack([pages_k, pages_k]))


ERRORS = {
    "expected q of shape [batch_size, num_q_heads, q_len, head_dim], got [4, 1, 64]": {"q": lambda q: q[0]},
    "expected q of dtype float32, float16 or bfloat16, got float64": {"q": lambda q: q.double()},
    "expected q with head_dim in [1, 256], got 257": {"q": lambda q: F.pad(q, (0, 193))},
    "expected q contiguous in its last dimension, got strides": {"q": lambda q: torch.cat([q, q], -1)[..., ::2]},
    "expected k of the dtype of q (float32), got float16": {"k": lambda k: k.half()},
    "expected v contiguous in its last dimension, got strides": {"v": lambda v: torch.cat([v, v], -1)[..., ::2]},
    "expected k of shape [batch_size, num_kv_heads, kv_len, head_dim] with batch_size 2, got [1, 2, 90, 64]": {
        "k": lambda k: k[:1]
    },
    "expected k with the head_dim 64 of q, got [2, 2, 90, 32]": {"k": lambda k: k[..., :32].contiguous()},
    "expected v of shape [2, 2, 90, head_dim_v] like k, got [2, 2, 80, 64]": {"v": lambda v: v[:, :, :80]},
    "expected v with head_dim_v in [1, 256], got 0": {"v": lambda v: v[..., :0]},
    "expected num_q_heads to be a multiple of num_kv_heads, got 3 and 2": {"q": lambda q: q[:, :3]},
    "expected kept_idx of shape [batch_size, heads, k] with batch_size 2, got [2, 7]": {"kept_idx": lambda i: i[:, 0]},
    "expected kept_idx with 4 (query heads), 2 (kv heads) or 1 heads, got [2, 3, 7]": {
        "kept_idx": lambda i: i[:, [0, 1, 1]]
    },
    "expected kept_idx of dtype int64 or int32, got float32": {"kept_idx": lambda i: i.float()},
    "expected kept_idx contiguous, got strides": {"kept_idx": lambda i: i[..., ::2]},
    "expected kv_lens of dtype int32, got int64": {"kv_lens": lambda _: torch.zeros(2, dtype=torch.int64)},
    "expected kv_lens of shape [batch_size] = [2], got [3]": {"kv_lens": lambda _: torch.zeros(3, dtype=torch.int32)},
    "expected key_bias of dtype float32, got float16": {"key_bias": lambda _: torch.zeros(2, 1, 90).half()},
    "expected key_bias of shape [batch_size, heads, kv_len] with batch_size 2 and kv_len 90, got [2, 1, 80]": {
        "key_bias": lambda _: torch.zeros(2, 1, 80)
    },
    "expected key_bias with 4 (query heads), 2 (kv heads) or 1 heads, got [2, 3, 90]": {
        "key_bias": lambda _: torch.zeros(2, 3, 90)
    },
    "expected k with page_size 1, 16, 32, 64 or 128, got 2": {
        "k": lambda k: k.transpose(1, 2)[:, :2],
        "v": lambda v: v.transpose(1, 2)[:, :2],
        "page_table": lambda _: torch.zeros(2, 3, dtype=torch.int32),
    },
    "expected page_table of shape [batch_size, max_pages] with batch_size 2, got [3, 3]": {
        "k": lambda k: k.transpose(1, 2)[:, :16],
        "v": lambda v: v.transpose(1, 2)[:, :16],
        "page_table": lambda _: torch.zeros(3, 3, dtype=torch.int32),
    },
    "expected page_table of dtype int32, got int64": {
        "k": lambda k: k.transpose(1, 2)[:, :16],
        "v": lambda v: v.transpose(1, 2)[:, :16],
        "page_table": lambda _: torch.zeros(2, 3, dtype=torch.int64),
    },
    "expected out of the dtype of q (float32), got float16": {
        "out": lambda _: (torch.zeros(2, 4, 1, 64).half(), torch.zeros(2, 4, 1))
    },
    "expected out of shape [batch_size, num_q_heads, q_len, head_dim_v] = [2, 4, 1, 64], got [2, 4, 1, 32]": {
        "out": lambda _: (torch.zeros(2, 4, 1, 32), torch.zeros(2, 4, 1))
    },
    "expected lse of shape [batch_size, num_q_heads, q_len] = [2, 4, 1], got [2, 4]": {
        "out": lambda _: (torch.zeros(2, 4, 1, 64), torch.zeros(2, 4))
    },
    "expected lse of dtype float32, got float64": {
        "out": lambda _: (torch.zeros(2, 4, 1, 64), torch.zeros(2, 4, 1).double())
    },
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    q, k, v = qkv("cpu")
    call = {"q": q, "k": k, "v": v, "kept_idx": torch.zeros(2, 2, 7, dtype=torch.int64)}
    for name, change in ERRORS[message].items():
        call[name] = change(call.get(name))
    move = lambda x: tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device)  # noqa: E731
    with pytest.raises(RuntimeError) as caught:
        attend(**{name: move(x) for name, x in call.items()})
    assert f"attend_selected: {message}" in str(caught.value)
