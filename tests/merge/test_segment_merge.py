# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

reference = importlib.import_module("tokred.merge.segment_merge").reference
floor = importlib.import_module("tokred.merge.segment_merge").floor


def test_floor_by_hand():
    x = torch.empty(32, 197, 768, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    dst_idx, size = torch.empty(32, 197, dtype=torch.int64, device="meta"), torch.empty(32, 197, device="meta")
    written = 32 * 181 * (1536 + 4)  # rows and their float32 sizes
    assert floor(x, dst_idx, 181) == (32 * 197 * (1536 + 8) + written, 0)
    assert floor(x, dst_idx, 181, size=size, weight=size) == (32 * 197 * (1536 + 8 + 4 + 4) + written, 0)
    positions = torch.empty(32, 197, 3, device="meta")
    assert floor(x, dst_idx, 181, others=[positions]) == (32 * 197 * (1536 + 8 + 12) + written + 32 * 181 * 12, 0)
    entries = torch.empty(32, 500, dtype=torch.int32, device="meta")
    assert floor(x, entries, 181, src_idx=entries) == (32 * 197 * 1536 + 32 * 500 * 8 + written, 0)
    packed = torch.empty(33, dtype=torch.int32, device="meta")
    assert floor(x.flatten(0, 1), dst_idx.flatten(), 181, cu_seqlens=packed)[0] == 32 * 197 * 1544 + written + 33 * 4


def random_map(batch_size, num_tokens, num_out, device):
    """Ids outside on both sides, near and far, and some empty segments."""
    dst_idx = torch.randint(-2, num_out + 2, (batch_size, num_tokens))
    dst_idx[torch.rand(batch_size, num_tokens) < 0.05] = -(2**31)
    dst_idx[torch.rand(batch_size, num_tokens) < 0.05] = 2**31 - 1
    return dst_idx.to(device)


def check(x, dst_idx, num_out, *, terms=1, **options):
    """Against the reference in float64: only the sum in float32 (terms long) and the last rounding differ."""
    merged, size_out = tokred.segment_merge(x, dst_idx, num_out, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected, expected_size = reference(x.double(), dst_idx, num_out, **wide)
    assert merged.dtype == x.dtype
    assert size_out.dtype == torch.float32
    eps = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}[x.dtype]
    assert_close(merged, expected, rtol=eps, atol=2e-6 + 2e-7 * terms, name="merged")
    assert_close(size_out, expected_size, rtol=2e-6, atol=0, name="size_out")
    return merged, size_out


def every_mode(device, batch_size, num_tokens):
    weight, size = (torch.rand(2, batch_size, num_tokens) + 0.1).to(device)
    yield from ({}, {"size": size}, {"weight": weight}, {"weight": weight, "size": size}, {"mode": "sum"})
    yield from ({"mode": "sum", "weight": weight, "size": size}, {"mode": "max"}, {"mode": "max", "size": size})


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 197, 1025])
@pytest.mark.parametrize("num_out", [0, 1, 31, 32, 33, 300])
def test_sizes(device, num_tokens, num_out, simt):
    if simt and num_tokens * num_out > 30000:
        num_tokens = 511
    x = torch.randn(2, num_tokens, 12, device=device)
    dst_idx = random_map(2, num_tokens, num_out, device)
    for i, options in enumerate(every_mode(device, 2, num_tokens)):
        if not simt or i % 3 == (num_tokens + num_out) % 3:
            check(x, dst_idx, num_out, terms=num_tokens, **options)


@pytest.mark.parametrize("dim", [0, 1, 3, 4, 7, 8, 33, 64, 136, 640, 1023, 2056, 5000])
def test_dims(device, dtype, dim):
    x = torch.randn(2, 23, dim).to(device, dtype)
    size = torch.randint(1, 9, (2, 23), dtype=torch.float32, device=device)
    for num_out in (5, 19):
        dst_idx = random_map(2, 23, num_out, device)
        check(x, dst_idx, num_out, size=size, terms=9)
        check(x, dst_idx.clamp(-1, num_out).int(), num_out, mode="max")


def test_long_rows_and_many_segments(device, simt):
    """Several blocks share a row's segments, and a warp's share of the tokens takes several rounds."""
    num_tokens, num_out = (2500, 1100) if simt else (9001, 5000)
    x = torch.randn(2, num_tokens, 8, device=device)
    check(
        x, random_map(2, num_tokens, num_out, device), num_out, size=torch.rand(2, num_tokens, device=device), terms=9
    )


def test_segments_far_outnumber_tokens(device, simt):
    x = torch.randn(1, 40, 4, device=device)
    num_out = 9000 if simt else 70000
    dst_idx = torch.randint(0, num_out, (1, 40), device=device)
    check(x, dst_idx, num_out)


def test_large_output(device, dtype, simt):
    num_out = 170 if simt else 1700
    x = torch.randn(1, num_out + 200, 8192 // dtype.itemsize).to(device, dtype)
    dst_idx = torch.cat([torch.arange(num_out), torch.randint(0, num_out // 3, (200,))])[None].to(device)
    check(x, dst_idx, num_out, size=torch.rand(1, num_out + 200, device=device), terms=4)
    check(x[:, :, :-8], dst_idx, num_out, mode="max")


def test_all_into_one_segment(device, dtype):
    x = torch.randn(3, 700, 40).to(device, dtype)
    dst_idx = torch.full((3, 700), 2, device=device)
    for options in every_mode(device, 3, 700):
        merged, _ = check(x, dst_idx, 5, terms=700, **options)
        assert merged[:, [0, 1, 3, 4]].abs().sum() == 0


def test_single_members_are_copied_exactly(device, dtype):
    x = torch.randn(2, 60, 24).to(device, dtype)
    x[:, :, 0] = -0.0
    dst_idx = torch.stack([torch.randperm(60) for _ in range(2)]).to(device)
    weight = torch.rand(2, 60, device=device) - 0.5
    weight[:, :4] = torch.tensor([1e-42, -1e-30, 3e38, -7.0], device=device)
    for options in ({}, {"weight": weight}, {"size": weight}, {"mode": "sum"}, {"mode": "max"}):
        merged, _ = tokred.segment_merge(x, dst_idx, 60, **options)
        moved = torch.empty_like(x).scatter_(1, dst_idx[..., None].expand_as(x), x)
        assert torch.equal(merged.view(torch.int16), moved.view(torch.int16)), options


def test_order_of_addition(device):
    """Ascending tokens, one by one: the other way round gives 4, and pairs give 3 or 1."""
    x = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24), 1.0, 1.0], device=device).reshape(1, 6, 1)
    dst_idx = torch.zeros(1, 6, dtype=torch.int64, device=device)
    assert tokred.segment_merge(x, dst_idx, 1, mode="sum")[0].item() == 2.0
    assert tokred.segment_merge(x.flip(1), dst_idx, 1, mode="sum")[0].item() == 4.0
    size = x.squeeze(2)
    assert tokred.segment_merge(x, dst_idx, 1, size=size)[1].item() == 2.0
    many = torch.randn(1, 3000, 4)
    many[0, ::7] *= 1e6
    expected = torch.zeros(4)
    for row in many[0]:
        expected += row
    dst_idx = torch.zeros(1, 3000, dtype=torch.int64, device=device)
    assert torch.equal(tokred.segment_merge(many.to(device), dst_idx, 1, mode="sum")[0][0, 0].cpu(), expected)


def test_zero_weights(device):
    nan = float("nan")
    x = torch.tensor([[1.0, nan], [2.0, 3.0], [nan, nan], [5.0, 6.0]], device=device)[None]
    dst_idx = torch.tensor([[0, 0, 1, 2]], device=device)
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.0]], device=device)
    merged, size = check(x, dst_idx, 3, weight=weight)
    assert merged.abs().sum() == 0
    assert size.tolist() == [[2.0, 1.0, 1.0]]
    merged, _ = check(x, dst_idx, 3, weight=torch.tensor([[0.0, 2.0, 1.0, 1.0]], device=device))
    assert merged[0, 0, 0] == 2.0
    assert merged[0, 0, 1].isnan()


def test_nan_and_inf(device, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1, inf, -inf, 1], [1, nan, 2, -inf, 0], [2, 3, -inf, -inf, -0.0]]).to(device, dtype)[None]
    x = torch.cat([x, torch.full_like(x, nan)], dim=1)
    dst_idx = torch.tensor([[1, 1, 1, -1, 3, 3]], device=device)
    for options in every_mode(device, 1, 6):
        merged, _ = check(x, dst_idx, 3, **options)  # dropped NaNs stay out
        assert merged[:, [0, 2]].abs().sum() == 0
    merged = tokred.segment_merge(x, dst_idx, 3, mode="max")[0][0, 1]
    assert merged.isnan().tolist() == [True, True, False, False, False]
    assert merged[2:].tolist() == [inf, -inf, 1.0]


def test_large_weights_do_not_overflow(device):
    x = torch.tensor([[[4.0], [8.0]]], device=device)
    dst_idx = torch.zeros(1, 2, dtype=torch.int64, device=device)
    weight = torch.full((1, 2), 1.5e38, device=device)
    assert tokred.segment_merge(x, dst_idx, 1, weight=weight)[0].item() == 6.0


def test_views(device, dtype):
    base = torch.randn(40, 3, 64).to(device, dtype)
    dst_idx = random_map(3, 20, 9, device)
    check(base.transpose(0, 1)[:, ::2], dst_idx, 9, terms=5)
    check(base.transpose(0, 1)[:, 20:, 1:18], dst_idx, 9, terms=5)  # odd address, odd length
    check(base.transpose(0, 1)[:, :20, 8:48], dst_idx, 9, mode="max")
    check(base[:1, :1].expand(3, 20, 64), dst_idx, 9, terms=5)
    check(base.transpose(0, 1)[:, :20, :0], dst_idx, 9)
    check(base.transpose(0, 1)[:0, :20], dst_idx[:0], 9)


def test_offsets_beyond_2_31(device):
    x = torch.empty(2**32 + 4096, dtype=torch.float16, device=device).as_strided((1, 3, 64), (0, 2**31 + 7, 1))
    x[:] = torch.arange(64, device=device) + torch.tensor([[0], [1], [5]], device=device)
    dst_idx = torch.tensor([[1, 1, 0]], device=device)
    check(x, dst_idx, 2)
    check(x.transpose(0, 1), dst_idx.T.contiguous(), 2, mode="max")


def test_bits_do_not_depend_on_threads_or_batch(device, dtype, threads):
    x = torch.randn(5, 300, 72).to(device, dtype)
    dst_idx = torch.randint(-1, 40, (5, 300), device=device)
    dst_idx[2] = 3
    weight = torch.randn(5, 300, device=device)
    for options in ({"mode": "mean"}, {"mode": "sum"}):
        first, *rest = threads(lambda o=options: tokred.segment_merge(x, dst_idx, 40, weight=weight, size=weight, **o))
        for other in rest:
            assert torch.equal(first[0], other[0])
            assert torch.equal(first[1], other[1])
        _, src_idx = random_entries(5, 300, 300, 40, device)
        sparse = threads(
            lambda o=options, s=src_idx: tokred.segment_merge(x, dst_idx, 40, weight=weight, src_idx=s, **o)
        )
        for other in sparse[1:]:
            assert_close(other, sparse[0], rtol=0, atol=0)
        for b in range(5):
            row = slice(b, b + 1)
            alone = tokred.segment_merge(x[row], dst_idx[row], 40, weight=weight[row], size=weight[row], **options)
            assert torch.equal(alone[0][0], first[0][b])
            assert torch.equal(alone[1][0], first[1][b])
            few = tokred.segment_merge(x[row], dst_idx[row], 4, weight=weight[row], **options)[0]  # another split
            assert torch.equal(few[0], first[0][b, :4])


def test_size_weighted_mean_of_tome(device):
    """Merging twice with sizes is merging once by the composed map: means of the original tokens (ToMe, section 3)."""
    x = torch.randn(2, 197, 16, device=device)
    first = torch.randint(0, 90, (2, 197), device=device)
    second = torch.randint(0, 20, (2, 90), device=device)
    merged, size = tokred.segment_merge(x, first, 90)
    merged, size = tokred.segment_merge(merged, second, 20, size=size)
    composed, count = tokred.segment_merge(x, second.gather(1, first), 20)
    assert_close(merged, composed, rtol=1e-5, atol=1e-5)
    assert torch.equal(size, count)
    assert size.sum() == 2 * 197


def random_entries(batch_size, num_entries, num_tokens, num_out, device):
    """Rows and tokens with repeats, some of them outside."""
    rows = torch.randint(-1, num_out + 1, (batch_size, num_entries))
    tokens = torch.randint(-1, num_tokens + 1, (batch_size, num_entries))
    tokens[torch.rand(batch_size, num_entries) < 0.05] = -(2**31)
    return rows.to(device), tokens.to(device)


@pytest.mark.parametrize(("num_tokens", "num_entries"), [(1, 40), (30, 0), (0, 9), (37, 5), (20, 300)])
def test_many_to_many(device, dtype, num_tokens, num_entries):
    x = torch.randn(2, num_tokens, 20).to(device, dtype)
    rows, tokens = random_entries(2, num_entries, num_tokens, 9, device)
    for i, options in enumerate(every_mode(device, 2, num_entries)):
        ids = (rows, tokens) if i % 2 else (rows.int(), tokens.int())
        check(x, ids[0], 9, terms=num_entries, src_idx=ids[1], **options)


def test_many_to_many_is_a_matrix_product(device):
    """Token Transforming: x' = W x and size' = W s, for a W of any pattern; what no entry names is not read."""
    w = torch.randn(6, 14) * (torch.rand(6, 14) < 0.3)
    w[:, 4] = 0
    rows, tokens = w.nonzero().T[:, None].to(device).unbind(0)
    x, size = torch.randn(1, 14, 8), torch.rand(1, 14)
    expected = w @ x
    x[0, 4] = float("nan")
    weight = w[w != 0][None].to(device)
    merged, sizes = tokred.segment_merge(
        x.to(device),
        rows.contiguous(),
        6,
        src_idx=tokens.contiguous(),
        weight=weight,
        size=weight * size.to(device).gather(1, tokens),
        mode="sum",
    )
    assert_close(merged.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert_close(sizes.cpu(), size @ w.T, rtol=1e-5, atol=1e-5)


def test_many_to_many_adds_in_entry_order(device):
    x = torch.tensor([2.0**24, 1.0, -(2.0**24)], device=device).reshape(1, 3, 1)
    zeros = torch.zeros(1, 6, dtype=torch.int64, device=device)
    for tokens, expected in (([0, 1, 1, 2, 1, 1], 2.0), ([1, 1, 1, 1, 0, 2], 4.0)):
        src_idx = torch.tensor([tokens], device=device)
        assert tokred.segment_merge(x, zeros, 1, src_idx=src_idx, mode="sum")[0].item() == expected


def test_many_to_many_beyond_2_31(device):
    x = torch.empty(2**32 + 4096, dtype=torch.float16, device=device).as_strided((1, 3, 64), (0, 2**31 + 7, 1))
    x[:] = torch.arange(64, device=device) + torch.tensor([[0], [1], [5]], device=device)
    ids = torch.tensor([[1, 1, 0, 0], [2, 0, 2, 2]], device=device)
    check(x, ids[:1], 2, src_idx=ids[1:])


def test_others_are_merged_alike(device):
    """Bit for bit what a call of their own gives, in their own dtype."""
    x = torch.randn(2, 40, 24, device=device)
    others = [torch.randn(2, 40, 3), torch.randn(2, 40, 130).half(), torch.randn(2, 40, 50).bfloat16()[:, :, 1:42]]
    others = [t.to(device) for t in others]
    rows, tokens = random_entries(2, 70, 40, 9, device)
    for options in every_mode(device, 2, 40):
        dst_idx = random_map(2, 40, 9, device)
        merged, size_out, rest = tokred.segment_merge(x, dst_idx, 9, others=others, **options)
        for t, m in zip((x, *others), (merged, *rest)):
            assert_close((m, size_out), tokred.segment_merge(t, dst_idx, 9, **options), rtol=0, atol=0)
    merged, size_out, rest = tokred.segment_merge(x, rows, 9, src_idx=tokens, others=others)
    for t, m in zip((x, *others), (merged, *rest)):
        assert_close((m, size_out), tokred.segment_merge(t, rows, 9, src_idx=tokens), rtol=0, atol=0)
    assert tokred.segment_merge(x, dst_idx, 9, others=[])[2] == []


def test_packed_sequences_are_merged_as_if_alone(device, dtype):
    """Also without tokens; what lies before, between and behind them belongs to none."""
    cu_seqlens = torch.tensor([0, 7, 7, 30, 31], dtype=torch.int32, device=device)
    x, others = torch.randn(40, 16).to(device, dtype), [torch.randn(40, 3, device=device)]
    x[31:] = float("nan")
    dst_idx = random_map(1, 40, 5, device)[0]
    for options in every_mode(device, 1, 40):
        flat = {k: v[0] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        merged, size_out, rest = tokred.segment_merge(x, dst_idx, 5, cu_seqlens=cu_seqlens, others=others, **flat)
        plain = tokred.segment_merge(x, dst_idx, 5, cu_seqlens=cu_seqlens, **flat)
        assert_close(plain, (merged, size_out), rtol=0, atol=0)
        for b in range(4):
            part = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
            own = {k: v[:, part].contiguous() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            alone = tokred.segment_merge(x[None, part], dst_idx[None, part], 5, others=[others[0][None, part]], **own)
            assert_close(
                (merged[b], size_out[b], [rest[0][b]]), (alone[0][0], alone[1][0], [alone[2][0][0]]), rtol=0, atol=0
            )


@st.composite
def maps(draw):
    num_tokens, num_out = draw(st.integers(0, 70)), draw(st.integers(0, 12))
    ids = st.integers(-3, num_out + 2)
    return torch.tensor([draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens))]).reshape(1, -1).long(), num_out


@given(maps(), st.sampled_from([1, 5, 8]))
def test_properties(case, dim):
    dst_idx, num_out = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dst_idx = dst_idx.to(device)
    x = torch.randn(1, dst_idx.shape[1], dim, device=device)
    kept = ((dst_idx >= 0) & (dst_idx < num_out))[..., None]
    total, count = tokred.segment_merge(x, dst_idx, num_out, mode="sum")
    assert_close(total.sum(1), (x * kept).sum(1), rtol=1e-4, atol=1e-4)  # nothing is lost
    assert count.sum() == kept.sum()
    mean, _ = tokred.segment_merge(x, dst_idx, num_out)
    spread = tokred.segment_expand(mean, dst_idx)
    again, _ = tokred.segment_merge(spread, dst_idx, num_out)
    assert_close(again, mean, rtol=1e-5, atol=1e-5)  # merge of expand: the identity on rows with members
    assert_close(tokred.segment_expand(again, dst_idx), spread, rtol=1e-5, atol=1e-5)  # a projection
    top, _ = tokred.segment_merge(x, dst_idx, num_out, mode="max")
    assert (tokred.segment_expand(top, dst_idx) >= x * kept)[kept.expand_as(x)].all()
    assert torch.equal(tokred.segment_merge(tokred.segment_expand(top, dst_idx), dst_idx, num_out, mode="max")[0], top)


def gradients(function, x, dst_idx, num_out, options, size_grad=True):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in options.items() if isinstance(v, torch.Tensor)}
    x = x.detach().clone().requires_grad_()
    merged, size_out = function(x, dst_idx, num_out, **{**options, **leaves})
    generator = torch.Generator().manual_seed(3)
    loss = (merged.float() * torch.randn(merged.shape, generator=generator).to(x.device)).sum()
    if "size" in leaves and size_grad:
        loss = loss + (size_out * torch.randn(size_out.shape, generator=generator).to(x.device)).sum()
    loss.backward()
    return [x.grad, *(torch.zeros_like(v) if v.grad is None else v.grad for v in leaves.values())]


def test_gradients_equal_reference(device, dtype):
    x = torch.randn(2, 29, 24).to(device, dtype)
    dst_idx = random_map(2, 29, 9, device)
    dst_idx[0, :3] = torch.tensor([8, 8, 7])  # two members, and perhaps one
    for options in every_mode(device, 2, 29):
        actual = gradients(tokred.segment_merge, x, dst_idx, 9, options)
        expected = gradients(reference, x, dst_idx, 9, options)
        # Gradients of weights are differences of float32 dot products of 24 terms.
        for a, e in zip(actual, expected):
            assert a.dtype == e.dtype
            assert_close(a, e, **({"rtol": 1e-4, "atol": 1e-4} if a.dtype == torch.float32 else {}), name=f"{options}")


def gradients_with(function, x, dst_idx, options, fixed, others):
    """Those of x, of given tensors and of others."""
    leaves = [t.clone().requires_grad_() for t in others]

    def joined(x, dst_idx, num_out, **options):
        merged, size_out, rest = function(x, dst_idx, num_out, others=leaves, **fixed, **options)
        return torch.cat([merged, *rest], -1), size_out

    return [*gradients(joined, x, dst_idx, 5, options), *(t.grad for t in leaves)]


def test_gradients_of_entries_others_and_packed(device):
    x, others = torch.randn(2, 12, 8, device=device), [torch.randn(2, 12, 3, device=device)]
    rows, tokens = random_entries(2, 31, 12, 5, device)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32, device=device)
    for options in every_mode(device, 2, 31):
        calls = [
            ((x, rows), options, {"src_idx": tokens}, others),
            (
                (x.flatten(0, 1), rows.flatten()[:24]),
                {k: v.flatten()[:24] if isinstance(v, torch.Tensor) else v for k, v in options.items()},
                {"cu_seqlens": cu_seqlens},
                [others[0].flatten(0, 1)],
            ),
        ]
        for args, options, fixed, more in calls:
            ours = gradients_with(tokred.segment_merge, *args, options, fixed, more)
            for actual, expected in zip(ours, gradients_with(reference, *args, options, fixed, more)):
                assert_close(actual, expected, rtol=1e-4, atol=1e-4, name=f"{options.keys()} {fixed.keys()}")


def test_gradients_without_size_out(device):
    x, dst_idx = torch.randn(2, 9, 4, device=device), random_map(2, 9, 4, device)
    size = torch.rand(2, 9, device=device) + 1
    pairs = zip(*(gradients(f, x, dst_idx, 4, {"size": size}, False) for f in (tokred.segment_merge, reference)))
    for a, e in pairs:
        assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_gradient_of_ties_nan_and_dropped(device):
    x = torch.tensor([[1.0, 2.0], [1.0, 0.0], [float("nan"), 2.0], [7.0, 7.0]], device=device)[None].requires_grad_()
    merged, size_out = tokred.segment_merge(x, torch.tensor([[0, 0, 0, -1]], device=device), 1, mode="max")
    assert not size_out.requires_grad
    merged.sum().backward()
    assert x.grad[0].tolist() == [[0.0, 0.5], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0]]
    weight = torch.ones(1, 4, device=device, requires_grad=True)
    nan = torch.full((1, 4, 2), float("nan"), device=device)
    tokred.segment_merge(nan, torch.full((1, 4), -1, device=device), 2, weight=weight, mode="sum")[0].sum().backward()
    assert weight.grad.tolist() == [[0.0] * 4]


def test_vmap(device):
    x, dst_idx = torch.randn(3, 2, 9, 4, device=device), random_map(2, 9, 4, device)
    size = torch.rand(2, 3, 9, device=device)
    mapped = torch.vmap(lambda a, s: tokred.segment_merge(a, dst_idx, 4, size=s), in_dims=(0, 1))(x, size)
    for i in range(3):
        for m, e in zip(mapped, tokred.segment_merge(x[i], dst_idx, 4, size=size[:, i].contiguous())):
            assert torch.equal(m[i], e)


def test_vmap_of_entries(device):
    x, other = torch.randn(3, 2, 9, 4, device=device), torch.randn(2, 9, 2, device=device)
    rows, tokens = random_entries(2, 20, 9, 4, device)
    mapped = torch.vmap(lambda a: tokred.segment_merge(a, rows, 4, src_idx=tokens, others=[other]))(x)
    for i in range(3):
        expected = tokred.segment_merge(x[i], rows, 4, src_idx=tokens, others=[other])
        assert_close((mapped[0][i], mapped[1][i], [mapped[2][0][i]]), expected, rtol=0, atol=0)


def test_autocast_leaves_it_alone(device):
    x, dst_idx = torch.randn(1, 5, 4, device=device), torch.zeros(1, 5, dtype=torch.int64, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert tokred.segment_merge(x, dst_idx, 1)[0].dtype == torch.float32


CU = torch.tensor([0, 2, 6], dtype=torch.int32)
X, DST, W = torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6)
ERRORS = {
    "expected x of shape [batch_size, num_tokens, dim], got [2, 6]": lambda d: ((W.to(d), DST.to(d), 3), {}),
    "expected x of dtype float32, float16 or bfloat16, got float64": lambda d: ((X.double().to(d), DST.to(d), 3), {}),
    "expected x contiguous in its last dimension, got strides [24, 4, 2]": (
        lambda d: ((X.to(d)[:, :, ::2], DST.to(d), 3), {})
    ),
    "expected dst_idx of shape [batch_size, num_tokens] = [2, 6], got [2, 5]": (
        lambda d: ((X.to(d), DST[:, :5].contiguous().to(d), 3), {})
    ),
    "expected dst_idx of dtype int64 or int32, got float32": lambda d: ((X.to(d), W.to(d), 3), {}),
    "expected dst_idx contiguous, got strides [1, 2]": lambda d: ((X.to(d), DST.T.contiguous().T.to(d), 3), {}),
    "expected num_out >= 0, got -1": lambda d: ((X.to(d), DST.to(d), -1), {}),
    "expected num_out below 2^31 - 1024, got 2147483647": lambda d: ((X.to(d), DST.to(d), 2**31 - 1), {}),
    "expected batch_size * num_out below 2^31 - 1024, got 2147483646": lambda d: ((X.to(d), DST.to(d), 2**30 - 1), {}),
    "expected weight of dtype float32, got float16": lambda d: ((X.to(d), DST.to(d), 3), {"weight": W.half().to(d)}),
    "expected size of shape [batch_size, num_tokens] = [2, 6], got [2, 5]": (
        lambda d: ((X.to(d), DST.to(d), 3), {"size": W[:, :5].contiguous().to(d)})
    ),
    "expected size contiguous, got strides [1, 2]": (
        lambda d: ((X.to(d), DST.to(d), 3), {"size": W.T.contiguous().to(d).T})
    ),
    "expected src_idx of shape that of dst_idx = [2, 6], got [2, 5]": (
        lambda d: ((X.to(d), DST.to(d), 3), {"src_idx": DST[:, :5].contiguous().to(d)})
    ),
    "expected src_idx of dtype int64 or int32, got float32": lambda d: ((X.to(d), DST.to(d), 3), {"src_idx": W.to(d)}),
    "expected weight of shape [batch_size, num_tokens] = [2, 3], got [2, 6]": (
        lambda d: (
            (X.to(d), DST[:, :3].contiguous().to(d), 3),
            {"src_idx": DST[:, :3].contiguous().to(d), "weight": W.to(d)},
        )
    ),
    "expected others[1] of shape [batch_size, num_tokens, any] = [2, 6, any], got [2, 6]": (
        lambda d: ((X.to(d), DST.to(d), 3), {"others": [X.to(d), W.to(d)]})
    ),
    "expected others[0] of dtype float32, float16 or bfloat16, got int64": (
        lambda d: ((X.to(d), DST.to(d), 3), {"others": [X.long().to(d)]})
    ),
    "expected src_idx=None with cu_seqlens, got a tensor": (
        lambda d: ((X[0].to(d), DST[0].to(d), 3), {"src_idx": DST[0].to(d), "cu_seqlens": CU.to(d)})
    ),
    "expected cu_seqlens int32 of shape [batch_size + 1], got int64 [3]": (
        lambda d: ((X[0].to(d), DST[0].to(d), 3), {"cu_seqlens": CU.long().to(d)})
    ),
    "expected x of shape [total_tokens, dim] and dst_idx of shape [total_tokens] with cu_seqlens, got [2, 6, 4] and [2, 6]": (
        lambda d: ((X.to(d), DST.to(d), 3), {"cu_seqlens": CU.to(d)})
    ),
    'expected mode "mean", "sum" or "max", got "min"': lambda d: ((X.to(d), DST.to(d), 3), {"mode": "min"}),
    'expected weight=None in mode "max", got a tensor': (
        lambda d: ((X.to(d), DST.to(d), 3), {"weight": W.to(d), "mode": "max"})
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    args, options = ERRORS[message](device)
    with pytest.raises(RuntimeError) as caught:
        tokred.segment_merge(*args, **options)
    assert f"segment_merge: {message}" in str(caught.value)
