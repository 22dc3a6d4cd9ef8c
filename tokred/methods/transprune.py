# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""TransPrune: keep the visual tokens that the layers change most and that the instruction attends to."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced, prune_span
from tokred.methods.sparsevlm import text_attention

METHOD = Method(
    name="transprune",
    paper="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "The softmax of directions is over the tokens of each prompt; the released code's is over its whole batch (of one).",
        "Magnitudes, directions and scores are float32; the released code computes transitions in half precision.",
        "Batches of prompts of different lengths; ties go to the lowest index.",
    ),
    compat={
        "released": "a change of direction is 1 - cos, so that a flipped token counts as changed; the paper has 1 - |cos|"
    },
)


def transition(before: Tensor, after: Tensor, *, kv_lens: Tensor | None = None, compat: str | None = None) -> Tensor:
    """Return how much one sublayer (attention or MLP) changes each token: by magnitude, times a softmax over directions.

    Args:
        before: The sublayer's input behind its norm, ``[batch_size, num_tokens, dim]``.
        after: Its output before it is added to the residual stream, likewise.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``[batch_size, num_tokens]`` float32, 0 for padding. Add up both sublayers of layers 7 to 12; behind a pruning go on
        with ``tokred.gather_tokens([total], kept_idx)[0]``.
    """
    if compat not in (None, "released"):
        raise ValueError(f"transprune: expected compat to be None or 'released', got {compat!r}")
    magnitude, cosine = tokred.row_similarity(after, before, ("norm_ratio", "cosine"))
    turn = 1 - (cosine if compat == "released" else cosine.abs())
    if kv_lens is None:
        return magnitude * turn.softmax(-1)
    padding = torch.arange(before.shape[1], device=before.device) >= kv_lens[:, None]
    return (magnitude * turn.masked_fill(padding, -torch.inf).softmax(-1)).masked_fill(padding, 0)


def transprune(
    x: Tensor,
    changes: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    keep: int,
    first: int,
    last: int,
    alpha: float = 0.5,
    attention: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> Reduced:
    """Keep the ``keep`` visual tokens that score best by their share of all changes and of the text's attention.

    Args:
        x: Output of the layer behind which tokens are dropped, ``[batch_size, num_tokens, dim]``.
        changes: Sums of ``transition``, ``[batch_size, num_tokens]``.
        q: Queries of the tokens behind the image, of the next layer, ``[batch_size, num_q_heads, num_tokens - last,
            head_dim]``, rotated.
        k: Its keys, ``[batch_size, num_kv_heads, num_tokens, head_dim]``, rotated.
        keep: How many visual tokens to keep: 7/8, 5/8 and 1/8 of them behind layers 7, 9 and 12.
        first: Where the visual tokens start.
        last: Where they end.
        alpha: What changes count for; the attention counts for ``1 - alpha``.
        attention: Instead of ``q`` and ``k``, ``[batch_size, num_tokens]``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.

    Returns:
        ``Reduced`` with ``x``, ``kept_idx``, ``score`` and, with ``kv_lens``, ``num_kept``. The released code renumbers
        positions from 0.

    Source: the paper's token transition variation and instruction-guided attention; the authors' code for their shares.
    """
    if attention is None:
        if q is None or k is None:
            raise ValueError("transprune: expected q and k of the scoring layer, or attention")
        place = torch.arange(last, x.shape[1], device=x.device).expand(len(x), -1)
        weight = torch.ones_like(place) if kv_lens is None else place < kv_lens[:, None]
        attention = text_attention(q, k, weight.float(), scale=scale).mean(1)
    shares = [part / (part[:, first:last].sum(1, keepdim=True) + 1e-8) for part in (changes.float(), attention)]
    return prune_span(x, alpha * shares[0] + (1 - alpha) * shares[1], keep, first, last, kv_lens)
