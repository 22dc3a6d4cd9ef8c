# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

from tokred.methods.fastervlm import cls_attention, fastervlm
from tokred.testing import assert_close


def formula(q, k):
    """s = mean over heads of softmax(q_cls K^T / sqrt(d)), without [CLS]; float64."""
    logits = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    return logits.softmax(-1)[:, :, 0, 1:].mean(1)


@pytest.mark.parametrize("num_tokens", [49, 576])
def test_equals_the_formula(device, dtype, num_tokens):
    q, k = torch.randn(2, 4, 1, 64).to(device, dtype), torch.randn(2, 4, 1 + num_tokens, 64).to(device, dtype)
    x = torch.randn(2, num_tokens, 32).to(device, dtype)
    out = fastervlm(x, q, k, keep=num_tokens // 9)
    assert_close(out.score, formula(q, k), rtol=1e-4, atol=1e-6)
    expected = out.score.topk(num_tokens // 9).indices.sort().values
    assert_close(out.kept_idx, expected)
    assert_close(out.x, x.gather(1, expected[..., None].expand(-1, -1, 32)), rtol=0, atol=0)


def test_set_equals_the_formula_where_no_scores_are_near(device):
    """Well separated scores: the float64 formula itself must give the same tokens."""
    k = torch.zeros(1, 1, 101, 8, device=device)
    k[0, 0, 1:, 0] = torch.randperm(100).to(device) * 0.5
    q = torch.ones(1, 1, 1, 8, device=device)
    out = fastervlm(torch.randn(1, 100, 4, device=device), q, k, keep=20)
    assert_close(out.kept_idx, formula(q, k).topk(20).indices.sort().values)


def test_ragged_images(device):
    """Images of different sizes, packed: each alone gives the same."""
    lens = [30, 7, 64]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x, score = torch.randn(sum(lens), 8, device=device), torch.rand(sum(lens), device=device)
    out = fastervlm(x, keep=10, score=score, cu_seqlens=cu_seqlens, max_seqlen=64)
    assert out.num_kept.tolist() == [10, 7, 10]
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        alone = fastervlm(
            x[None, start : start + length], keep=min(10, length), score=score[None, start : start + length]
        )
        assert_close(out.x[b, : min(10, length)], alone.x[0], rtol=0, atol=0)


def test_needs_scores():
    with pytest.raises(ValueError, match="expected q and k of the scoring layer, or score"):
        fastervlm(torch.zeros(1, 4, 2), keep=2)


def test_takes_one_query():
    """The queries of all tokens would silently give the sum over all of them."""
    with pytest.raises(
        ValueError, match=r"expected q of shape \[batch_size, num_q_heads, 1, head_dim\], got \[1, 2, 5, 8\]"
    ):
        cls_attention(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))


def test_cls_takes_part_in_the_softmax(device):
    q, k = torch.ones(1, 1, 1, 8, device=device), torch.zeros(1, 1, 5, 8, device=device)
    assert_close(cls_attention(q, k), torch.full((1, 4), 0.2, device=device))
