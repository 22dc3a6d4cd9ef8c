# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.divprune import divprune
from tokred.testing import assert_close


def formula(x, k):
    """The published steps for one image, in float64: all distances, the minimum over all picks anew for each pick."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    d = 1 - unit @ unit.T
    picks = [int(d.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picks) < k:
        nearest = d[picks].amin(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return torch.tensor(sorted(picks))


@pytest.mark.parametrize(("num_tokens", "keep"), [(576, 56), (100, 1), (100, 100), (33, 7)])
def test_equals_the_formula(device, num_tokens, keep):
    x = torch.randn(2, num_tokens, 32, device=device)
    out = divprune(x, keep=keep)
    for b in range(2):
        expected = formula(x[b].cpu(), keep)
        assert_close(out.kept_idx[b].cpu(), expected)
        assert_close(out.x[b], x[b, expected.to(device)], rtol=0, atol=0)


def test_default_ratio_and_gradient(device):
    x = torch.randn(1, 576, 8, device=device, requires_grad=True)
    out = divprune(x)
    assert out.x.shape == (1, 56, 8)
    out.x.sum().backward()
    assert_close(x.grad[0, :, 0].nonzero()[:, 0], out.kept_idx[0])


def test_duplicates_are_not_repeated(device):
    """Trap of the released loop: with all distances 0 it picks one index again and again."""
    out = divprune(torch.ones(1, 20, 4, device=device), keep=9)
    assert out.kept_idx[0].tolist() == list(range(9))


def test_ragged_images(device):
    lens = [30, 7, 64]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x = torch.randn(sum(lens), 8, device=device)
    out = divprune(x, keep=10, cu_seqlens=cu_seqlens, max_seqlen=64)
    assert out.num_kept.tolist() == [10, 7, 10]
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        alone = divprune(x[None, start : start + length], keep=min(10, length))
        assert_close(out.x[b, : min(10, length)], alone.x[0], rtol=0, atol=0)
        assert (out.x[b, length:] == 0).all()
    with pytest.raises(ValueError, match="divprune: expected keep for packed input"):
        divprune(x, cu_seqlens=cu_seqlens)
