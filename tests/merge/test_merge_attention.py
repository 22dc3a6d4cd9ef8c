# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def one_hot(dst_idx, num_out):
    return (dst_idx[:, None, None] == torch.arange(num_out, device=dst_idx.device)[:, None]).double()  # [B, 1, M, N]


def test_equals_the_matrix_form(device, dtype):
    """MCTF: rows by the tokens' weights, columns added up; a map that drops tokens, too."""
    attn = torch.randn(2, 3, 14, 14).softmax(-1).to(device, dtype)
    dst_idx = torch.randint(-1, 6, (2, 14), device=device)
    weight = torch.rand(2, 14, device=device) + 0.1
    member = one_hot(dst_idx, 5)
    for given in (None, weight):
        w = member * (1 if given is None else given[:, None, None].double())
        rows = w / w.sum(-1, keepdim=True).clamp(min=1e-300)
        merged = tokred.merge_attention(attn, dst_idx, 5, weight=given)
        assert merged.dtype == dtype and merged.is_contiguous()
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert_close(merged, rows @ attn.double() @ member.mT, rtol=tolerance, atol=tolerance)
    kept = tokred.merge_attention(attn, dst_idx.clamp(0, 4), 5)
    members = one_hot(dst_idx.clamp(0, 4), 5).sum(-1)
    assert_close(
        kept.sum(-1), (members > 0).expand(-1, 3, -1).double(), rtol=5e-2 if dtype != torch.float32 else 1e-5, atol=0
    )


def test_masks_merge_by_their_maxima(device):
    mask = (torch.rand(1, 1, 9, 9, device=device) < 0.2).float()
    dst_idx = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 3, -1]], device=device)
    merged = tokred.merge_attention(mask, dst_idx, 4, row_mode="max", col_mode="max")
    member = one_hot(dst_idx, 4)
    assert torch.equal(merged.double(), ((member @ mask.double() @ member.mT) > 0).double())


def test_chained_merges_compose(device):
    attn = torch.randn(1, 2, 12, 12, device=device).softmax(-1)
    first, second = torch.randint(0, 7, (1, 12), device=device), torch.randint(0, 3, (1, 7), device=device)
    twice = tokred.merge_attention(tokred.merge_attention(attn, first, 7, row_mode="sum"), second, 3, row_mode="sum")
    once = tokred.merge_attention(attn, second.gather(1, first), 3, row_mode="sum")
    assert_close(twice, once, rtol=1e-5, atol=1e-6)


def test_gradients(device):
    attn = torch.rand(1, 2, 8, 8, device=device, requires_grad=True)
    weight = (torch.rand(1, 8, device=device) + 0.1).requires_grad_()
    dst_idx = torch.tensor([[0, 1, 2, 0, -1, 2, 0, 1]], device=device)
    seed = torch.randn(1, 2, 3, 3, device=device)
    (tokred.merge_attention(attn, dst_idx, 3, weight=weight) * seed).sum().backward()
    a, w = attn.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    rows = one_hot(dst_idx, 3) * w[:, None, None]
    ((rows / rows.sum(-1, keepdim=True) @ a @ one_hot(dst_idx, 3).mT) * seed.double()).sum().backward()
    assert_close(attn.grad, a.grad, rtol=1e-4, atol=1e-6)
    assert_close(weight.grad, w.grad, rtol=1e-4, atol=1e-5)


def test_compiled(device):
    attn, dst_idx = torch.rand(2, 2, 6, 6, device=device), torch.randint(0, 3, (2, 6), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.merge_attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(attn, dst_idx, 3), tokred.merge_attention(attn, dst_idx, 3), rtol=0, atol=0)


def test_errors():
    with pytest.raises(
        RuntimeError, match=r"merge_attention: expected attn of shape \[batch_size, .* got \[2, 3, 4, 5\]"
    ):
        tokred.merge_attention(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4).long(), 2)
