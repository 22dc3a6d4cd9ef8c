# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""TokenSelect: attend to the cached tokens that a soft vote of all heads picks, with sinks and a window of recent ones."""

import torch
from torch import Tensor

import tokred
from tokred.methods import Method

METHOD = Method(
    name="tokenselect",
    paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache "
    "Selection",
    stage="prefill, decode",
    basis="authors' code",
    deviations=(
        "Query head h votes with key head h // group; the released kernel takes h mod num_kv_heads.",
        "Logits and softmax are float32; the released code takes the softmax of bfloat16 logits.",
        "The list alone: attention (with positions 0, 1, ... of the list) is the caller's, and so is the reuse of a list "
        "while the query stays alike, which the released code switches off.",
        "Batches of sequences of different lengths; the released code serves one request.",
        "Ties go to the lowest index.",
    ),
)


def tokenselect(
    q: Tensor,
    k: Tensor,
    *,
    keep: int = 2048,
    num_sinks: int = 128,
    num_recent: int = 512,
    kv_lens: Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """List the sinks, the ``keep`` tokens with the most votes, and the recent tokens: one list for all heads of a layer.

    Args:
        q: Queries of a chunk (one when decoding), ``[batch_size, num_q_heads, chunk, head_dim]``, rotated to positions
            ``num_recent, num_recent + 1, ...``, whatever their place in the sequence.
        k: Keys as the cache stores them, not rotated: ``[batch_size, num_kv_heads, num_tokens, head_dim]``, or pages.
        keep: How many tokens are voted for.
        num_sinks: How many first tokens are always listed.
        num_recent: How many last tokens are always listed.
        kv_lens: ``[batch_size]`` int32, tokens cached so far, in a padded batch.
        page_table: ``[batch_size, max_pages]`` int32 for ``k`` in pages (see ``tokred.qk_score``).

    Returns:
        ``(kept_idx, votes)``: ``[batch_size, 1, num_listed]`` int64 as ``tokred.attend_selected`` takes it, ascending, -1
        past the end (a sequence of up to ``num_sinks + keep + num_recent`` tokens is listed whole), and
        ``[batch_size, num_tokens]`` float32.

    Source: the authors' token retrieval: the mean query of the chunk, logits without a scale, a softmax over the candidates
    between sinks and recent tokens in each head, summed over heads.
    """
    logits = tokred.qk_score(q.mean(2, keepdim=True), k, page_table=page_table, kv_lens=kv_lens)[:, :, 0]
    position = torch.arange(logits.shape[-1], device=q.device)
    lens = torch.full_like(position[:1], len(position)) if kv_lens is None else kv_lens[:, None]
    forced = ((position < num_sinks) | (position >= lens - num_recent)).expand(len(q), -1)
    beyond = (position >= lens).expand(len(q), -1)
    no_candidate = (forced | beyond)[:, None]  # without any candidate the softmax is NaN
    votes = logits.masked_fill(no_candidate, -torch.inf).softmax(-1).masked_fill(no_candidate, 0).sum(1)
    num_listed = min(num_sinks + keep + num_recent, len(position))
    kept_idx, _ = tokred.select_topk(votes, num_listed, keep_mask=forced, drop_mask=beyond, return_num_kept=True)
    return kept_idx[:, None], votes
