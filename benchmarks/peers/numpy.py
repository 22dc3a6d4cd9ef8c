# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""NumPy: argpartition with AVX-512 where the CPU has it, take. It has no bfloat16; rows are moved as 16-bit integers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokred.testing.peers import NotApplicable, Peer

VERSION = np.__version__
DEVICES = ("cpu",)


def array(x: Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def prepare_prune(x: Tensor, score: Tensor, k: int) -> tuple:
    if score.dtype == torch.bfloat16:
        raise NotApplicable("NumPy has no bfloat16 scores")
    return array(x), score.numpy(), k, x.dtype


def prune_topk(x, score, k, dtype):
    kept_idx = select_topk(score, k)
    if x.shape[0] == 1:
        return x[0].take(kept_idx[0], axis=0)[None], kept_idx, dtype
    return np.stack([rows.take(idx, axis=0) for rows, idx in zip(x, kept_idx)]), kept_idx, dtype


def finish_prune(out):
    x_kept, kept_idx, dtype = out
    return torch.from_numpy(x_kept).view(dtype), torch.from_numpy(kept_idx)


def prepare_select(score: Tensor, k: int) -> tuple:
    return score.numpy(), k


def select_topk(score, k):
    return np.sort(np.argpartition(score, -k, axis=1)[:, -k:], axis=1)


def prepare_gather(tensors: list[Tensor], kept_idx: Tensor) -> tuple:
    return [array(x) for x in tensors], kept_idx.numpy(), [x.dtype for x in tensors]


def gather_tokens(tensors, kept_idx, dtypes):
    """Lists of one row each: np.take along the tokens, head by head where there are heads."""
    out = []
    for x in tensors:
        rows = x.reshape(-1, *x.shape[kept_idx.ndim - 1 :])  # heads fold into the batch
        lists = kept_idx.reshape(-1, kept_idx.shape[-1])
        kept = np.stack([r.take(i, axis=0) for r, i in zip(rows, lists)])
        out.append(kept.reshape(*kept_idx.shape, *x.shape[kept_idx.ndim :]))
    return out, dtypes


def finish_gather(out):
    return [torch.from_numpy(x).view(dtype) for x, dtype in zip(*out)]


OPS = {
    "prune_topk": Peer(prune_topk, prepare_prune, finish_prune),
    "select_topk": Peer(select_topk, prepare_select, torch.from_numpy),
    "gather_tokens": Peer(gather_tokens, prepare_gather, finish_gather),
}
