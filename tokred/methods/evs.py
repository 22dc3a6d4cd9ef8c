# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""EVS: keep the tokens of a video that differ most from the same place one frame earlier, and the first frame."""

from torch import Tensor
from torch.nn.functional import pad

import tokred
from tokred.methods import Method, Reduced, take_kept

METHOD = Method(
    name="evs",
    paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
    stage="projector",
    basis="authors' code",
    deviations=(
        "Cosines are float32; the released code computes them in the model's dtype.",
        "The first frame is forced; the released code gives it a score of 255. A zero vector has cosine 0.",
        "Batches of videos of different lengths; each has a budget of its own.",
    ),
)


def evs(x: Tensor, *, ratio: float, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Reduced:
    """Keep ``1 - ratio`` of a video's tokens, at least its first frame: those least similar to their predecessors.

    Args:
        x: Projected tokens, ``[batch_size, num_frames, num_patches, dim]``, or packed frames ``[total_frames, num_patches,
            dim]``.
        ratio: The share to leave out: ``max(num_patches, int(num_frames * num_patches * (1 - ratio)))`` tokens stay, so that
            placeholders can be counted before the encoder has run.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input, in frames.
        max_seqlen: Frames of the longest video of a packed input.

    Returns:
        ``Reduced`` with ``x`` ``[batch_size, num_kept, dim]``, ``kept_idx`` (positions in a video, frame after frame),
        ``score`` (1 minus the cosine, ``[batch_size, num_frames * num_patches]`` or ``[total_frames * num_patches]``; those of
        first frames mean nothing) and, for packed input, ``num_kept``. ``tokred.mrope_rebuild`` makes the position ids.

    Source: the authors' dissimilarity to the previous frame and their count, as in vLLM; ties to the lowest index there, too.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"evs: expected ratio in [0, 1], got {ratio}")
    num_patches = x.shape[-2]
    (cosine,) = tokred.row_similarity(x[..., 1:, :, :], x[..., :-1, :, :], ["cosine"])
    score = pad(1 - cosine, (0, 0, 1, 0)).flatten(-2)

    def count(num_frames: int) -> int:
        return min(max(num_patches, int(num_frames * num_patches * (1 - ratio))), num_frames * num_patches)

    if cu_seqlens is None:
        x_kept, kept_idx = tokred.prune_topk(x.flatten(1, 2), score, count(x.shape[1]), keep_first=num_patches)
        return Reduced(x_kept, kept_idx=kept_idx, score=score)
    longest = x.shape[0] if max_seqlen is None else max_seqlen
    counts = (cu_seqlens.diff().double() * num_patches * (1 - ratio)).floor().clamp(min=num_patches).int()
    kept_idx, num_kept = tokred.select_topk(
        score.flatten(), counts, max_k=count(longest), keep_first=num_patches, cu_seqlens=cu_seqlens * num_patches,
        max_seqlen=longest * num_patches,
    )  # fmt: skip
    x_kept = take_kept(x.flatten(0, 1), kept_idx, cu_seqlens * num_patches)
    return Reduced(x_kept, kept_idx=kept_idx, score=score.flatten(), num_kept=num_kept)
