# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.testing import assert_close


def formula(q, k, v, size, scale):
    """Softmax with log sizes in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v, s = (
        t.double().repeat_interleave(groups, 1)
        for t in (k, v, size if size.dim() == 3 else size[:, None].expand(-1, k.shape[1], -1))
    )
    logits = scale * q.double() @ k.mT + s.log()[:, :, None]
    return logits.softmax(-1) @ v


def ours(q, k, v, size, **options):
    q8, k8, v8, scale = tokred.log_size_dims(q, k, v, size, **options)
    assert all(t.shape[-1] % 8 == 0 for t in (q8, k8, v8))
    return F.scaled_dot_product_attention(q8, k8, v8, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[
        ..., : v.shape[-1]
    ]


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
def test_equals_the_formula(device, dtype, head_dim):
    """Sizes that bfloat16 does not hold: three parts of a logarithm hold it to float32 accuracy."""
    q, k, v = (
        torch.randn(2, h, n, d).to(device, dtype) for h, n, d in ((4, 9, head_dim), (2, 30, head_dim), (2, 30, 24))
    )
    size = torch.randint(1, 3000, (2, 30), device=device).float()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert_close(ours(q, k, v, size), formula(q, k, v, size, head_dim**-0.5), rtol=tolerance, atol=tolerance)
    per_head = torch.rand(2, 2, 30, device=device) * 9 + 1
    assert_close(ours(q, k, v, per_head, scale=0.3), formula(q, k, v, per_head, 0.3), rtol=tolerance, atol=tolerance)


def test_logits_carry_the_size_exactly(device, dtype):
    """What the dimensions add, in float64, is log(size) to float32 accuracy whatever the dtype."""
    q, k = torch.zeros(1, 1, 1, 64, dtype=dtype, device=device), torch.zeros(1, 1, 50, 64, dtype=dtype, device=device)
    size = torch.rand(1, 50, device=device) * 6000 + 0.01
    q8, k8, _, scale = tokred.log_size_dims(q, k, k, size)
    assert_close((scale * q8.double() @ k8.double().mT)[0, 0, 0], size[0].double().log(), rtol=1e-6, atol=1e-6)


def test_equals_attention_over_copies(device):
    """I5: a key of size n weighs as n copies of it."""
    q, k, v = torch.randn(3, 1, 2, 12, 16, device=device).unbind(0)
    count = torch.randint(1, 5, (12,), device=device)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(count, 2), v.repeat_interleave(count, 2))
    assert_close(ours(q, k, v, count[None].float()), expected, rtol=1e-4, atol=1e-5)


def test_size_zero_hides_a_key(device, dtype):
    q, k, v = torch.randn(3, 1, 2, 12, 16).to(device, dtype).unbind(0)
    size = torch.ones(1, 12, device=device)
    size[0, [1, 7]] = 0
    k[:, :, 1], v[:, :, [1, 7]] = 30, 1000
    shown = [i for i in range(12) if i not in (1, 7)]
    expected = F.scaled_dot_product_attention(q.double(), k.double()[:, :, shown], v.double()[:, :, shown])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(ours(q, k, v, size), expected, rtol=tolerance, atol=tolerance)
    assert_close(ours(q, k, v, size, scale=0.002).abs().max(), torch.tensor(4.0), rtol=1, atol=0)  # none of the 1000


def test_gradients(device):
    leaves = [torch.randn(1, 2, 9, 8, device=device, requires_grad=True) for _ in range(3)]
    size = (torch.rand(1, 9, device=device) * 5 + 1).requires_grad_()
    seed = torch.randn(1, 2, 9, 8, device=device)
    (ours(*leaves, size) * seed).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (*leaves, size)]
    (formula(*wide, 8**-0.5) * seed.double()).sum().backward()
    for a, e in zip((*leaves, size), wide):
        assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-5)
    hidden = torch.tensor([[0.0] * 4 + [1.0] * 5], device=device, requires_grad=True)
    for t in leaves:
        t.grad = None
    ours(*leaves, hidden).sum().backward()
    assert all(t.grad.isfinite().all() for t in (*leaves, hidden))


def test_lse_feeds_received_attention(device):
    """attn_received of the extended q and k is the attention that the merged keys receive."""
    q, k = torch.randn(1, 2, 20, 24, device=device), torch.randn(1, 2, 15, 24, device=device)
    size = torch.randint(1, 6, (1, 15), device=device).float()
    q8, k8, _, scale = tokred.log_size_dims(q, k, k, size)
    received = tokred.attn_received(q8, k8, scale=scale)
    weights = (24**-0.5 * q.double() @ k.double().mT + size.double().log()[:, None, None]).softmax(-1)
    assert_close(received[0] if isinstance(received, tuple) else received, weights.sum(2), rtol=1e-4, atol=1e-5)


def test_compiled(device):
    q, k, v = torch.randn(3, 1, 2, 5, 8, device=device).unbind(0)
    size = torch.ones(1, 5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: tokred.log_size_dims(*a)[:3], fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v, size), tokred.log_size_dims(q, k, v, size)[:3], rtol=0, atol=0)


def test_errors():
    q = torch.zeros(2, 3, 4, 8)
    with pytest.raises(RuntimeError, match=r"log_size_dims: expected size of shape .* kv_len 4, got \[2, 5\]"):
        tokred.log_size_dims(q, q, q, torch.ones(2, 5))
