# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


@pytest.mark.parametrize("max_total", [None, 0, 4, 9])
def test_packed_results_of_a_selection(device, max_total):
    lens = [5, 0, 7, 3]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(15, 6, device=device), torch.randn(15, device=device)
    kept_idx, num_kept = tokred.select_topk(score, 4, cu_seqlens=cu_seqlens)
    rows, bounds, counts = tokred.pack_lists(kept_idx, cu_seqlens=cu_seqlens, max_total=max_total)
    expected = [int(cu_seqlens[b]) + i for b in range(4) for i in kept_idx[b].tolist() if i >= 0]
    capacity = 16 if max_total is None else max_total
    assert rows.tolist() == (expected + [-1] * capacity)[:capacity]
    assert bounds.tolist() == [min(sum(num_kept.tolist()[:b]), capacity) for b in range(5)]
    assert_close(counts, num_kept)
    packed = tokred.gather_tokens([x[None]], rows[None])[0][0]
    assert_close(packed[: len(expected)], x[expected][:capacity], rtol=0, atol=0)
    assert not packed[len(expected) :].any()


def test_dense_and_exact(device):
    """Any order, holes anywhere."""
    kept_idx = torch.tensor([[7, -1, 2], [-1, -1, -1], [0, 9, -5]], dtype=torch.int32, device=device)
    rows, bounds, counts = tokred.pack_lists(kept_idx, num_tokens=10, exact=True)
    assert rows.tolist() == [7, 2, 20, 29] and bounds.tolist() == [0, 2, 2, 4] and counts.tolist() == [2, 0, 2]
    assert tokred.pack_lists(kept_idx[:0], num_tokens=10)[1].tolist() == [0]


def test_compiles(device):
    kept_idx = torch.tensor([[7, -1, 2], [0, 9, -5]], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.pack_lists, fullgraph=True, backend="aot_eager")
    assert_close(compiled(kept_idx, num_tokens=10), tokred.pack_lists(kept_idx, num_tokens=10))


def test_errors():
    kept_idx = torch.zeros(2, 3).long()
    with pytest.raises(RuntimeError, match=r"pack_lists: expected num_tokens .* got neither"):
        tokred.pack_lists(kept_idx)
    with pytest.raises(RuntimeError, match=r"pack_lists: expected num_tokens .* got both"):
        tokred.pack_lists(kept_idx, num_tokens=5, cu_seqlens=torch.tensor([0, 5, 10]).int())
    with pytest.raises(RuntimeError, match=r"pack_lists: expected kept_idx of shape \[batch_size, k\], got \[3\]"):
        tokred.pack_lists(kept_idx[0], num_tokens=5)
