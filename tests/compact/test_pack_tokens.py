# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.compact.pack_tokens")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")  # floors look at shapes and dtypes alone

    x, positions, mask = meta(4, 1000, 512), meta(4, 1000, dtype=torch.int64), meta(4, 1000, dtype=torch.bool)
    moved = 2 * 300 * (1024 + 8)  # rows in and out
    assert floor([x, positions], mask, max_total=300) == (4000 + 300 * 8 + 4 * (5 + 4) + moved, 0)
    cu_seqlens = meta(9, dtype=torch.int32)
    assert floor([x[0]], mask[0], cu_seqlens=cu_seqlens) == (1000 + 8000 + 4 * (9 + 8) + 36 + 2 * 1000 * 1024, 0)


def check(tensors, mask, **options):
    """Rows are copies: exact."""
    actual = tokred.pack_tokens(tensors, mask, **options)
    assert_close(actual, reference(tensors, mask, **options), rtol=0, atol=0, name="pack_tokens")
    return actual


def random_mask(*shape, share, device):
    return (torch.rand(*shape) < share).to(device)


# Around a thread's 16 tokens, a tile of 4,096, several tiles; and the 2^15 of a piece on the CPU.
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 577, 2047, 2048, 2049, 9000, 17000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_sizes(device, num_tokens, share):
    mask = random_mask(2, num_tokens, share=share, device=device)
    x = torch.randn(2, num_tokens, 3, device=device)
    check([x], mask)
    kept = int(mask.sum())
    for capacity in {0, kept // 2, max(kept - 1, 0), kept, min(kept + 1, 2 * num_tokens)}:
        check([x], mask, max_total=capacity)
    packed, kept_rows, cu_seqlens, num_kept = check([x], mask, exact=True)
    assert packed[0].shape[0] == kept == int(num_kept.sum()) == int(cu_seqlens[-1]) and (kept_rows >= 0).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 33, 577])
def test_row_dtypes(device, dim):
    mask = random_mask(2, 19, share=0.4, device=device)
    for row_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool):
        x = torch.randn(2, 19, dim).mul(9).to(row_dtype).to(device)
        check([x, x[:, :, 0]], mask, max_total=20)


def test_ragged(device):
    lens = [5, 0, 700, 33, 1, 0]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    mask = random_mask(sum(lens), share=0.3, device=device)
    x, positions = torch.randn(sum(lens), 6, device=device), torch.arange(sum(lens), device=device)
    packed, kept_rows, cu_seqlens_kept, num_kept = check([x, positions], mask, cu_seqlens=cu_seqlens)
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):  # each sequence alone gives the same
        part, at = slice(start, start + length), slice(*cu_seqlens_kept[b : b + 2].tolist())
        alone = tokred.pack_tokens([x[None, part]], mask[None, part], exact=True)
        assert_close(packed[0][at], alone[0][0], rtol=0, atol=0)
        assert_close(kept_rows[at], alone[1] + start)
        assert int(num_kept[b]) == int(alone[3])
    check([x], mask, cu_seqlens=cu_seqlens, max_total=40)


def test_many_sequences(device):
    """More than one block of bounds, most of them in the middle of a tile."""
    cu_seqlens = torch.randint(0, 5000, (301,)).sort().values
    cu_seqlens[0], cu_seqlens[-1] = 0, 5000
    mask = random_mask(5000, share=0.5, device=device)
    check([torch.randn(5000, 2, device=device)], mask, cu_seqlens=cu_seqlens.int().to(device))


def test_overflow_shows_in_the_counts(device):
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    (x,), kept_rows, cu_seqlens, num_kept = tokred.pack_tokens(
        [torch.arange(10, device=device).reshape(2, 5)], mask, max_total=7
    )
    assert x.tolist() == kept_rows.tolist() == list(range(7))
    assert cu_seqlens.tolist() == [0, 5, 7] and num_kept.tolist() == [5, 5]


def test_more_tensors_than_one_launch_takes(device):
    mask = random_mask(2, 30, share=0.5, device=device)
    check([torch.randn(2, 30, d, device=device) for d in range(1, 40)], mask, max_total=33)
    check([], mask, max_total=33)


def test_views(device):
    base = torch.randn(4, 40, 64, device=device)
    mask = random_mask(4, 20, share=0.5, device=device)
    check([base[:, :20, 1:18], base[:, ::2], base[:1, :20].expand(4, 20, 64)], mask)
    check([base.transpose(0, 1)[:20].transpose(0, 1)], mask)
    check([base[:, 3:23, :0]], mask)
    check([base[:0, :20]], mask[:0])
    check([base[:, :0]], mask[:, :0].contiguous())
    misaligned = torch.ones(81, dtype=torch.bool, device=device)[1:].reshape(4, 20)
    check([base[:, :20]], misaligned)


def test_bad_offsets_read_nothing_out_of_bounds(device):
    mask = torch.ones(30, dtype=torch.bool, device=device)
    cu_seqlens = torch.tensor([0, -5, 2**30, 10, 30], dtype=torch.int32, device=device)
    packed, kept_rows, cu_seqlens_kept, num_kept = tokred.pack_tokens(
        [torch.arange(30, device=device)], mask, cu_seqlens=cu_seqlens
    )
    assert_close(packed[0], kept_rows)
    assert kept_rows.tolist() == list(range(30))
    assert ((cu_seqlens_kept >= 0) & (cu_seqlens_kept <= 30)).all() and (num_kept >= 0).all()


def test_offsets_beyond_2_31(device):
    x = torch.empty(2**32 + 4096, dtype=torch.uint8, device=device).as_strided((2, 3, 4), (100, 2**31 + 7, 1))
    x.copy_(torch.arange(24).reshape(2, 3, 4))
    check([x], torch.tensor([[True, False, True], [False, True, True]], device=device))


@given(st.data())
def test_any_mask(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, n = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * n, max_size=rows * n))
    mask = torch.tensor(bits, dtype=torch.bool, device=device).reshape(rows, n)
    capacity = data.draw(st.integers(0, rows * n))
    x = torch.arange(rows * n, device=device).reshape(rows, n)
    (packed,), kept_rows, cu_seqlens, num_kept = check([x], mask, max_total=capacity)
    kept = [i for i, bit in enumerate(bits) if bit]
    assert packed.tolist() == (kept + [0] * capacity)[:capacity]
    assert kept_rows.tolist() == (kept + [-1] * capacity)[:capacity]
    assert num_kept.tolist() == mask.sum(1).tolist()
    assert cu_seqlens.tolist() == [min(sum(num_kept.tolist()[:b]), capacity) for b in range(rows + 1)]


def test_scatter_puts_back_what_was_packed(device):
    x, mask = torch.randn(3, 50, 6, device=device), random_mask(3, 50, share=0.4, device=device)
    (packed,), kept_rows, *_ = tokred.pack_tokens([x], mask, max_total=90)
    restored = tokred.scatter_tokens([packed[None]], kept_rows[None], base=[x.flatten(0, 1)[None]])[0]
    assert_close(restored.reshape(x.shape), x, rtol=0, atol=0)


def test_gradients_equal_reference(device, dtype):
    mask = random_mask(2, 15, share=0.5, device=device)
    cu_seqlens = torch.tensor([0, 4, 30], dtype=torch.int32, device=device)
    for packed in (False, True):
        grads = []
        for function in (tokred.pack_tokens, reference):
            torch.manual_seed(1)
            x = torch.randn(2, 15, 4).to(device, dtype).requires_grad_()
            other = torch.randn(2, 15, 2, 3).to(device, dtype).requires_grad_()
            positions = torch.zeros(2, 15, dtype=torch.int64, device=device)
            tensors, options = [x, positions, other], {"max_total": 11}
            if packed:
                tensors, options = [t.flatten(0, 1) for t in tensors], {"cu_seqlens": cu_seqlens}
            out = function(tensors, mask.flatten() if packed else mask, **options)[0]
            weight = torch.randn(out[0].shape).to(device, dtype)
            ((out[0] * weight).sum() + (out[2].transpose(0, 1) ** 2).sum()).backward()
            grads.append((x.grad, other.grad))
        assert_close(grads[0], grads[1])


def test_result_does_not_depend_on_threads(device, threads):
    mask, x = random_mask(3, 40000, share=0.5, device=device), torch.randn(3, 40000, device=device)
    expected = reference([x], mask)
    for result in threads(lambda: tokred.pack_tokens([x], mask)):
        assert_close(result, expected, rtol=0, atol=0)


def test_autocast_leaves_dtypes_alone(device):
    x, mask = torch.randn(2, 5, 4, device=device), torch.ones(2, 5, dtype=torch.bool, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tokred.pack_tokens([x], mask)[0][0].dtype == torch.float32


def test_vmap_is_refused(device):
    x, mask = torch.randn(2, 3, 5, device=device), torch.ones(3, 5, dtype=torch.bool, device=device)
    with pytest.raises(RuntimeError, match="pack_tokens: a packed result has no batch dimension and cannot be mapped"):
        torch.vmap(lambda a: tokred.pack_tokens([a], mask)[0][0])(x)


X = torch.zeros(2, 6, 4)
MASK = torch.ones(2, 6, dtype=torch.bool)
CU = torch.tensor([0, 6])
ERRORS = {
    "expected mask of shape [batch_size, num_tokens], got [2]": lambda d: ([X.to(d)], MASK[:, 0].to(d), {}),
    "expected mask of shape [total_tokens] (with cu_seqlens), got [2, 6]": (
        lambda d: ([X.to(d)], MASK.to(d), {"cu_seqlens": CU.int().to(d)})
    ),
    "expected mask of dtype bool, got float32": lambda d: ([X.to(d)], MASK.float().to(d), {}),
    "expected mask contiguous, got strides [1, 2]": lambda d: ([X.to(d)], MASK.T.contiguous().T.to(d), {}),
    "expected max_total in [0, 12], got 13": lambda d: ([X.to(d)], MASK.to(d), {"max_total": 13}),
    "expected max_total in [0, 12], got -1": lambda d: ([X.to(d)], MASK.to(d), {"max_total": -1}),
    "expected max_total or exact, got exact and max_total 3": (
        lambda d: ([X.to(d)], MASK.to(d), {"max_total": 3, "exact": True})
    ),
    "expected tensors[1] of shape [batch_size, num_tokens, ...] with the sizes of mask [2, 6], got [2, 5]": (
        lambda d: ([X.to(d), X[:, :5, 0].to(d)], MASK.to(d), {})
    ),
    "expected tensors[0] of shape [total_tokens, ...] with the sizes of mask [6], got [5, 4]": (
        lambda d: ([X[0, :5].to(d)], MASK[0].to(d), {"cu_seqlens": CU.int().to(d)})
    ),
    "expected tensors[0] contiguous after its token dimension, got strides [24, 4, 2]": (
        lambda d: ([X.to(d)[:, :, ::2]], MASK.to(d), {})
    ),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda d: ([X[0].to(d)], MASK[0].to(d), {"cu_seqlens": CU.to(d)})
    ),
    "expected cu_seqlens of shape [batch_size + 1], got [2, 1]": (
        lambda d: ([X[0].to(d)], MASK[0].to(d), {"cu_seqlens": CU.int()[:, None].to(d)})
    ),
    "expected cu_seqlens contiguous, got strides [2]": (
        lambda d: ([X[0].to(d)], MASK[0].to(d), {"cu_seqlens": torch.tensor([0, 1, 6, 1]).int().to(d)[::2]})
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    tensors, mask, options = ERRORS[message](device)
    with pytest.raises(RuntimeError) as caught:
        tokred.pack_tokens(tensors, mask, **options)
    assert f"pack_tokens: {message}" in str(caught.value)
