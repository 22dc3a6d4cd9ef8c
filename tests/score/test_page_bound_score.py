# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def inputs(device, dtype, q_heads=6, kv_len=100, q_len=1):
    q, k = torch.randn(2, q_heads, q_len, 40).to(device, dtype), torch.randn(2, 2, kv_len, 40).to(device, dtype)
    return q, k, *tokred.block_summary(k, 16, reduce="minmax")


def formula(q, low, high):
    """Quest: sum_c max(q_c min_c, q_c max_c), per query head; float64."""
    low, high = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1)[:, :, None] for x in (low, high))
    q = q.double()[:, :, :, None]
    return torch.maximum(q * low, q * high).sum(-1)


@pytest.mark.parametrize("q_len", [1, 5])
def test_equals_the_formula(device, dtype, q_len):
    q, _, low, high = inputs(device, dtype, q_len=q_len)
    bound = tokred.page_bound_score(q, low, high)
    assert_close(bound, formula(q, low, high), rtol=2e-5, atol=1e-4)
    summed = tokred.page_bound_score(q, low, high, sum_heads=True, scale=0.5)
    assert_close(summed, 0.5 * formula(q, low, high).sum(1), rtol=2e-5, atol=2e-4)


def test_no_logit_is_above_its_bound(device):
    q, k, low, high = inputs(device, torch.float32)
    logits = torch.nn.functional.pad(tokred.qk_score(q, k), (0, 12), value=-torch.inf)
    assert (logits.unflatten(3, (7, 16)).amax(4) <= tokred.page_bound_score(q, low, high) + 1e-4).all()
    one = tokred.block_summary(k, 1, reduce="minmax")  # a block of one key: the bound is its logit
    assert_close(tokred.page_bound_score(q, *one), tokred.qk_score(q, k), rtol=2e-5, atol=5e-5)


def test_blocks_that_do_not_exist(device):
    q, _, low, high = inputs(device, torch.float32)
    counts = torch.tensor([3, 0], dtype=torch.int32, device=device)
    bound = tokred.page_bound_score(q, low, high, num_blocks=counts)
    assert_close(bound[0, ..., :3], tokred.page_bound_score(q, low, high)[0, ..., :3], rtol=0, atol=0)
    assert (bound[0, ..., 3:] == -torch.inf).all()
    assert (bound[1] == -torch.inf).all()


def test_errors(device):
    q, _, low, high = inputs(device, torch.float32)
    with pytest.raises(ValueError, match=r"page_bound_score: expected scale of at least 0, got -1.0"):
        tokred.page_bound_score(q, low, high, scale=-1.0)
    with pytest.raises(ValueError, match=r"page_bound_score: expected low and high of one shape, got \[2, 2, 7, 40\]"):
        tokred.page_bound_score(q, low, high[:1])
