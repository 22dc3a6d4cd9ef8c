# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.select.list_union")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    lists = torch.empty(2, 32, 512, dtype=torch.int64, device="meta")  # floors look at shapes and dtypes alone
    read = 2 * 32 * 512 * 8
    assert floor(lists, 8, kv_len=32768) == (read + 2 * 8 * (4 * 512 * 8 + 4), 0)  # unions and their counts
    assert floor(lists, 8, kv_len=1000) == (read + 2 * 8 * (1000 * 8 + 4), 0)  # no more than there are positions


def check(kept_idx, num_kv_heads, *, kv_len):
    actual = tokred.list_union(kept_idx, num_kv_heads, kv_len=kv_len)
    assert_close(actual, reference(kept_idx, num_kv_heads, kv_len=kv_len), name="list_union")
    return actual


# A word, a tile of a block's words (16,384), the span of a block (262,144): one less, equal, one more; then several spans.
@pytest.mark.parametrize("kv_len", [1, 31, 32, 33, 64, 65, 4096, 16383, 16385, 262143, 262144, 262145, 600_001])
def test_sizes(device, kv_len):
    for k in (1, 33, 700):
        lists = torch.randint(-1, kv_len, (2, 8, k)).to(device)
        lists[0, 3, :1] = kv_len - 1
        lists[1, 5, -1:] = 0
        for num_kv_heads in (1, 2, 8):
            check(lists, num_kv_heads, kv_len=kv_len)
        check(lists.int(), 2, kv_len=kv_len)


def test_full_and_disjoint(device):
    """Unions as long as they can be."""
    order = torch.rand(2, 4 * 512).argsort(-1).reshape(2, 4, 512).to(device)
    union_idx, num_union = check(order, 1, kv_len=2048)
    assert (union_idx[:, 0] == torch.arange(2048, device=device)).all() and (num_union == 2048).all()
    assert (check(order, 1, kv_len=9000)[1] == 2048).all()
    check(order % 7, 2, kv_len=7)


@given(st.data())
def test_any_lists(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group, k, kv_len = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12)), data.draw(st.integers(0, 70))
    heads = st.lists(st.integers(-3, 75), min_size=k, max_size=k)
    lists = data.draw(st.lists(heads, min_size=2 * group, max_size=2 * group))
    union_idx, num_union = check(torch.tensor([lists], device=device).reshape(1, 2 * group, k).long(), 2, kv_len=kv_len)
    for h in range(2):
        positions = {p for head in lists[h * group : (h + 1) * group] for p in head if 0 <= p < kv_len}
        assert union_idx[0, h, : num_union[0, h]].tolist() == sorted(positions)
        assert (union_idx[0, h, num_union[0, h] :] == -1).all()


def test_values_at_the_limits(device):
    lists = torch.tensor([[[2**62, -(2**62), 2**32 + 1, 2**31, 5, 9]]], device=device)
    assert check(lists, 1, kv_len=9)[0].tolist() == [[[5, -1, -1, -1, -1, -1]]]


def test_offsets_beyond_2_31(device):
    if device != "cuda":
        pytest.skip("2 ** 31 entries have to be read, all of them: a minute on a CPU")
    lists = torch.zeros(65, 1, 2**25 + 1, dtype=torch.int32, device=device)
    lists[-1, 0, -2:] = torch.tensor([5, 99], device=device)
    union_idx, num_union = tokred.list_union(lists, 1, kv_len=64)
    assert num_union.flatten().tolist() == [1] * 64 + [2]
    assert union_idx[-1, 0, :3].tolist() == [0, 5, -1]


def test_empty(device):
    lists = torch.zeros(2, 4, 3, dtype=torch.int64, device=device)
    assert check(lists[:0], 2, kv_len=9)[0].shape == (0, 2, 6)
    assert check(lists[..., :0], 2, kv_len=9)[0].shape == (2, 2, 0)
    union_idx, num_union = check(lists, 2, kv_len=0)
    assert union_idx.shape == (2, 2, 0) and (num_union == 0).all()
    assert check(lists[:, :0], 2, kv_len=9)[0].shape == (2, 2, 0)


def test_list_is_independent_of_its_batch(device, threads):
    lists = torch.randint(-1, 9000, (6, 8, 900)).to(device)
    alone = [tokred.list_union(lists[b : b + 1], 2, kv_len=9000) for b in range(6)]
    for result in threads(lambda: tokred.list_union(lists, 2, kv_len=9000)):
        assert_close(result, [torch.cat(parts) for parts in zip(*alone)])


def test_union_of_selections(device):
    """The kv head's list serves each of its query heads: what they selected is in it."""
    score = torch.randn(2, 8, 300, device=device)
    lists = tokred.select_topk(score, 40, keep_last=8)
    union_idx, _ = tokred.list_union(lists, 2, kv_len=300)
    for h in range(8):
        assert (lists[:, h, :, None] == union_idx[:, h // 4, None]).any(-1).all()


def test_vmap(device):
    lists = torch.randint(-1, 60, (2, 4, 9, 3)).to(device)
    mapped = torch.vmap(lambda x: tokred.list_union(x, 2, kv_len=50), in_dims=3)(lists)
    for i in range(3):
        assert_close([m[i] for m in mapped], tokred.list_union(lists[..., i].contiguous(), 2, kv_len=50))


ERRORS = {
    "expected kept_idx of shape [batch_size, num_q_heads, k], got [4, 5]": (
        lambda i: tokred.list_union(i[0], 2, kv_len=9)
    ),
    "expected kept_idx of dtype int64 or int32, got float32": lambda i: tokred.list_union(i.float(), 2, kv_len=9),
    "expected kept_idx contiguous, got strides [20, 5, 2]": lambda i: tokred.list_union(i[..., ::2], 2, kv_len=9),
    "expected num_kv_heads to divide num_q_heads 4, got 3": lambda i: tokred.list_union(i, 3, kv_len=9),
    "expected num_kv_heads to divide num_q_heads 4, got 0": lambda i: tokred.list_union(i, 0, kv_len=9),
    "expected kv_len >= 0, got -1": lambda i: tokred.list_union(i, 2, kv_len=-1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.zeros(2, 4, 5, dtype=torch.int64, device=device))
    assert f"list_union: {message}" in str(caught.value)
