# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The rows of docs/scores.md: each expression against its formula (on the whole attention matrix), in float64."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.testing import assert_close

PAGE = Path(__file__).parents[2] / "docs" / "scores.md"
ROWS = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| `(.*)` \|$", PAGE.read_text(), re.M))


class Inputs:
    """What the page calls by name."""

    def __init__(self, device):
        self.num_q_heads, self.group, tokens, kept = 4, 2, 96, 40
        randn = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
        self.q, self.k = 2 * randn(2, 4, tokens, 16), randn(2, 2, tokens, 16)
        self.q2, self.k2 = randn(2, 4, kept, 16), randn(2, 2, kept, 16)
        self.full, self.width = randn(2, 4, tokens, 16), 64
        self.first, self.last = 10, 74
        self.rater = (randn(2, tokens) > 0).float()
        self.heads = torch.tensor([0, 3], device=device)
        self.order = torch.randperm(tokens).to(device)
        self.layers = [(self.q, self.k), (randn(2, 4, tokens, 16), randn(2, 2, tokens, 16))]
        self.kept_idx = randn(2, tokens).argsort(1)[:, :kept].sort(1).values
        self.size = torch.randint(1, 5, (2, tokens)).float().to(device)
        self.video, self.x = randn(2, 4, 9, 16), randn(2, tokens, 16)
        self.before, self.after = randn(2, tokens, 16), randn(2, tokens, 16)
        self.keep = torch.arange(tokens, device=device) < torch.tensor([[60], [96]], device=device)


def matrix(q, k, causal=False, bias=0.0):
    """The attention of all queries, [batch_size, num_q_heads, q_len, kv_len] float64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1)


def cosine(x, y):
    return F.cosine_similarity(x.double(), y.double(), dim=-1)


def merged_heads(x):
    q, k = (t.double().transpose(1, 2).flatten(2) for t in (x.q[:, :, :1], x.full))
    return (q @ k.mT / 8).softmax(-1)[:, 0]  # 4 heads of 16: sqrt(64)


def pruned_layers(x):
    total = matrix(x.q, x.k).sum(2).mean(1)
    for b in range(2):
        total[b, x.kept_idx[b]] += matrix(x.q2, x.k2).sum(2).mean(1)[b]
    return total


def verticals_and_slashes(x):
    p = matrix(x.q, x.k, causal=True)[:, :, -64:]  # the first of these queries is at position 32
    slashes = torch.stack([p.diagonal(32 - distance, 2, 3).sum(-1) for distance in range(96)], -1)
    return torch.stack([p.sum(2), slashes])


FORMULAS = {
    "CLS row": lambda x: matrix(x.q, x.k)[:, :, 0].mean(1)[:, 1:],
    "last row": lambda x: matrix(x.q, x.k)[:, :, -1].mean(1)[:, 10:74],
    "range of rows": lambda x: matrix(x.q, x.k, causal=True)[:, :, 74:].sum(2).mean(1)[:, 10:74],
    "range inside": lambda x: matrix(x.q, x.k, causal=True)[:, :, 10:74].sum(2),
    "list of rows": lambda x: torch.einsum(
        "bhij,bi->bhj", matrix(x.q, x.k, causal=True)[:, :, 74:], x.rater[:, 74:].double()
    ),
    "mean over rows": lambda x: matrix(x.q, x.k).mean(2),
    "span softmax": lambda x: matrix(x.q[:, :, -1:], x.k[:, :, 10:74])[:, :, 0],
    "part of the full softmax": lambda x: matrix(x.q, x.k)[:, :, -1, 10:74],
    "some heads": lambda x: matrix(x.q, x.k)[:, [0, 3]].sum(2),
    "greatest over heads": lambda x: matrix(x.q, x.k).sum(2).amax(1),
    "sum and maximum": lambda x: (matrix(x.q, x.k).sum(2) + matrix(x.q, x.k).amax(2)).mean(1),
    "verticals and slashes": verticals_and_slashes,
    "heads merged into one": merged_heads,
    "per KV head": lambda x: matrix(x.q, x.k, causal=True)[:, :, -64:].sum(2).view(2, 2, 2, -1).mean(2),
    "pooled over neighbours": lambda x: F.max_pool1d(matrix(x.q, x.k, causal=True)[:, :, -64:].sum(2), 7, 1, 3),
    "groups of 2 x 2 patches": lambda x: matrix(x.q, x.k).sum(2).mean(1).view(2, -1, 4).mean(2),
    "the same, in window order": lambda x: matrix(x.q, x.k).sum(2).mean(1).view(2, -1, 4).mean(2),
    "sum over layers": lambda x: sum(matrix(q, k)[:, :, 0].mean(1) for q, k in x.layers),
    "sum over layers that prune": pruned_layers,
    "merged tokens": lambda x: matrix(x.q, x.k, bias=x.size.double().log()[:, None, None]).sum(2),
    "padded keys": lambda x: torch.stack(
        [F.pad(matrix(x.q[b : b + 1], x.k[b : b + 1, :, :n]).sum(2)[0], (0, 96 - n)) for b, n in enumerate((60, 96))]
    ),
    "frame and the one before": lambda x: 1 - cosine(x.video[:, 1:], x.video[:, :-1]),
    "magnitude and direction": lambda x: (
        x.after.double().norm(dim=-1) / x.before.double().norm(dim=-1) * (1 - cosine(x.after, x.before)).softmax(-1)
    ),
    "unlike the mean": lambda x: -cosine(x.x, x.x.mean(1, keepdim=True)),
    "unlike the mean key": lambda x: -cosine(x.k, F.normalize(x.k.double(), dim=-1).mean(2, keepdim=True)),
    "norm of a key": lambda x: -x.k.double().norm(dim=-1),
}


def test_every_row_has_its_formula():
    assert ROWS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("mode", FORMULAS)
def test_mode(device, mode):
    inputs = Inputs(device)
    names = {
        "tokred": tokred,
        "torch": torch,
        "received": lambda *args, **options: tokred.attn_received(*args, **options)[0],
    }
    with torch.device(device):
        actual = eval(ROWS[mode], names | vars(inputs))
    assert_close(actual, FORMULAS[mode](inputs), rtol=2e-5, atol=2e-6, name=mode)
