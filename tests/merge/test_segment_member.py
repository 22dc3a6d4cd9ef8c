# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


@pytest.mark.parametrize(("num_tokens", "num_out"), [(0, 3), (1, 1), (40, 7), (40, 100), (9, 0)])
def test_equals_a_loop(device, num_tokens, num_out):
    dst_idx = torch.randint(-2, num_out + 2, (3, num_tokens))
    first, last = torch.full((3, num_out), -1), torch.full((3, num_out), -1)
    for b in range(3):
        for i in range(num_tokens):
            j = int(dst_idx[b, i])
            if 0 <= j < num_out:
                last[b, j] = i
                if first[b, j] < 0:
                    first[b, j] = i
    for ids in (dst_idx.to(device), dst_idx.to(device).int()):
        assert_close(tokred.segment_member(ids, num_out).cpu(), first)
        assert_close(tokred.segment_member(ids, num_out, "last").cpu(), last)


def test_positions_by_member(device):
    """Position ids with axes, of the first member of each row, empty rows 0."""
    dst_idx = torch.tensor([[1, 0, 1, -1, 0, 3]], device=device)
    positions = torch.arange(18, device=device).reshape(3, 1, 6)
    (taken,) = tokred.gather_tokens([positions], tokred.segment_member(dst_idx, 4), dims=[-2])
    assert taken[:, 0].tolist() == [[1, 0, 0, 5], [7, 6, 0, 11], [13, 12, 0, 17]]


def test_compiled(device):
    dst_idx = torch.randint(-1, 5, (2, 20), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.segment_member, fullgraph=True, backend="aot_eager")
    assert_close(compiled(dst_idx, 5), tokred.segment_member(dst_idx, 5))


def test_errors():
    with pytest.raises(
        RuntimeError, match=r"segment_member: expected dst_idx of shape \[batch_size, num_tokens\], got \[4\]"
    ):
        tokred.segment_member(torch.zeros(4).long(), 2)
    with pytest.raises(RuntimeError, match="segment_member: expected which 'first' or 'last', got 'middle'"):
        tokred.segment_member(torch.zeros(1, 4).long(), 2, "middle")
