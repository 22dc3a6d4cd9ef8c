# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""static_windows: divide a video into windows in which as many tokens as possible repeat."""

import torch
from torch import Tensor

from tokred import _op


def static_windows(
    similarity: Tensor, threshold: float, *, max_window: int = 1024, frame_counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide videos into windows of frames so that the most tokens are static, and mark those tokens.

    A position is static in a window when its token stays similar (above ``threshold``) from each frame of the window to the
    next one. One token per static position can stand for all frames of the window, which saves ``frames - 1`` of them. The
    division saves the most tokens; it is found by a dynamic programme over the frames.

    Args:
        similarity: Of each token to the one at its position in the next frame, ``[batch_size, num_frames - 1,
            num_positions]`` float32, contiguous: ``tokred.row_similarity(x[:, :-1], x[:, 1:])``. At most 2,047 pairs of
            frames.
        threshold: A token stays where the similarity is above it; NaN is not.
        max_window: The most frames of a window, at least 1.
        frame_counts: ``[batch_size]`` int32: videos of different lengths, padded to ``num_frames``. A count outside of
            ``[0, num_frames]`` acts as the nearest one; similarities beyond are not looked at.

    Returns:
        ``(window_idx, is_static, num_saved)``.

        - ``window_idx``: ``[batch_size, num_frames]`` int64: the window of each frame, from 0 on; -1 beyond the count.
        - ``is_static``: bool, ``[batch_size, num_frames, num_positions]``: whether the token repeats in its window; nothing
          does in a window of one frame.
        - ``num_saved``: ``[batch_size]`` int64: how many tokens go when static ones are merged over their windows.

    Among divisions that save as much, the last window is the shortest, then the one before it, and so on. Deterministic, the
    same on every device and whatever else is in the batch; shapes depend on shapes alone. Has no gradient (``similarity`` may
    require it).

    Source: "HoliTom: Holistic Token Merging for Fast Video Large Language Models" (temporal merging).

    Example:
        >>> similarity = torch.tensor([[[0.9, 0.9], [0.9, 0.1], [0.2, 0.3]]])
        >>> window_idx, is_static, num_saved = tokred.static_windows(similarity, 0.8)
        >>> window_idx.tolist(), is_static[0].int().tolist(), num_saved.tolist()
        ([[0, 0, 1, 2]], [[1, 1], [1, 1], [0, 0], [0, 0]], [2])

    Three frames in one window would save 2 as well, from one position; ties go to the shorter last window.
    """
    return torch.ops.tokred.static_windows.default(similarity, frame_counts, threshold, max_window)


def reference(
    similarity: Tensor, threshold: float, *, max_window: int = 1024, frame_counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Define static_windows in plain PyTorch; tests and benchmarks measure against this."""
    batch_size, num_frames = similarity.shape[0], similarity.shape[1] + 1
    window_idx = torch.full((batch_size, num_frames), -1)
    is_static = torch.zeros((batch_size, num_frames, similarity.shape[2]), dtype=torch.bool)
    num_saved = torch.zeros(batch_size, dtype=torch.int64)
    # Rounded as a kernel's argument is.
    stays = (similarity > torch.tensor(threshold, dtype=torch.float32, device=similarity.device)).cpu()
    for b in range(batch_size):
        count = num_frames if frame_counts is None else min(max(int(frame_counts[b]), 0), num_frames)
        saved = [0]  # by the best division of the first frames
        first = []  # of the last window of that division
        for last in range(count):
            best, begin = saved[last], last
            for start in range(last - 1, max(last - max_window, -1), -1):  # shorter windows first
                gain = int(stays[b, start:last].all(0).sum()) * (last - start)
                if saved[start] + gain > best:
                    best, begin = saved[start] + gain, start
            saved.append(best)
            first.append(begin)
        num_saved[b] = saved[-1]
        begins = set()
        last = count - 1
        while last >= 0:
            begin = first[last]
            begins.add(begin)
            if begin < last:
                is_static[b, begin : last + 1] = stays[b, begin:last].all(0)
            last = begin - 1
        for t in range(count):
            window_idx[b, t] = (window_idx[b, t - 1] if t else -1) + (t in begins)
    return tuple(out.to(similarity.device) for out in (window_idx, is_static, num_saved))  # type: ignore[return-value]


@torch.library.register_fake("tokred::static_windows")
def _(
    similarity: Tensor, frame_counts: Tensor | None, threshold: float, max_window: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_frames = similarity.shape[0], similarity.shape[1] + 1
    return (
        similarity.new_empty((batch_size, num_frames), dtype=torch.int64),
        similarity.new_empty((batch_size, num_frames, similarity.shape[2]), dtype=torch.bool),
        similarity.new_empty((batch_size,), dtype=torch.int64),
    )


_op.fold_vmap("static_windows")


def floor(
    similarity: Tensor, threshold: float, *, max_window: int = 1024, frame_counts: Tensor | None = None
) -> _op.Floor:
    """Similarities read once; a byte per token, a window per frame and the counts written."""
    batch_size, num_frames = similarity.shape[0], similarity.shape[1] + 1
    written = batch_size * (num_frames * (8 + similarity.shape[2]) + 8)
    return similarity.nbytes + (0 if frame_counts is None else frame_counts.nbytes) + written, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests; there is nothing of ``dtype`` in them."""
    similarity = _op.seeded(device)(3, 9, 12)
    frame_counts = torch.tensor([10, 0, 4], dtype=torch.int32, device=device)
    return [
        ((similarity, -0.5), {}),
        ((similarity, -1.0), {"max_window": 4, "frame_counts": frame_counts}),
    ]
