# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""PyramidDrop: at a few layers of the language model, keep the visual tokens that the instruction's last token attends to."""

from collections.abc import Sequence

from torch import Tensor

from tokred.methods import Method, Reduced, prune_span
from tokred.methods.fastv import prompt_attention

METHOD = Method(
    name="pyramiddrop",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "One image per prompt, at the same place in all prompts of a batch.",
        "Inference: in training the released code averages over the tokens before each answer (give their scores).",
        "Key heads may be fewer than query heads; the released code needs as many.",
        "Scores are float32; the released code casts probabilities to half before it averages them over heads.",
        "Ties go to the lowest index.",
    ),
)


def schedule(num_visual: int, ratios: Sequence[float] = (0.5, 0.25, 0.125)) -> list[int]:
    """Return how many visual tokens stay at each drop (behind layers 8, 16 and 24 of 32): ``int(num_visual * ratio)``."""
    return [int(num_visual * ratio) for ratio in ratios]


def pyramiddrop(
    x: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    keep: int,
    first: int,
    last: int,
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> Reduced:
    """Keep the ``keep`` visual tokens with the highest attention from the instruction's end, and all other tokens.

    Args:
        x: Output of the layer behind which tokens are dropped, ``[batch_size, num_tokens, dim]``.
        q: Query of each instruction's last token, ``[batch_size, num_q_heads, 1, head_dim]``: ``x`` through the next layer's
            norm, projection and rotation.
        k: Keys of all tokens, likewise, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        keep: How many visual tokens to keep, see ``schedule``.
        first: Where the visual tokens start.
        last: Where they end; behind a drop ``first + keep``.
        score: Instead of ``q`` and ``k``, ``[batch_size, num_tokens]``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``Reduced`` with ``x``, ``kept_idx``, ``score`` and, with ``kv_lens``, ``num_kept``. From here on positions are 0, 1,
        ...: the released code renumbers, and lowers the position of decoded tokens by what was dropped before each layer.

    Source: the authors' ranking of the image's tokens and their schedule.
    """
    if score is None:
        if q is None or k is None:
            raise ValueError("pyramiddrop: expected q and k of the scoring layer, or score")
        score = prompt_attention(q, k, kv_lens=kv_lens, scale=scale)
    return prune_span(x, score, keep, first, last, kv_lens)
