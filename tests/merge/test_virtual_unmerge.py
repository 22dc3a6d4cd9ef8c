# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.testing import assert_close


def rotate(x, position):
    """RoPE of halves."""
    half = x.shape[-1] // 2
    angle = position.to(x.dtype)[:, None] * 10.0 ** -torch.arange(half, device=x.device).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def attend(q, k, v):
    position = torch.arange(q.shape[2], device=q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(rotate(q, position), rotate(k, position), v, is_causal=True)


def formula(q, k, v, dst_idx):
    """DyMU in float64: copies in their places, the mean over the copies of each token."""
    out = []
    for b in range(q.shape[0]):
        full = attend(*(t[b : b + 1].double()[:, :, dst_idx[b]] for t in (q, k, v)))[0]
        rows = [
            full[:, dst_idx[b] == j].mean(1) if (dst_idx[b] == j).any() else full[:, 0] * 0 for j in range(q.shape[2])
        ]
        out.append(torch.stack(rows, 1))
    return torch.stack(out)


def inputs(device):
    q = torch.randn(2, 5, 4, 16, device=device).transpose(1, 2)  # by strides
    k, v = torch.randn(2, 2, 5, 16, device=device), torch.randn(2, 2, 5, 8, device=device)
    return q, k, v, torch.tensor([[0, 1, 1, 2, 1, 3, 4], [3, 2, 2, 0, 0, 0, 4]], device=device)


def test_equals_the_formula(device):
    q, k, v, dst_idx = inputs(device)
    out = tokred.virtual_unmerge(q, k, v, dst_idx, attend)
    assert_close(out, formula(q, k, v, dst_idx), rtol=1e-4, atol=1e-5)
    assert out[1, :, 1].abs().sum() == 0  # nothing merged into it


def test_without_a_merge_it_is_the_attention(device):
    q, k, v, _ = inputs(device)
    own = torch.arange(5, device=device).expand(2, -1).contiguous()
    assert torch.equal(tokred.virtual_unmerge(q, k, v, own, attend), attend(q, k, v))


def test_gradients(device):
    *qkv, dst_idx = inputs(device)
    leaves = [t.detach().requires_grad_() for t in qkv]
    seed = torch.randn(2, 4, 5, 8, device=device)
    (tokred.virtual_unmerge(*leaves, dst_idx, attend) * seed).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in qkv]
    (formula(*wide, dst_idx) * seed.double()).sum().backward()
    for a, e in zip(leaves, wide):
        assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-5)


def test_compiled(device):
    *qkv, dst_idx = inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.virtual_unmerge, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*qkv, dst_idx, attend), tokred.virtual_unmerge(*qkv, dst_idx, attend))


def test_errors(device):
    q, k, v, dst_idx = inputs(device)
    with pytest.raises(
        RuntimeError, match=r"virtual_unmerge: expected k of shape .* num_merged 5, got \[2, 2, 4, 16\]"
    ):
        tokred.virtual_unmerge(q, k[:, :, :4], v, dst_idx, attend)
