# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.merge.static_windows")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    similarity = torch.empty(2, 31, 196, device="meta")
    counts = torch.empty(2, dtype=torch.int32, device="meta")
    by_hand = 4 * 2 * 31 * 196 + 2 * (32 * 196 + 32 * 8 + 8)
    assert floor(similarity, 0.8) == (by_hand, 0) and floor(similarity, 0.8, frame_counts=counts) == (by_hand + 8, 0)


def check(similarity, threshold=0.5, **options):
    actual = tokred.static_windows(similarity, threshold, **options)
    assert_close(actual, reference(similarity, threshold, **options), name="static_windows")
    return actual


def video(num_videos, num_pairs, num_positions, share=0.8):
    """Positions that stay for a while, and cuts at which many of them change."""
    rest = torch.rand(num_videos, num_pairs, 1) < 0.2
    return torch.where(rest, torch.rand(num_videos, num_pairs, num_positions), 1.0) * (
        torch.rand(num_videos, num_pairs, num_positions) < share
    )


# Around a warp and the 256 threads of a block, in frames and in positions.
@pytest.mark.parametrize(
    ("num_frames", "num_positions"),
    [(1, 7), (2, 1), (2, 300), (3, 31), (9, 32), (32, 33), (33, 256), (16, 257), (64, 196), (300, 5)],
)
@pytest.mark.parametrize("share", [0.0, 0.8, 0.97, 1.0])
def test_sizes(device, num_frames, num_positions, share):
    similarity = video(2, num_frames - 1, num_positions, share).to(device)
    check(similarity, max_window=24)
    if share == 1.0:
        similarity.fill_(1.0)
        whole = check(similarity)
        assert (whole[0] == 0).all() and whole[2].tolist() == [(num_frames - 1) * num_positions] * 2


@given(st.data())
def test_no_division_saves_more(data):
    """All divisions of a short video are tried; the one found is the best, and of those the latest windows are shortest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_frames = data.draw(st.integers(1, 6))
    num_positions = data.draw(st.integers(1, 3))
    bits = data.draw(st.lists(st.booleans(), min_size=30, max_size=30))
    max_window = data.draw(st.integers(1, 7))
    stays = torch.tensor(bits[: (num_frames - 1) * num_positions]).reshape(num_frames - 1, num_positions).bool()
    similarity = stays.float()[None].to(device)
    window_idx, is_static, num_saved = check(similarity, max_window=max_window)
    divisions = []
    for cuts in range(2 ** (num_frames - 1)):
        begins = [0, *(t for t in range(1, num_frames) if cuts >> (t - 1) & 1), num_frames]
        if max(b - a for a, b in pairwise(begins)) <= max_window:
            saved = sum(int(stays[a : b - 1].all(0).sum()) * (b - a - 1) for a, b in pairwise(begins))
            divisions.append((saved, begins[-2::-1]))  # the latest beginnings first
    best = max(divisions)
    assert num_saved.tolist() == [best[0]]
    begins = sorted(best[1])
    assert window_idx[0].tolist() == [sum(t >= b for b in begins) - 1 for t in range(num_frames)]
    # What is saved is what merging the marked tokens of each window into one saves.
    windows = [window_idx[0] == w for w in range(len(begins))]
    assert best[0] == sum(int(is_static[0, w].sum() - is_static[0, w].any(0).sum()) for w in windows)


def test_ties_go_to_shorter_windows_at_the_end(device):
    similarity = torch.zeros(1, 4, 6, device=device)
    assert check(similarity)[0].tolist() == [[0, 1, 2, 3, 4]]  # nothing to save: single frames
    similarity[0, :2, 0] = 1  # three frames of one position save 2, as do two of two
    similarity[0, 0, 1] = 1
    assert check(similarity)[0].tolist() == [[0, 0, 1, 2, 3]]


def test_threshold_and_special_values(device):
    """Above, not at; NaN and -inf stay nowhere, inf does. A threshold is rounded to float32 first."""
    inf, nan = float("inf"), float("nan")
    similarity = torch.tensor([[[0.1, 0.5, nan, -inf, inf, 0.7]]], device=device)
    assert check(similarity, 0.5)[1][0, 0].tolist() == [False, False, False, False, True, True]
    assert check(similarity, 0.1)[1][0, 0].tolist() == [False, True, False, False, True, True]
    assert check(similarity, -inf)[1][0, 0].tolist() == [True, True, False, False, True, True]
    assert not check(similarity, nan)[1].any()


def test_ragged(device):
    counts = torch.tensor([9, 0, 1, 5, -3, 99], dtype=torch.int32)
    similarity = video(6, 8, 40, 0.95)
    expected = [
        tokred.static_windows(similarity[b : b + 1, : max(int(c) - 1, 0)].to(device), 0.5) for b, c in enumerate(counts)
    ]
    for b, c in enumerate(counts.clamp(0, 9).tolist()):
        similarity[b, max(c - 1, 0) :] = float("nan")
    window_idx, is_static, num_saved = check(similarity.to(device), frame_counts=counts.to(device))
    for b, c in enumerate(counts.clamp(0, 9).tolist()):
        assert (window_idx[b, c:] == -1).all() and not is_static[b, c:].any()
        if c > 0:
            assert window_idx[b, :c].tolist() == expected[b][0][0].tolist()
            assert_close(is_static[b, :c], expected[b][1][0])
            assert num_saved[b] == expected[b][2][0]
    assert num_saved[1] == num_saved[4] == 0


def test_longest(device, simt):
    """All frames that fit, the last one in the longest window; and windows that end at max_window."""
    num_frames = 300 if simt else 2048
    similarity = torch.ones(1, num_frames - 1, 2, device=device)
    window_idx, is_static, num_saved = tokred.static_windows(similarity, 0.5, max_window=num_frames)
    assert (window_idx == 0).all() and is_static.all() and num_saved.item() == 2 * (num_frames - 1)
    window_idx, is_static, num_saved = tokred.static_windows(similarity, 0.5, max_window=100)
    lengths = window_idx[0].bincount()
    assert lengths.max() <= 100 and num_saved.item() == 2 * (num_frames - len(lengths))
    assert len(lengths) == -(-num_frames // 100)


def test_views_and_empty(device):
    base = video(1, 1, 2 * 5 * 7 + 1).flatten().to(device)
    check(base[1:].reshape(2, 5, 7))  # misaligned
    assert check(base[:0].reshape(0, 5, 7))[0].shape == (0, 6)
    assert check(base[:0].reshape(2, 5, 0))[2].tolist() == [0, 0]
    assert check(base[:0].reshape(2, 0, 7))[0].tolist() == [[0], [0]]


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**31 + 4096, device=device)
    similarity = base[2**31 + 8 :][:600].reshape(2, 6, 50)
    similarity.copy_(video(2, 6, 50))
    check(similarity)


def test_row_is_independent_of_its_batch(device, threads):
    similarity = video(9, 15, 70, 0.9).to(device)
    alone = [tokred.static_windows(row[None], 0.5) for row in similarity]
    for result in threads(lambda: tokred.static_windows(similarity, 0.5)):
        for got, parts in zip(result, zip(*alone)):
            assert_close(got, torch.cat(parts))


def test_vmap(device):
    similarity = video(6, 5, 8).reshape(3, 2, 5, 8).to(device)
    mapped = torch.vmap(lambda s: tokred.static_windows(s, 0.5))(similarity)
    for i in range(3):
        assert_close([m[i] for m in mapped], tokred.static_windows(similarity[i], 0.5))


ERRORS = {
    "expected similarity of shape [batch_size, num_frames - 1, num_positions], got [5, 6]": (
        lambda s: tokred.static_windows(s[0], 0.5)
    ),
    "expected similarity of dtype float32, got float64": lambda s: tokred.static_windows(s.double(), 0.5),
    "expected similarity contiguous, got strides [30, 6, 2]": lambda s: tokred.static_windows(s[..., ::2], 0.5),
    "expected max_window >= 1, got 0": lambda s: tokred.static_windows(s, 0.5, max_window=0),
    "expected similarity of at most 2047 pairs of frames, got 2048": (
        lambda s: tokred.static_windows(s.new_zeros(1, 2048, 1), 0.5)
    ),
    "expected frame_counts of dtype int32, got int64": (
        lambda s: tokred.static_windows(s, 0.5, frame_counts=torch.tensor([1, 2], device=s.device))
    ),
    "expected frame_counts of shape [batch_size] = [2], got [3]": (
        lambda s: tokred.static_windows(s, 0.5, frame_counts=torch.zeros(3, device=s.device).int())
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.ones(2, 5, 6, device=device))
    assert f"static_windows: {message}" in str(caught.value)
