# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close


def formula(x, row, before):
    """One sequence as a Python list: what goes in front of each token, then the token."""
    out = []
    for i in range(len(x) + 1):
        out += [row[j] for j, place in enumerate(before) if place == i]
        out += x[i : i + 1]
    return out + [0] * (len(x) + len(before) - len(out))


@given(st.data())
def test_equals_the_formula(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, m = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    before = data.draw(st.lists(st.integers(-2, n + 2), min_size=m, max_size=m))
    x, row = list(range(1, n + 1)), list(range(101, 101 + m))
    (out,), source = tokred.insert_tokens(
        [torch.tensor([x], dtype=torch.int64, device=device)],
        [torch.tensor([row], dtype=torch.int64, device=device)],
        torch.tensor([before], dtype=torch.int64, device=device),
    )
    assert out[0].tolist() == formula(x, row, before)
    both = x + row
    assert [both[i] if i >= 0 else 0 for i in source[0].tolist()] == out[0].tolist()


def test_several_tensors_and_sequences(device):
    """A newline behind every row of two images' grids, with position ids; late tokens in another place per sequence."""
    x, ids = torch.randn(2, 12, 5, device=device), torch.arange(24, device=device).reshape(2, 12)
    newline = torch.randn(5, device=device).expand(2, 3, 5)
    (y, new_ids), _ = tokred.insert_tokens(
        [x, ids], [newline, torch.full((2, 3), -7, device=device)], torch.tensor([4, 8, 12], device=device)
    )
    grid = torch.cat([x.reshape(2, 3, 4, 5), newline[:, :, None]], 2).reshape(2, 15, 5)
    assert_close(y, grid, rtol=0, atol=0)
    assert new_ids[1].tolist() == [12, 13, 14, 15, -7, 16, 17, 18, 19, -7, 20, 21, 22, 23, -7]
    before = torch.tensor([[0, 0], [12, -1]], dtype=torch.int32, device=device)
    (late,), source = tokred.insert_tokens([ids], [torch.tensor([[100, 101], [200, 201]], device=device)], before)
    assert late[0].tolist() == [100, 101, *range(12)] and late[1].tolist() == [*range(12, 24), 200, 0]
    assert source[1, -1] == -1


def test_gradients(device):
    x = torch.randn(1, 3, 2, device=device, requires_grad=True)
    row = torch.randn(1, 2, 2, device=device, requires_grad=True)
    (out,), _ = tokred.insert_tokens([x], [row], torch.tensor([1, -1], device=device))
    (out * torch.arange(1.0, 6.0, device=device)[None, :, None]).sum().backward()
    assert x.grad[0, :, 0].tolist() == [1, 3, 4] and row.grad[0, :, 0].tolist() == [2, 0]


def test_compiles(device):
    x, row = torch.randn(2, 7, 3, device=device), torch.randn(2, 2, 3, device=device)
    before = torch.tensor([3, 7], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.insert_tokens, fullgraph=True, backend="aot_eager")
    assert_close(compiled([x], [row], before), tokred.insert_tokens([x], [row], before), rtol=0, atol=0)


def test_errors():
    x, row, before = torch.zeros(2, 5, 3), torch.zeros(2, 1, 3), torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"insert_tokens: expected rows for each tensor \(1, at least 1\), got 2"):
        tokred.insert_tokens([x], [row, row], before)
    with pytest.raises(RuntimeError, match=r"expected tensors\[0\] of shape \[2, 5, '...'\] and rows\[0\] of shape"):
        tokred.insert_tokens([x], [row[:1]], before)
    with pytest.raises(RuntimeError, match=r"expected tensors\[1\] of shape"):
        tokred.insert_tokens([x, x[:, :4]], [row, row], before)
