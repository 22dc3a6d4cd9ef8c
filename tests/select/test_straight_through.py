# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def test_factors_are_exact(device, dtype):
    soft = (9 * torch.randn(2, 3, 40)).softmax(-1).to(dtype).to(device)
    mask = (torch.rand(2, 3, 40) < 0.5).to(device)
    assert torch.equal(tokred.straight_through(soft, mask), mask.to(dtype))
    kept_idx = torch.tensor([[0, 39, -1, 40, 7]], device=device).expand(2, 3, 5).contiguous()
    for lists in (kept_idx, kept_idx.int()):
        out = tokred.straight_through(soft, lists)
        assert out.dtype == dtype and (out == torch.tensor([1, 1, 0, 0, 1], device=device)).all()
    assert (tokred.straight_through(soft[:, 0], kept_idx[:, 0].contiguous())[:, 0] == 1).all()


def test_the_scorer_is_trained(device):
    """EchoingPixels: kept tokens times the factor. The gradient of the score is that of the soft weights, float64's."""
    x, score = torch.randn(2, 9, 4, device=device), torch.randn(2, 9, device=device, requires_grad=True)
    kept_idx = tokred.select_topk(score, 3)
    weight = torch.randn(2, 3, 4, device=device)
    x_kept = tokred.gather_tokens([x], kept_idx)[0]
    out = x_kept * tokred.straight_through((score / 0.7).softmax(-1), kept_idx)[..., None]
    assert_close(out, x_kept, rtol=0, atol=0)
    (out * weight).sum().backward()
    soft = score.detach().double().requires_grad_()
    kept = (soft / 0.7).softmax(-1).gather(1, kept_idx)
    (kept[..., None] * x_kept.double() * weight.double()).sum().backward()
    assert_close(score.grad, soft.grad, rtol=1e-5, atol=1e-6)


def test_a_mask_trains_what_was_not_chosen(device):
    """DUET-VLM: a hard mask in the forward pass, the soft one in the backward."""
    score = torch.randn(2, 9, device=device, requires_grad=True)
    mask = tokred.list_to_mask(tokred.select_topk(score, 3), 9)
    weight = torch.randn(2, 9, device=device)
    (tokred.straight_through(score.sigmoid(), mask) * weight).sum().backward()
    soft = score.detach().sigmoid()
    assert_close(score.grad, weight * soft * (1 - soft))


def test_compiles(device):
    soft, kept_idx = torch.rand(2, 9, device=device), torch.tensor([[1, 4], [0, -1]], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.straight_through, fullgraph=True, backend="aot_eager")
    for hard in (kept_idx, soft > 0.5):
        assert_close(compiled(soft, hard), tokred.straight_through(soft, hard), rtol=0, atol=0)


def test_errors():
    with pytest.raises(
        RuntimeError, match=r"straight_through: expected a mask of the shape of soft, \[2, 5\], got \[2, 4\]"
    ):
        tokred.straight_through(torch.rand(2, 5), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"straight_through: expected lists .* of soft, \[2\], got \[3, 4\]"):
        tokred.straight_through(torch.rand(2, 5), torch.ones(3, 4).long())
