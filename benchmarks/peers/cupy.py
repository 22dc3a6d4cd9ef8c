# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""CuPy: argpartition (which its documentation calls a full sort) and take, on torch's stream. Not run on a GPU yet."""

import cupy
import torch
from torch import Tensor

from tokred.testing.peers import NotApplicable, Peer

cupy.cuda.runtime.getDeviceCount()  # raises where there is no driver
VERSION = cupy.__version__
DEVICES = ("cuda",)


def array(x: Tensor):
    """Without a copy; what DLPack or CuPy may not know, as integers of that size."""
    known = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}
    return cupy.from_dlpack(x.view(known.get(x.dtype, x.dtype)))


def on_torch_stream():
    return cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)


def prepare_prune(x: Tensor, score: Tensor, k: int) -> tuple:
    if x.shape[0] != 1:
        raise NotApplicable("one row only: a gather per row would be measured as launches")
    return array(x), array(score), k, x.dtype


def prune_topk(x, score, k, dtype):
    with on_torch_stream():
        kept_idx = cupy.sort(cupy.argpartition(score[0], -k)[-k:])
        return x[0].take(kept_idx, axis=0)[None], kept_idx[None], dtype


def finish_prune(out):
    x_kept, kept_idx, dtype = out
    return torch.from_dlpack(x_kept).view(dtype), torch.from_dlpack(kept_idx)


def prepare_select(score: Tensor, k: int) -> tuple:
    if score.shape[0] != 1:
        raise NotApplicable("one row only: it sorts each anew")
    return array(score), k


def select_topk(score, k):
    with on_torch_stream():
        return cupy.sort(cupy.argpartition(score[0], -k)[-k:])[None]


def prepare_gather(tensors: list[Tensor], kept_idx: Tensor) -> tuple:
    if kept_idx.dim() != 2 or kept_idx.shape[0] != 1:
        raise NotApplicable("one shared list only: a take per list would be measured as launches")
    return [array(x) for x in tensors], array(kept_idx), [x.dtype for x in tensors]


def gather_tokens(tensors, kept_idx, dtypes):
    with on_torch_stream():
        return [x[0].take(kept_idx[0], axis=0)[None] for x in tensors], dtypes


def finish_gather(out):
    return [torch.from_dlpack(x).view(dtype) for x, dtype in zip(*out)]


OPS = {
    "prune_topk": Peer(prune_topk, prepare_prune, finish_prune, captures=False),
    "select_topk": Peer(select_topk, prepare_select, torch.from_dlpack, captures=False),
    "gather_tokens": Peer(gather_tokens, prepare_gather, finish_gather, captures=False),
}
