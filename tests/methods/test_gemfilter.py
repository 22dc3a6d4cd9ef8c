# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

from tokred.methods.gemfilter import gemfilter
from tokred.testing import assert_close


def formula(q, k, keep, pool=5):
    """z = q_last . k without a scale; u = sum over heads, averaged over 5 neighbours; float64, one prompt."""
    k = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    u = torch.einsum("hd,hjd->hj", q[:, 0].double(), k).sum(0)
    u = F.avg_pool1d(u[None], pool, 1, pool // 2)[0]
    return u, (-u).sort(stable=True).indices[:keep].sort().values


def whole(*shape):
    """Small whole numbers: all sums are exact, and many are equal."""
    return torch.randint(-2, 3, shape).float()


def test_ragged_prompts_with_ties_equal_the_formula(device, dtype):
    lens = [200, 3, 77, 21]
    q, k, ids = whole(4, 8, 1, 16), whole(4, 2, 200, 16), torch.randint(0, 999, (4, 200))
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    out = gemfilter(ids.to(device), q.to(device, dtype), k.to(device, dtype), keep=20, kv_lens=kv_lens)
    assert out.num_kept.tolist() == [20, 3, 20, 20]
    for b, n in enumerate(lens):
        u, idx = formula(q[b], k[b, :, :n], 20)
        assert u.unique().numel() < n or n == 3, "no ties were planted"
        assert_close(out.score[b, :n].cpu(), u)
        assert out.kept_idx[b].tolist() == idx.tolist() + [-1] * (20 - len(idx))
        assert torch.equal(out.x[b, : len(idx)].cpu(), ids[b, idx])


def test_pages_and_embeddings(device):
    q, k, x = whole(1, 4, 1, 8), whole(1, 2, 60, 8), torch.randn(1, 60, 5)
    pages = F.pad(k, (0, 0, 0, 4)).view(2, 4, 16, 8).permute(1, 2, 0, 3).contiguous()
    table, kv_lens = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32), torch.tensor([60], dtype=torch.int32)
    shuffled = pages[table[0].argsort().long()].to(device)
    q, k, x = q.to(device), k.to(device), x.to(device)
    paged = gemfilter(x, q, shuffled, keep=7, page_table=table.to(device), kv_lens=kv_lens.to(device))
    dense = gemfilter(x, q, k, keep=7)
    assert_close((paged.x, paged.kept_idx, paged.score), (dense.x, dense.kept_idx, dense.score), rtol=0, atol=0)


def test_takes_one_query():
    with pytest.raises(
        ValueError, match=r"expected q of shape \[batch_size, num_q_heads, 1, head_dim\], got \[1, 2, 5, 8\]"
    ):
        gemfilter(torch.zeros(1, 5), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
