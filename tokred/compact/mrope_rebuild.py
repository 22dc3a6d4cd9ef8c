# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""mrope_rebuild: position ids of text and pruned media, counted anew."""

import torch
from torch import Tensor


def mrope_rebuild(
    media_ids: Tensor, media_idx: Tensor, advance: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rebuild M-RoPE position ids after pruning: media tokens keep their place in their grid, text counts on behind it.

    A text token has the id that follows the one before, in every axis. The tokens of a media item have the next free id plus
    their place in its grid; the first token behind the item has that id plus the item's ``advance``.

    Args:
        media_ids: ``[num_axes, batch_size, num_tokens]`` integers: each media token's place in its item (frame, row, column),
            gathered like the token itself; not looked at for text.
        media_idx: ``[batch_size, num_tokens]`` integers: the media item of each token, counted in the sequence, -1 for text.
            The tokens of an item adjoin; an item of which nothing was kept does not occur. Frames with text between them
            are items of their own.
        advance: ``[batch_size, num_items]`` integers: how many ids an item takes: the width of its merged grid (EVS in
            vLLM), or the largest side of the unpruned grid (Qwen2-VL's own rule).
        mask: Bool, ``[batch_size, num_tokens]``: false for padding, which counts nothing and gets 0.

    Returns:
        ``(position_ids, rope_delta)``: int64 ``[num_axes, batch_size, num_tokens]``, and int64 ``[batch_size]``, the next
        free id minus the number of tokens: what decoding adds to its own count.

    A composite of torch ops, without a sync. Deterministic; shapes depend on shapes alone. Integers have no gradient.

    Source: EVS's recomputation in vLLM.

    Example:
        >>> # text, text, two of the six tokens of a 2 x 3 image, text
        >>> media_ids = torch.tensor([[[0, 0, 0, 0, 0]], [[0, 0, 0, 1, 0]], [[0, 0, 2, 1, 0]]])
        >>> ids, delta = tokred.mrope_rebuild(media_ids, torch.tensor([[-1, -1, 0, 0, -1]]), torch.tensor([[3]]))
        >>> ids[:, 0].tolist(), delta.tolist()
        ([[0, 1, 2, 2, 5], [0, 1, 2, 3, 5], [0, 1, 4, 3, 5]], [1])
    """
    if media_ids.dim() != 3 or media_ids.shape[1:] != media_idx.shape or advance.shape[:-1] != media_idx.shape[:-1]:
        raise RuntimeError(
            "mrope_rebuild: expected media_ids [num_axes, batch_size, num_tokens], media_idx [batch_size, num_tokens] and "
            f"advance [batch_size, num_items], got {list(media_ids.shape)}, {list(media_idx.shape)} and "
            f"{list(advance.shape)}"
        )
    valid = torch.ones_like(media_idx, dtype=torch.bool) if mask is None else mask
    num_items = advance.shape[-1]
    of_media = valid & (media_idx >= 0) & (media_idx < num_items)
    item = torch.where(of_media, media_idx, num_items).long()
    taken = torch.nn.functional.pad(advance, (0, 1)).long().gather(-1, item)  # by the token's item, 0 by text
    before = torch.nn.functional.pad(item[:, :-1], (1, 0), value=num_items)
    begins = of_media & (item != before)
    is_text = valid & ~of_media
    # The next free id behind each token; a token of an item steps back to where the item began.
    free = (is_text.long() + torch.where(begins, taken, 0)).cumsum(-1)
    start = free - torch.where(of_media, taken, is_text.long())
    ids = torch.where(valid, start + torch.where(of_media, media_ids.long(), 0), 0)
    delta = free.new_zeros(free.shape[0]) if free.shape[-1] == 0 else free[:, -1]
    return ids, delta - valid.sum(-1)
