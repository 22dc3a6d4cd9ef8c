# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def loop(boundary, at, valid):
    """One sequence, token by token."""
    out, segment, open_segment = [], -1, False
    for mark, ok in zip(boundary.tolist(), valid.tolist()):
        if not ok:
            out.append(-1)
            continue
        if mark if at == "start" else not open_segment:
            segment, open_segment = segment + 1, True
        out.append(segment)
        if at == "end" and mark:
            open_segment = False
    return torch.tensor(out, dtype=torch.int64), max([s + 1 for s in out], default=0)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_a_loop(device, at, share):
    boundary, valid = torch.rand(4, 33) < share, torch.rand(4, 33) < 0.8
    valid[3] = False
    for mask in (valid, None):
        given = torch.ones_like(valid) if mask is None else mask
        dst_idx, num = tokred.boundary_map(boundary.to(device), at=at, valid=None if mask is None else mask.to(device))
        for b in range(4):
            expected, count = loop(boundary[b], at, given[b])
            assert torch.equal(dst_idx[b].cpu(), expected)
            assert num[b] == count


@pytest.mark.parametrize("at", ["start", "end"])
def test_packed_sequences_are_numbered_as_if_alone(device, at):
    boundary, valid = torch.rand(50) < 0.3, torch.rand(50) < 0.9
    cu_seqlens = torch.tensor([0, 13, 13, 14, 44], dtype=torch.int32)
    dst_idx, num = tokred.boundary_map(
        boundary.to(device), at=at, valid=valid.to(device), cu_seqlens=cu_seqlens.to(device)
    )
    assert num.dtype == torch.int32
    for b in range(4):
        part = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        expected, count = loop(boundary[part], at, valid[part])
        assert torch.equal(dst_idx[part].cpu(), expected)
        assert num[b] == count
    assert (dst_idx[44:] == -1).all()


def test_empty_and_compiled(device):
    dst_idx, num = tokred.boundary_map(torch.zeros(2, 0, dtype=torch.bool, device=device))
    assert dst_idx.shape == (2, 0) and num.tolist() == [0, 0]
    boundary = torch.rand(2, 9, device=device) < 0.4
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.boundary_map, fullgraph=True, backend="aot_eager")
    assert_close(compiled(boundary), tokred.boundary_map(boundary))
    expected = tokred.boundary_map(boundary[0], cu_seqlens=cu_seqlens)
    assert_close(compiled(boundary[0], cu_seqlens=cu_seqlens), expected)


def test_errors():
    marks = torch.zeros(2, 5, dtype=torch.bool)
    for message, args, options in (
        (r"boundary bool of shape \[batch_size, num_tokens\], got int64 \[2, 5\]", (marks.long(),), {}),
        (r"boundary bool of shape \[total_tokens\], got bool \[2, 5\]", (marks,), {"cu_seqlens": torch.zeros(2).int()}),
        (r"at 'start' or 'end', got 'middle'", (marks,), {"at": "middle"}),
        (r"valid bool of shape \[2, 5\], got float32 \[2, 5\]", (marks,), {"valid": marks.float()}),
        (
            r"cu_seqlens int32 of shape \[batch_size \+ 1\], got int64 \[2\]",
            (marks[0],),
            {"cu_seqlens": torch.zeros(2).long()},
        ),
    ):
        with pytest.raises(RuntimeError, match="boundary_map: expected " + message):
            tokred.boundary_map(*args, **options)
