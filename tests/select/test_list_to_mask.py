# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import torch

import tokred
from tokred.testing import assert_close


def test_equals_the_formula(device):
    for shape, n in (((3, 9), 20), ((2, 3, 9), 20), ((9,), 5), ((2, 0), 4), ((2, 3), 0), ((0, 3), 4)):
        kept_idx = torch.randint(-3, n + 3, shape).to(device)
        for index in (kept_idx, kept_idx.int()):
            mask = tokred.list_to_mask(index, n)
            assert mask.shape == (*shape[:-1], n) and mask.is_contiguous()
            rows, lists = (t[None] if t.dim() == 1 else t.flatten(0, -2) for t in (mask, kept_idx))
            for row, ids in zip(rows, lists):
                assert row.nonzero()[:, 0].tolist() == sorted({i for i in ids.tolist() if 0 <= i < n})


def test_goes_around_through_a_pack(device):
    kept_idx = tokred.select_topk(torch.randn(3, 40, device=device), 7)
    rows = tokred.pack_tokens([], tokred.list_to_mask(kept_idx, 40), max_total=21)[1]
    assert_close(rows.reshape(3, 7) - torch.arange(3, device=device)[:, None] * 40, kept_idx)


def test_compiles_and_maps(device):
    kept_idx = torch.randint(-1, 9, (3, 2, 4)).to(device)
    expected = tokred.list_to_mask(kept_idx, 9)
    assert_close(torch.vmap(lambda ids: tokred.list_to_mask(ids, 9))(kept_idx), expected)
    torch._dynamo.reset()
    assert_close(torch.compile(tokred.list_to_mask, fullgraph=True, backend="aot_eager")(kept_idx, 9), expected)
