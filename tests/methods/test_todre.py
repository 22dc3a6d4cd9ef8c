# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.todre import todre
from tokred.testing import assert_close


def formula(x, score, k):
    """S_v = u_v . (sum of kept unit vectors), the smallest next; float64, one image."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    picks = [int(score.argmax())]
    while len(picks) < k:
        s = unit @ unit[picks].sum(0)
        s[picks] = torch.inf
        picks.append(int(s.argmin()))
    return torch.tensor(sorted(picks))


@pytest.mark.parametrize(("num_tokens", "keep"), [(300, 30), (50, 50), (33, 1)])
def test_equals_the_formula(device, num_tokens, keep):
    x, score = torch.randn(2, num_tokens, 32, device=device), torch.rand(2, num_tokens, device=device)
    out = todre(x, score, keep=keep)
    for b in range(2):
        expected = formula(x[b].cpu(), score[b].cpu(), keep)
        assert_close(out.kept_idx[b].cpu(), expected)
        assert_close(out.x[b], x[b, expected.to(device)], rtol=0, atol=0)


def test_version_1_is_k_centre(device):
    x, score = torch.randn(1, 80, 16, device=device), torch.rand(1, 80, device=device)
    unit = (x[0].double() / x[0].double().norm(dim=-1, keepdim=True)).cpu()
    picks = [int(score.argmax())]
    while len(picks) < 20:
        nearest = (1 - unit @ unit[picks].T).amin(1)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    assert todre(x, score, keep=20, compat="v1").kept_idx[0].tolist() == sorted(picks)


def test_ragged_images(device):
    lens = [30, 7, 64]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 8, device=device), torch.rand(sum(lens), device=device)
    out = todre(x, score, keep=10, cu_seqlens=cu_seqlens, max_seqlen=64)
    assert out.num_kept.tolist() == [10, 7, 10]
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        alone = todre(x[None, start : start + length], score[None, start : start + length], keep=min(10, length))
        assert_close(out.x[b, : min(10, length)], alone.x[0], rtol=0, atol=0)


def test_compat_is_checked():
    x = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="expected compat to be None or 'v1', got 'v3'"):
        todre(x, x[..., 0], keep=1, compat="v3")
    with pytest.raises(ValueError, match="expected dense input with compat='v1', got cu_seqlens"):
        todre(x[0], x[0, :, 0], keep=1, compat="v1", cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
