# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""FocusUI: keep the patches of a screenshot that an instruction asks for, and a marker where others were dropped."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, kept_mask

METHOD = Method(
    name="focusui",
    paper="FocusUI: Efficient UI Grounding via Position-Preserving Visual Token Selection",
    stage="projector",
    basis="authors' code",
    deviations=(
        "Ties go to the lowest index; the released code shuffles the indices by a generator seeded from the input ids.",
        "Similarities are summed in float32.",
        "Batches of images with different numbers of patches; the released code needs equal lengths.",
        "keep counts tokens; the released ratio is the share dropped, keep = int(num_tokens * (1 - ratio)) in float64.",
    ),
)


def instruction_score(patches: Tensor, text: Tensor, *, reduce: str = "mean") -> Tensor:
    """Return how similar each patch is to the instruction, by the scorer's unit vectors: mean or max over its words.

    Args:
        patches: Patch embeddings of the scorer, unit norm, ``[batch_size, num_tokens, dim]``.
        text: Word embeddings of the scorer, unit norm, ``[batch_size, num_words, dim]``.
        reduce: ``"mean"``, as released, or ``"max"``.

    Returns:
        ``[batch_size, num_tokens]`` float32.
    """
    patches, text = patches.float(), text.float()
    if reduce == "mean":  # of the products, which is the product with the mean
        return (patches @ text.mean(1, keepdim=True).transpose(1, 2))[..., 0]
    if reduce != "max":
        raise ValueError(f"focusui: expected reduce to be 'mean' or 'max', got {reduce!r}")
    return (patches @ text.transpose(1, 2)).amax(-1)


def focusui(
    x: Tensor,
    score: Tensor,
    *,
    keep: int,
    marker: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Reduced:
    """Keep the ``keep`` best-scored patches and, of every run of dropped ones, the last place with the marker's embedding.

    Position ids of what is kept, markers too, are those of ``kept_idx``; gather them, do not renumber.

    Args:
        x: Patch tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]``.
        score: ``[batch_size, num_tokens]`` or ``[total_tokens]``, for example of ``instruction_score``.
        keep: How many patches to keep of each image; a packed one with fewer keeps all of them.
        marker: Embedding of the marker token, ``[dim]``; without it markers are rows of zeros.
        cu_seqlens: ``[batch_size + 1]`` int32 for packed input.
        max_seqlen: Longest sequence of a packed input.

    Returns:
        ``Reduced`` with ``x`` ``[batch_size, capacity, dim]``, ``kept_idx``, ``num_kept`` (markers included), ``score``, and
        ``size``: 1 for a patch, for a marker how many dropped ones it stands for, 0 past ``num_kept``. The capacity is
        ``min(2 * keep + 1, num_tokens)``: there are at most ``keep + 1`` runs.

    Source: the authors' selection and PosPad.
    """
    longest = score.shape[-1] if max_seqlen is None else max_seqlen
    kept_idx, _ = tokred.select_topk(score, keep, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, return_num_kept=True)
    kept = kept_mask(kept_idx, score.shape[-1], cu_seqlens)
    stays, is_marker, _ = tokred.run_markers(kept, cu_seqlens=cu_seqlens)
    x_kept, final_idx, num_kept, others = tokred.prune_topk(
        x, score, min(2 * keep + 1, longest), drop_mask=~stays, others=[is_marker], cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, return_num_kept=True,
    )  # fmt: skip
    (at_marker,) = others
    x_kept = torch.where(at_marker[..., None], 0 if marker is None else marker.to(x.dtype), x_kept)
    # A run begins behind the token that is kept before its marker.
    before = torch.nn.functional.pad(final_idx[:, :-1], (1, 0), value=-1)
    size = torch.where(final_idx < 0, 0, torch.where(at_marker, final_idx - before, 1)).float()
    return Reduced(x_kept, kept_idx=final_idx, size=size, score=score, num_kept=num_kept)
