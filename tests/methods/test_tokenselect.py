# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import torch
import torch.nn.functional as F

import tokred
from tokred.methods.tokenselect import tokenselect
from tokred.testing import assert_close


def formula(q, k, num_sinks, num_recent):
    """f = mean of the chunk; u[j] = sum_h softmax_j(f_h . k_j) over the candidates; float64, one sequence."""
    k = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    z = torch.einsum("hd,hjd->hj", q.double().mean(1), k)
    n = z.shape[1]
    u = torch.zeros(n, dtype=torch.float64)
    if n > num_sinks + num_recent:
        u[num_sinks : n - num_recent] = z[:, num_sinks : n - num_recent].softmax(-1).sum(0)
    return u


def test_ragged_sequences_equal_the_formula(device, dtype):
    """Keys repeat, so that votes tie: the float64 formula ties in the same places, and the lower position wins."""
    lens = [150, 40, 97, 9, 0]
    q = torch.randn(5, 4, 3, 32).to(dtype)
    q = q[:, :, :1].expand(-1, -1, 3, -1) if dtype != torch.float32 else q  # a mean that is not rounded
    k = (0.2 * torch.randn(5, 2, 50, 32)).to(dtype).repeat(1, 1, 3, 1)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    kept_idx, votes = tokenselect(q.to(device), k.to(device), keep=30, num_sinks=4, num_recent=16, kv_lens=kv_lens)
    assert kept_idx.shape == (5, 1, 50)
    for b, n in enumerate(lens):
        u = formula(q[b], k[b, :, :n], 4, 16)
        assert_close(votes[b, :n].cpu(), u, rtol=1e-4, atol=1e-6)
        forced = list(range(min(4, n))) + list(range(max(n - 16, min(4, n)), n))
        middle = votes[b, :n].cpu()[4 : max(n - 16, 4)]
        picked = 4 + (-middle).sort(stable=True).indices[:30]
        expected = sorted(forced + picked.tolist())
        assert kept_idx[b, 0].tolist() == expected + [-1] * (50 - len(expected))
        ours, theirs = u[picked].sort().values, u[4 : max(n - 16, 4)].sort().values[-30:]
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # no better token was left out
    middle = votes[0, 4:134]
    assert middle.unique().numel() < 130, "no ties were planted"


def test_the_list_serves_attention(device):
    """A sequence that is listed whole gives full attention; pages give what dense keys give."""
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    q, k, v = q.to(device), k.to(device), v.to(device)
    every, _ = tokenselect(q, k)
    full = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_close(tokred.attend_selected(q, k, v, every), full, atol=5e-6)
    some, votes = tokenselect(q, k, keep=9, num_sinks=2, num_recent=5)
    table = torch.tensor([[3, 1, 0, 2]], dtype=torch.int32, device=device)
    pages = k[0].view(2, 4, 16, 16).permute(1, 2, 0, 3)[table[0].argsort().long()].contiguous()
    paged = tokenselect(q, pages, keep=9, num_sinks=2, num_recent=5, page_table=table)
    assert_close(paged, (some, votes), rtol=0, atol=0)
