# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

from tokred.methods.evs import evs
from tokred.testing import assert_close


def formula(x, ratio, score=None):
    """One video: 255 for the first frame, else 1 - cos to the frame before, float64; a stable falling order is cut."""
    frames, patches = x.shape[:2]
    exact = 1 - F.cosine_similarity(x[1:].double(), x[:-1].double(), dim=-1)
    first = torch.full((1, patches), 255.0, dtype=torch.float64)
    d = torch.cat([first, exact if score is None else score.view(frames, patches)[1:].double()]).flatten()
    keep = max(patches, int(frames * patches * (1 - ratio)))
    return exact, sorted(d.sort(descending=True, stable=True).indices[:keep].tolist())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_equals_the_formula(device, dtype, ratio):
    x = torch.randn(2, 6, 20, 16).to(device, dtype)
    x[:, 3] = x[:, 2]  # a frame that stands still: all of it ties
    out = evs(x, ratio=ratio)
    for b in range(2):
        exact, kept = formula(x[b].cpu(), ratio, out.score[b].cpu())
        assert_close(out.score[b].view(6, 20)[1:].cpu(), exact, rtol=1e-5, atol=1e-6)
        assert out.kept_idx[b].tolist() == kept
        assert_close(out.x[b], x[b].flatten(0, 1)[kept], rtol=0, atol=0)
        if ratio == 0.75 and dtype == torch.float32:  # the cut is not among equal scores
            assert kept == formula(x[b].cpu(), ratio)[1]


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_ragged_videos(device, ratio):
    lens = [6, 1, 3, 11]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    x = torch.randn(sum(lens), 10, 8, device=device).round()  # ties
    for max_seqlen in (11, None):
        out = evs(x, ratio=ratio, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
            part = slice(start, start + length)
            _, kept = formula(x[part].cpu(), ratio, out.score.view(-1, 10)[part].cpu())
            assert out.num_kept[b] == len(kept)
            assert out.kept_idx[b, : len(kept)].tolist() == kept and (out.kept_idx[b, len(kept) :] == -1).all()
            assert_close(out.x[b, : len(kept)], x[part].flatten(0, 1)[kept], rtol=0, atol=0)
            assert not out.x[b, len(kept) :].any()
            alone = evs(x[None, part], ratio=ratio)
            assert alone.kept_idx[0].tolist() == kept


def test_ratio_is_checked():
    with pytest.raises(ValueError, match=r"evs: expected ratio in \[0, 1\], got 1.5"):
        evs(torch.zeros(1, 2, 3, 4), ratio=1.5)
