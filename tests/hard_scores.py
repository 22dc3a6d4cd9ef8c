# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Rows of scores that are hard to select from, for the tests of all ops that do."""

import torch
from torch import Tensor


def hard_scores(kind: str, num_rows: int, num_tokens: int) -> Tensor:
    """Return ``[num_rows, num_tokens]`` scores on the CPU."""
    score = torch.randn(num_rows, num_tokens)
    if kind == "constant":
        score[:] = -1.5
    elif kind == "few":
        score = score.round()
        score[score == 0] *= -1  # both zeros are there, and equal
        score[:, ::3] = 0.0
    elif kind == "bf16 softmax":
        score = (3 * score).softmax(-1).bfloat16()
    elif kind == "sorted":
        score = score.sort().values
    elif kind == "reversed":
        score = score.sort(descending=True).values
    elif kind == "nan":
        score[:, ::2] = float("nan")
        score[0] = float("nan")
    elif kind == "inf":
        score[:, ::5] = float("inf")
        score[:, 1::5] = -float("inf")
        score[:, 2::7] = float("nan")
    elif kind == "periodic":  # a strided sample of the row would see only the small ones
        score[:, :: num_tokens // 64 + 1] = -10
    elif kind == "one end":  # all candidates in one chunk of a long row
        score[:, -num_tokens // 3 :] += 100
    return score
