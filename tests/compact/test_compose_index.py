# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def formula(lists):
    """Slot by slot, in Python."""
    composed = lists[0].tolist()
    for ids in lists[1:]:
        composed = [
            [row[i] if 0 <= i < len(row) and row[i] >= 0 else -1 for i in by] for row, by in zip(composed, ids.tolist())
        ]
    return torch.tensor(composed, device=lists[0].device)


@pytest.mark.parametrize("sizes", [(5,), (9, 4), (30, 17, 17, 3), (4, 9, 0), (0, 4)])
def test_equals_the_formula(device, sizes):
    lists = [torch.randint(-2, high + 2, (3, size)).to(device) for size, high in zip(sizes, (40, *sizes))]
    lists[0].clamp_(min=-1)
    assert_close(tokred.compose_index(*lists), formula(lists).reshape(3, sizes[-1]).long())
    assert_close(tokred.compose_index(*(ids.int() for ids in lists)), formula(lists).reshape(3, sizes[-1]).long())


def test_layers_of_a_model(device):
    """Three layers drop tokens; the composed lists name what is left of the original."""
    x = hidden = torch.randn(2, 40, 6, device=device)
    lists = []
    for k in (25, 12, 5):
        hidden, kept_idx = tokred.prune_topk(hidden, torch.randn(hidden.shape[:2], device=device), k)
        lists.append(kept_idx)
        assert_close(tokred.gather_tokens([x], tokred.compose_index(*lists))[0], hidden, rtol=0, atol=0)


def test_a_list_per_head_after_a_shared_one(device):
    shared = torch.tensor([[4, 2, 9], [1, 0, -1]], device=device)
    per_head = torch.tensor([[[2, 0], [1, -1]], [[2, 1], [0, 0]]], device=device)
    expected = [[[9, 4], [2, -1]], [[-1, 0], [1, 1]]]
    assert tokred.compose_index(shared, per_head).tolist() == expected
    again = torch.tensor([[[1], [0]], [[0], [1]]], device=device)
    assert tokred.compose_index(shared, per_head, again).tolist() == [[[4], [2]], [[-1], [1]]]


def test_compiles_and_maps(device):
    first, second = torch.randint(0, 30, (3, 2, 9)).to(device), torch.randint(-1, 9, (3, 2, 4)).to(device)
    expected = torch.stack([tokred.compose_index(a, b) for a, b in zip(first, second)])
    assert_close(torch.vmap(tokred.compose_index)(first, second), expected)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.compose_index, fullgraph=True, backend="aot_eager")
    assert_close(compiled(first[0], second[0]), expected[0])


def test_errors():
    with pytest.raises(RuntimeError, match="compose_index: expected one list at least, got none"):
        tokred.compose_index()
    with pytest.raises(RuntimeError, match=r"compose_index: expected list 1 with .* before, \[2\], got \[3, 4\]"):
        tokred.compose_index(torch.zeros(2, 3).long(), torch.zeros(3, 4).long())
    with pytest.raises(RuntimeError, match=r"compose_index: expected list 1 with .* before, \[2, 5\], got \[2, 4\]"):
        tokred.compose_index(torch.zeros(2, 5, 3).long(), torch.zeros(2, 4).long())
