# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def formula(mask, height, width, reach, shape, flat):
    """Token by token, in Python."""
    size, out = height * width, set()
    for token in mask.nonzero()[:, 0].tolist():
        first, i = token // size * size, token % size
        if flat:
            steps = [s * unit for unit in (1, width) for s in range(-reach, reach + 1)]
            out |= {first + min(max(i + step, 0), size - 1) for step in steps}
            continue
        y, x = divmod(i, width)
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                inside = 0 <= y + dy < height and 0 <= x + dx < width
                if inside and (shape == "square" or 0 in (dy, dx)):
                    out.add(first + (y + dy) * width + x + dx)
    return torch.tensor([token in out for token in range(len(mask))])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (4, 6), (24, 24)])
@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize(("shape", "flat"), [("cross", False), ("square", False), ("cross", True)])
def test_equals_the_formula(device, height, width, reach, shape, flat):
    mask = torch.rand(2, 3, 2 * height * width) < 0.08  # two frames a row
    out = tokred.grid_dilate(mask.to(device), height, width, reach=reach, shape=shape, flat=flat)
    for row, expected in zip(out.reshape(6, -1), mask.reshape(6, -1)):
        assert_close(row.cpu(), formula(expected, height, width, reach, shape, flat))


def test_hiprune(device):
    """Anchors, their neighbours, then registers that are neither: the union has exactly the budget."""
    score, deep = torch.rand(2, 576, device=device), torch.rand(2, 576, device=device)
    anchors = tokred.select_topk(score, 4)
    buffer = tokred.grid_dilate(tokred.list_to_mask(anchors, 576), 24, 24, flat=True)
    kept_idx = tokred.select_topk(deep, 192, keep_mask=buffer)
    for b in range(2):
        near = {min(max(i + step, 0), 575) for i in anchors[b].tolist() for step in (0, -1, 1, -24, 24)}
        rest = [i for i in deep[b].argsort(descending=True).tolist() if i not in near]
        assert kept_idx[b].tolist() == sorted(near | set(rest[: 192 - len(near)]))


def test_empty_and_compiled(device):
    assert tokred.grid_dilate(torch.zeros(0, 6, dtype=torch.bool, device=device), 2, 3).shape == (0, 6)
    mask = torch.rand(2, 12, device=device) < 0.2
    torch._dynamo.reset()
    compiled = torch.compile(tokred.grid_dilate, fullgraph=True, backend="aot_eager")
    for flat in (False, True):
        assert_close(compiled(mask, 3, 4, flat=flat), tokred.grid_dilate(mask, 3, 4, flat=flat))


def test_errors():
    mask = torch.zeros(2, 12, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"grid_dilate: expected a multiple of 5 x 3 tokens .* got"):
        tokred.grid_dilate(mask, 5, 3)
    with pytest.raises(
        RuntimeError, match="grid_dilate: expected shape 'cross' or, unless flat, 'square', got 'round'"
    ):
        tokred.grid_dilate(mask, 4, 3, shape="round")
    with pytest.raises(RuntimeError, match="got 'square'"):
        tokred.grid_dilate(mask, 4, 3, shape="square", flat=True)
    with pytest.raises(RuntimeError, match="grid_dilate: expected reach >= 0, got -1"):
        tokred.grid_dilate(mask, 4, 3, reach=-1)
