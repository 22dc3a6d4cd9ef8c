# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.focusui import focusui, instruction_score
from tokred.testing import assert_close


def formula(x, score, keep, marker):
    """One image in float64: top-k with ties to the lowest index, then PosPad; returns rows, indices and sizes."""
    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    kept = set(order[:keep])
    rows, index, size, run = [], [], [], 0
    for i in range(len(score)):
        if i in kept:
            rows.append(x[i].double())
            index.append(i)
            size.append(1.0)
            run = 0
            continue
        run += 1
        if i + 1 == len(score) or i + 1 in kept:
            rows.append(marker.double())
            index.append(i)
            size.append(float(run))
    return torch.stack(rows) if rows else x.new_zeros((0, x.shape[1])).double(), index, size


def compare(out, b, expected):
    rows, index, size = expected
    count = len(index)
    assert int(out.num_kept[b]) == count
    assert out.kept_idx[b].tolist() == index + [-1] * (out.kept_idx.shape[1] - count)
    assert out.size[b].tolist() == size + [0.0] * (out.size.shape[1] - count)
    assert_close(out.x[b, :count].double().cpu(), rows.cpu(), rtol=0, atol=0)
    assert not out.x[b, count:].any()


@pytest.mark.parametrize("keep", [0, 1, 20, 63, 64])
def test_equals_the_formula(device, dtype, keep):
    x, marker = torch.randn(3, 64, 8).to(device, dtype), torch.randn(8).to(device, dtype)
    score = torch.randn(3, 64).to(dtype).to(device)  # bf16 ones tie
    score[1] = 0.5  # all tie
    out = focusui(x, score, keep=keep, marker=marker)
    assert out.x.shape[1] == min(2 * keep + 1, 64)
    for b in range(3):
        compare(out, b, formula(x[b], score[b], keep, marker))


def test_worst_case_fits_the_capacity(device):
    """Every other patch is kept: as many runs as there can be."""
    score = (torch.arange(41) % 2).float()[None].to(device)
    out = focusui(torch.randn(1, 41, 4, device=device), score, keep=20)
    assert out.num_kept.tolist() == [41] and out.kept_idx[0].tolist() == list(range(41))
    assert not out.x[0, ::2].any(), "without an embedding markers are zeros"


def test_ragged_images(device):
    lens = [30, 0, 7, 64, 1]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, marker = torch.randn(sum(lens), 8, device=device), torch.randn(8, device=device)
    score = torch.randn(sum(lens), device=device).round(decimals=1)
    for max_seqlen in (64, None):
        out = focusui(x, score, keep=10, marker=marker, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
            part = slice(start, start + length)
            compare(out, b, formula(x[part], score[part], min(10, length), marker))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_score_equals_the_formula(device, dtype, reduce):
    patches, text = torch.randn(2, 33, 16).to(device, dtype), torch.randn(2, 5, 16).to(device, dtype)
    similar = patches.double() @ text.double().transpose(1, 2)
    expected = similar.mean(-1) if reduce == "mean" else similar.amax(-1)
    assert_close(instruction_score(patches, text, reduce=reduce), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_tokens_and_marker(device):
    x = torch.randn(2, 12, 4, device=device, requires_grad=True)
    marker = torch.zeros(4, device=device, requires_grad=True)
    score = torch.arange(12.0, device=device).expand(2, 12).contiguous()
    focusui(x, score, keep=3, marker=marker).x.sum().backward()
    assert x.grad[..., 0].tolist() == [[0.0] * 9 + [1.0] * 3] * 2 and marker.grad.tolist() == [2.0] * 4


def test_unknown_reduction():
    with pytest.raises(ValueError, match="expected reduce to be 'mean' or 'max', got 'sum'"):
        instruction_score(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), reduce="sum")
