# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""tomesd: its matching on a grid of one row and cells of two tokens is ToMe's, with sources and destinations swapped."""

from importlib.metadata import version

import torch
from tomesd.merge import bipartite_soft_matching_random2d
from torch import Tensor

from tokred.testing.peers import NotApplicable, Peer

VERSION = version("tomesd")
DEVICES = ("cpu", "cuda")


def prepare(metric: Tensor, r: int) -> tuple:
    """Reverse the tokens: tomesd takes the first token of a cell as the destination, ToMe the second."""
    if metric.shape[1] % 2:
        raise NotApplicable("takes an odd last token as a source, tokred's layout does not")
    return metric.flip(1).contiguous(), r


def bipartite_match(metric: Tensor, r: int):
    _, num_tokens, _ = metric.shape
    return metric, r, bipartite_soft_matching_random2d(metric, num_tokens, 1, 2, 1, r, no_rand=True)


def finish(out) -> tuple[Tensor, None, None]:
    """Unmerging the numbers of the rows tells where each token went."""
    metric, r, (_, unmerge) = out
    batch_size, num_tokens, _ = metric.shape
    rows = torch.arange(num_tokens - r, device=metric.device, dtype=torch.float64).view(1, -1, 1)
    return unmerge(rows.expand(batch_size, -1, -1))[..., 0].flip(1).long(), None, None


OPS = {"bipartite_match": Peer(bipartite_match, prepare, finish)}
