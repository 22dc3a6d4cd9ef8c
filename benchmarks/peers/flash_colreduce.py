# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""flash-colreduce: column sums of softmax(q k^T) by one Triton kernel with float32 atomics. Not run on a GPU yet."""

from importlib.metadata import version

from flash_colreduce import flash_colreduce
from torch import Tensor

from tokred.testing.peers import NotApplicable, Peer

VERSION = version("flash-colreduce")
DEVICES = ("cuda",)


def prepare(q: Tensor, k: Tensor) -> tuple:
    if q.shape[1] != k.shape[1]:
        raise NotApplicable("needs as many kv heads as query heads")
    return q, k


def attn_received(q: Tensor, k: Tensor) -> Tensor:
    return flash_colreduce(q, k, "sum")


OPS = {"attn_received": Peer(attn_received, prepare, lambda out: (out, None))}
