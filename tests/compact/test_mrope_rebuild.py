# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch

import tokred
from tokred.testing import assert_close


def formula(media_ids, media_idx, advance, valid):
    """One sequence, token by token: ids count up through text and jump by an item's advance behind it."""
    axes, free, base, before = media_ids.shape[0], 0, 0, -1
    ids, count = [], 0
    for i, item in enumerate(media_idx.tolist()):
        if not valid[i]:
            ids.append([0] * axes)
            before = -1
            continue
        count += 1
        if item < 0 or item >= len(advance):
            ids.append([free] * axes)
            free += 1
            before = -1
            continue
        if item != before:
            base, free, before = free, free + int(advance[item]), item
        ids.append([base + int(p) for p in media_ids[:, i]])
    return torch.tensor(ids).reshape(-1, axes).T, free - count


def sequence(*segments, axes=3):
    """Segments: a number of text tokens, or the places of an item's kept tokens."""
    ids, item, number = [], [], 0
    for segment in segments:
        if isinstance(segment, int):
            ids += [[0] * axes] * segment
            item += [-1] * segment
        else:
            ids += segment
            item += [number] * len(segment)
            number += 1
    return torch.tensor(ids, dtype=torch.int64).reshape(-1, axes).T, torch.tensor(item, dtype=torch.int64)


def grid(frames, rows, columns, keep):
    """Places of a random part of a grid, in order."""
    places = [[t, y, x] for t in range(frames) for y in range(rows) for x in range(columns)]
    return [p for p, kept in zip(places, (torch.rand(len(places)) < keep).tolist()) if kept]


def test_equals_the_formula(device):
    """Text, a pruned video, text, an image right behind another, text; right and left padding."""
    parts = [
        sequence(3, grid(2, 3, 4, 0.5), 2, grid(1, 2, 2, 1.0), grid(1, 3, 3, 0.7), 4),
        sequence(grid(1, 4, 4, 0.6), 9),
        sequence(5),
    ]
    length = max(len(item) for _, item in parts)
    media_ids, media_idx = torch.zeros(3, 3, length, dtype=torch.int64), torch.full((3, length), -1)
    mask = torch.zeros(3, length, dtype=torch.bool)
    for b, (ids, item) in enumerate(parts):
        at = slice(length - len(item), length) if b == 1 else slice(0, len(item))  # one is padded on the left
        media_ids[:, b, at], media_idx[b, at], mask[b, at] = ids, item, True
    advance = torch.tensor([[4, 2, 3], [4, 0, 0], [0, 0, 0]])
    ids, delta = tokred.mrope_rebuild(*(t.to(device) for t in (media_ids, media_idx, advance)), mask=mask.to(device))
    for b in range(3):
        expected, shift = formula(media_ids[:, b], media_idx[b], advance[b], mask[b])
        assert_close(ids[:, b].cpu(), expected)
        assert int(delta[b]) == shift


def test_nothing_pruned_is_the_rule_of_the_model(device):
    """Qwen2-VL: text counts on from the largest id of the whole grid."""
    places = [[t, y, x] for t in range(2) for y in range(3) for x in range(4)]
    media_ids, media_idx = (t.to(device)[..., None, :] for t in sequence(2, places, 3))
    ids, delta = tokred.mrope_rebuild(media_ids, media_idx, torch.tensor([[4]], device=device))
    assert ids[:, 0, :2].tolist() == [[0, 1]] * 3
    assert ids[:, 0, 2:26].T.tolist() == [[2 + p for p in place] for place in places]
    assert ids[:, 0, 26:].tolist() == [[6, 7, 8]] * 3  # 5 = 2 + 3 is the largest id before
    assert delta.tolist() == [9 - 29]


def test_evs(device):
    """Pruned by a selection with a forced first frame; the ids of what is kept are those of the whole, text moves up."""
    places = torch.tensor([[t, y, x] for t in range(4) for y in range(2) for x in range(3)], device=device)
    score = torch.rand(1, 24, device=device)
    kept_idx = tokred.select_topk(score, 10, keep_first=6)
    media_ids = torch.zeros(3, 1, 15, dtype=torch.int64, device=device)
    media_ids[:, 0, 3:13] = places[kept_idx[0]].T
    media_idx = torch.full((1, 15), -1, device=device)
    media_idx[:, 3:13] = 0
    ids, delta = tokred.mrope_rebuild(media_ids, media_idx, torch.tensor([[3]], device=device))
    assert_close(ids[:, 0, 3:13], 3 + places[kept_idx[0]].T)
    assert ids[:, 0, 13:].tolist() == [[6, 7]] * 3 and delta.tolist() == [8 - 15]


def test_compiles_and_takes_empty_sequences(device):
    media_ids, media_idx = (t.to(device)[..., None, :] for t in sequence(2, grid(1, 2, 2, 1.0), 3))
    advance = torch.tensor([[2]], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.mrope_rebuild, fullgraph=True, backend="aot_eager")
    assert_close(compiled(media_ids, media_idx, advance), tokred.mrope_rebuild(media_ids, media_idx, advance))
    ids, delta = tokred.mrope_rebuild(media_ids[..., :0], media_idx[:, :0], advance)
    assert ids.shape == (3, 1, 0) and delta.tolist() == [0]


def test_errors():
    with pytest.raises(
        RuntimeError, match=r"mrope_rebuild: expected media_ids .* got \[3, 1, 5\], \[1, 4\] and \[1, 2\]"
    ):
        tokred.mrope_rebuild(torch.zeros(3, 1, 5).long(), torch.zeros(1, 4).long(), torch.zeros(1, 2).long())
