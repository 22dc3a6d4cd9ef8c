# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.select.list_to_slots")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    meta = {"dtype": torch.int32, "device": "meta"}  # floors look at shapes and dtypes alone
    lists, table, lens = torch.empty(2, 32, 512, **meta), torch.empty(2, 8, 64, **meta), torch.empty(2, 8, **meta)
    entries = 2 * 32 * 512
    assert floor(lists, table, page_size=16) == (entries * (4 + 4) + 2 * 8 * 64 * 4, 0)  # lists, slots, tables
    assert floor(lists.long(), table, page_size=16, kv_lens=lens) == (entries * (8 + 4) + 2 * 8 * (64 + 1) * 4, 0)
    assert floor(lists, torch.empty(2, 2**20, **meta), page_size=16) == (entries * (4 + 4 + 4), 0)  # a page per entry


def check(kept_idx, page_table, **options):
    actual = tokred.list_to_slots(kept_idx, page_table, **options)
    assert_close(actual, reference(kept_idx, page_table, **options), name="list_to_slots")
    return actual


@pytest.mark.parametrize("page_size", [1, 16, 24, 128])
@pytest.mark.parametrize("k", [1, 31, 255, 256, 257, 2048])
def test_sizes(device, page_size, k):
    table = torch.randint(-1, 99, (3, 2, 7), dtype=torch.int32).to(device)
    lists = torch.randint(-3, 8 * page_size, (3, 6, k)).to(device)
    lens = torch.randint(0, 7 * page_size + 1, (3, 2), dtype=torch.int32).to(device)
    for index in (lists, lists.int()):
        check(index, table, page_size=page_size)
        check(index, table, page_size=page_size, kv_lens=lens)
        check(index, table[:, 0].contiguous(), page_size=page_size, kv_lens=lens[:, 1].contiguous())
        check(index[:, 0].contiguous(), table[:, 0].contiguous(), page_size=page_size)


@given(st.data())
def test_any_list(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    page_size, pages = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    lists = torch.tensor([data.draw(st.lists(st.integers(-2, 25), max_size=20))], dtype=torch.int64, device=device)
    table = torch.tensor([data.draw(st.lists(st.integers(-1, 9), min_size=pages, max_size=pages))], device=device)
    lens = torch.tensor([data.draw(st.integers(-1, 25))], dtype=torch.int32, device=device)
    slots = check(lists, table.int(), page_size=page_size, kv_lens=lens)[0].tolist()
    for position, slot in zip(lists[0].tolist(), slots):
        inside = 0 <= position < min(int(lens), pages * page_size)
        page = int(table[0, position // page_size]) if inside else -1
        assert slot == (page * page_size + position % page_size if page >= 0 else -1)


def test_values_at_the_limits(device):
    """Whatever stands in the tensors, nothing is read out of bounds and no slot wraps around."""
    table = torch.tensor([[2**31 - 1, 2**27 - 1, 2**27, -(2**31)]], dtype=torch.int32, device=device)
    lists = torch.tensor([[0, 16, 31, 32, 48, 63, 64, 2**62, -(2**62)]], device=device)
    expected = [[-1, 2**31 - 16, 2**31 - 1, -1, -1, -1, -1, -1, -1]]
    assert check(lists, table, page_size=16).tolist() == expected
    lens = torch.tensor([2**31 - 1], dtype=torch.int32, device=device)
    assert check(lists, table, page_size=16, kv_lens=lens).tolist() == expected
    assert (tokred.list_to_slots(lists, table, page_size=16, kv_lens=-lens) == -1).all()


def test_offsets_beyond_2_31(device):
    table = torch.empty(129, 2**24 + 1, dtype=torch.int32, device=device)  # of which the end of the last row is read
    table[-1, -3:] = torch.tensor([7, -1, 2**20], device=device)
    lists = torch.full((129, 4), -1, device=device)
    lists[-1] = torch.tensor([2**24 * 16 + 5, (2**24 - 1) * 16, (2**24 - 2) * 16 + 15, (2**24 + 1) * 16])
    slots = tokred.list_to_slots(lists, table, page_size=16)
    assert slots[-1].tolist() == [2**24 + 5, -1, 7 * 16 + 15, -1]
    assert (slots[:-1] == -1).all()


def test_empty(device):
    lists = torch.zeros(2, 3, 4, dtype=torch.int64, device=device)
    table = torch.zeros(2, 3, 2, dtype=torch.int32, device=device)
    assert check(lists[..., :0], table, page_size=16).shape == (2, 3, 0)
    assert tokred.list_to_slots(lists[:, :0], table[:, :0], page_size=16).shape == (2, 0, 4)
    assert tokred.list_to_slots(lists[:0], table[:0], page_size=16).shape == (0, 3, 4)
    assert (check(lists, table[..., :0].contiguous(), page_size=16) == -1).all()


def test_list_is_independent_of_its_batch(device, threads):
    lists = torch.randint(-1, 3000, (5, 8, 2500)).to(device)
    table = torch.randint(0, 99, (5, 100), dtype=torch.int32).to(device)
    alone = [tokred.list_to_slots(lists[b : b + 1], table[b : b + 1], page_size=32) for b in range(5)]
    for result in threads(lambda: tokred.list_to_slots(lists, table, page_size=32)):
        assert_close(result, torch.cat(alone))


def test_slots_are_rows_of_the_cache(device):
    """What attend_selected reads through the table is what the slots name."""
    table = torch.tensor([[4, 1, 3], [0, 2, 5]], dtype=torch.int32, device=device)
    cache = torch.randn(6, 16, 2, 64, device=device)
    lists = torch.tensor([[[0, 47, 20, 16]], [[31, 32, 1, 5]]], device=device)
    slots = tokred.list_to_slots(lists, table, page_size=16)
    q = torch.randn(2, 4, 1, 64, device=device)
    paged = tokred.attend_selected(q, cache, cache, lists, page_table=table)
    rows = cache.view(96, 2, 64)[slots[:, 0].long()].transpose(1, 2).contiguous()
    order = torch.arange(4, device=device).expand(2, 1, 4).contiguous()
    assert_close(paged, tokred.attend_selected(q, rows, rows, order))


def test_vmap(device):
    lists = torch.randint(-1, 60, (3, 2, 9)).to(device)
    table = torch.randint(0, 9, (2, 4), dtype=torch.int32).to(device)
    mapped = torch.vmap(lambda x: tokred.list_to_slots(x, table, page_size=16))(lists)
    assert_close(mapped, torch.stack([tokred.list_to_slots(x, table, page_size=16) for x in lists]))


ERRORS = {
    "expected kept_idx of shape [batch_size, k] or [batch_size, num_heads, k], got [5]": (
        lambda i, t: tokred.list_to_slots(i[0, 0], t, page_size=16)
    ),
    "expected kept_idx of dtype int64 or int32, got float32": (
        lambda i, t: tokred.list_to_slots(i.float(), t, page_size=16)
    ),
    "expected kept_idx contiguous, got strides [20, 5, 2]": (
        lambda i, t: tokred.list_to_slots(i[..., ::2], t, page_size=16)
    ),
    "expected page_table of shape [batch_size, max_pages], got [2, 2, 3]": (
        lambda i, t: tokred.list_to_slots(i[:, 0].contiguous(), t, page_size=16)
    ),
    "expected page_table of shape [batch_size, max_pages] or [batch_size, num_kv_heads, max_pages], got [3]": (
        lambda i, t: tokred.list_to_slots(i, t[0, 0], page_size=16)
    ),
    "expected page_table with batch_size 2, got [1, 2, 3]": (lambda i, t: tokred.list_to_slots(i, t[:1], page_size=16)),
    "expected num_heads to be a multiple of num_kv_heads, got 4 and 3": (
        lambda i, t: tokred.list_to_slots(i, t[:, :1].repeat(1, 3, 1), page_size=16)
    ),
    "expected page_size >= 1, got 0": lambda i, t: tokred.list_to_slots(i, t, page_size=0),
    "expected page_table of dtype int32, got int64": lambda i, t: tokred.list_to_slots(i, t.long(), page_size=16),
    "expected page_table contiguous, got strides [6, 3, 2]": (
        lambda i, t: tokred.list_to_slots(i, t[..., ::2], page_size=16)
    ),
    "expected kv_lens of shape [batch_size, num_kv_heads] = [2, 2], got [2]": (
        lambda i, t: tokred.list_to_slots(i, t, page_size=16, kv_lens=t[:, 0, 0].contiguous())
    ),
    "expected kv_lens of shape [batch_size] = [2], got [2, 2]": (
        lambda i, t: tokred.list_to_slots(i, t[:, 0].contiguous(), page_size=16, kv_lens=t[..., 0].contiguous())
    ),
    "expected kv_lens of dtype int32, got int64": (
        lambda i, t: tokred.list_to_slots(i, t, page_size=16, kv_lens=t[..., 0].long())
    ),
    "expected kv_lens contiguous, got strides [6, 3]": (
        lambda i, t: tokred.list_to_slots(i, t, page_size=16, kv_lens=t[..., 0])
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    lists = torch.zeros(2, 4, 5, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](lists, torch.zeros(2, 2, 3, dtype=torch.int32, device=device))
    assert f"list_to_slots: {message}" in str(caught.value)
