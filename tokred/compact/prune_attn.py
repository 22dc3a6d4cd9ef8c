# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""prune_attn: keep the tokens that one query attends to most."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokred import _op
from tokred._topk import select_reference
from tokred.compact.gather_tokens import scatter_rows
from tokred.compact.prune_topk import list_gradients, save_lists

TOLERANCE = {torch.float32: (2e-5, 1e-6), torch.float16: (1e-4, 1e-6), torch.bfloat16: (1e-4, 1e-6)}
"""Of scores: products of half-precision inputs are exact in float32, so that all differ in the order of additions alone."""


def prune_attn(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    num_keep: int,
    *,
    scale: float | None = None,
    reduce: str = "mean",
    first_key: int = 0,
    key_bias: Tensor | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    others: Sequence[Tensor] | None = None,
    return_num_kept: bool = False,
    return_score: bool = False,
) -> tuple[Any, ...]:
    """Keep the ``num_keep`` tokens of each sequence that its query attends to most, in their original order.

    What ``prune_topk`` does with the attention of one query ([CLS], the last token of a prompt), mean, sum or maximum over
    heads, as scores; made and used in one or two launches on CUDA.

    Args:
        x: Tokens, ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]`` with ``cu_seqlens``. Any dtype; the
            last dimension is contiguous.
        q: The query of each sequence, ``[batch_size, num_q_heads, 1, head_dim]``; float32, float16 or bfloat16.
            ``head_dim`` is at most 256 and contiguous; any other strides.
        k: ``[batch_size, num_kv_heads, kv_len, head_dim]``, or packed ``[total_tokens, num_kv_heads, head_dim]``; q's dtype.
            ``num_kv_heads`` divides ``num_q_heads``. All keys take part in the softmax; slice them for that over a span.
        num_keep: How many tokens to keep. Dense: in ``[0, num_tokens]``. Packed: a sequence with fewer keeps all of them.
        scale: Of the logits; the default is ``head_dim ** -0.5``.
        reduce: Over the query heads: ``"mean"``, ``"sum"`` or ``"max"``.
        first_key: The key of the first token: 1 where ``k`` begins with a [CLS] that ``x`` lacks.
        key_bias: ``[batch_size, num_q_heads | num_kv_heads | 1, kv_len]`` float32, packed without the batch, added to the
            logits: the log size of merged tokens, or -inf for keys that are padding.
        keep_mask: Bool, ``[batch_size, num_tokens]`` or ``[total_tokens]``; these tokens are kept and count towards
            ``num_keep``. When more are marked, the best-scored of them are kept.
        drop_mask: Likewise; these are never kept. Their keys take part in the softmax: ``key_bias`` hides them there.
        keep_first: So many tokens at the start of each sequence are forced: a system prompt, a [CLS] among the tokens.
        keep_last: So many at the end of each sequence: the text after an image.
        cu_seqlens: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_tokens``: ``x`` and ``k`` are packed. Where
            offsets do not ascend, results are undefined.
        cu_seqlens_k: Likewise for ``k`` where it has other lengths (with ``first_key``). A token without a key has score 0.
        max_seqlen: The longest packed sequence, in tokens or keys (the default, all of them, is always right and slower on
            CUDA); what lies beyond is not looked at.
        others: Up to 15 more tensors gathered by the same list: ``[batch_size, num_tokens, ...]`` or
            ``[total_tokens, ...]``, any dtype, contiguous after the token dimension.
        return_num_kept: Return ``num_kept`` for a dense input, too.
        return_score: Return the scores.

    Returns:
        ``(x_kept, kept_idx)``, followed by ``num_kept`` when the input is packed or ``return_num_kept`` is set, by ``score``
        when asked for, and by the list of gathered ``others`` when given.

        - ``x_kept``: ``[batch_size, num_keep, dim]``; rows past ``num_kept`` are zeros.
        - ``kept_idx``: ``[batch_size, num_keep]`` int64, positions within the sequence, increasing, then -1.
        - ``num_kept``: ``[batch_size]`` int32.
        - ``score``: ``[batch_size, num_tokens]`` or ``[total_tokens]`` float32; 0 for packed tokens of no sequence.

    ``kept_idx`` is what ``prune_topk`` selects from ``score``, to the last tie: ties go to the lowest index, NaN ranks below
    every number. A NaN or +inf among the logits of a head makes all its attention NaN; a head all of whose logits are -inf
    gives 0. Accumulates in float32, and float32 inputs are multiplied to float32 accuracy; CPU and CUDA agree on scores up to
    rounding. Deterministic; a row's result does not depend on its batch. Shapes depend on shapes and ``num_keep`` alone.
    On CPUs that multiply bfloat16 themselves (AVX-512's instruction), bfloat16 numbers below 2^-126 count as zeros.
    Memory beyond the outputs: a float for each query head and key (none on CUDA where one launch does all), and that of
    ``prune_topk`` for rows beyond 8,192 tokens.
    Differentiable in ``x`` and ``others``; not in ``q`` and ``k``, and ``score`` has no gradient: compute
    ``softmax(q k^T)`` eagerly to train through it.

    The selection of FasterVLM, VTC-CLS (one layer) and VisionZip's dominant tokens ([CLS] row), and of FastV (last token).

    Example:
        >>> x, q, k = torch.randn(2, 576, 32), torch.randn(2, 8, 1, 64), torch.randn(2, 8, 577, 64)
        >>> x_kept, kept_idx = tokred.prune_attn(x, q, k, 64, first_key=1)
        >>> x_kept.shape, kept_idx.shape
        (torch.Size([2, 64, 32]), torch.Size([2, 64]))
    """
    op = torch.ops.tokred.prune_attn
    shared = (keep_mask, drop_mask, key_bias, scale, reduce, first_key, keep_first, keep_last)
    if cu_seqlens is None and cu_seqlens_k is None and others is None and not (return_num_kept or return_score):
        return op.default(x, q, k, num_keep, *shared)
    if max_seqlen is None:
        max_seqlen = max(x.shape[0], k.shape[0]) if cu_seqlens is not None else 0
    x_kept, kept_idx, num_kept, score, kept = op.packed(
        x, q, k, num_keep, *shared, cu_seqlens, cu_seqlens_k, max_seqlen, None if others is None else list(others)
    )
    counts = (num_kept,) if cu_seqlens is not None or return_num_kept else ()
    return (x_kept, kept_idx, *counts, *((score,) if return_score else ()), *(() if others is None else (kept,)))


def _attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None, reduce: str) -> Tensor:
    """Define the scores of one sequence's keys: ``[num_q_heads, head_dim]``, ``[num_kv_heads, kv_len, head_dim]``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = torch.arange(q.shape[0], device=q.device) // (q.shape[0] // k.shape[0])
    logits = (k[heads].to(dtype) @ q.to(dtype)[..., None])[..., 0] * (q.shape[1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + (bias[heads] if bias.shape[0] == k.shape[0] else bias).to(dtype)
    unseen = (logits == -torch.inf).all(-1, keepdim=True)
    p = logits.softmax(-1).masked_fill(unseen, 0)
    return p.mean(0) if reduce == "mean" else p.sum(0) if reduce == "sum" else p.amax(0)


def reference(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    num_keep: int,
    *,
    scale: float | None = None,
    reduce: str = "mean",
    first_key: int = 0,
    key_bias: Tensor | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    others: Sequence[Tensor] | None = None,
    return_num_kept: bool = False,
    return_score: bool = False,
) -> tuple[Any, ...]:
    """Define prune_attn in plain PyTorch; tests and benchmarks measure against this. float64 q in, float64 scores out."""
    packed = cu_seqlens is not None
    tensors = [x, *(others or ())]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        ends_k = ends if cu_seqlens_k is None else cu_seqlens_k.tolist()
        longest = max(x.shape[0], k.shape[0]) if max_seqlen is None else max_seqlen
        parts: list[Any] = [slice(a, min(b, a + longest)) for a, b in pairwise(ends)]
        parts_k = [slice(a, min(b, a + longest)) for a, b in pairwise(ends_k)]
        keys = [k[part].transpose(0, 1) for part in parts_k]
        biases = [None if key_bias is None else key_bias[:, part] for part in parts_k]
        lead = 1
    else:
        parts, keys, lead = list(range(x.shape[0])), list(k), 2
        biases = [None if key_bias is None else row for row in (keys if key_bias is None else key_bias)]
    score = torch.zeros(x.shape[:lead], dtype=torch.promote_types(q.dtype, torch.float32), device=x.device)
    picked = []
    for b, part in enumerate(parts):
        num_tokens = score[part].shape[0]
        seen = _attention(q[b, :, 0], keys[b], biases[b], scale, reduce)[first_key : first_key + num_tokens]
        score[part] = torch.cat([seen, seen.new_zeros(num_tokens - seen.shape[0])])
        keep, drop = (None if mask is None else mask[part] for mask in (keep_mask, drop_mask))
        place = torch.arange(num_tokens, device=x.device)
        forced = (place < keep_first) | (place >= num_tokens - keep_last)
        picked.append(select_reference(score[part], num_keep, forced if keep is None else keep | forced, drop))
    kept_idx = torch.stack(picked) if picked else torch.empty((0, num_keep), dtype=torch.int64, device=x.device)
    outputs = []
    for tensor in tensors:
        out = tensor.new_zeros((len(parts), num_keep, *tensor.shape[lead:]))
        for b, idx in enumerate(picked):
            out[b, idx >= 0] = tensor[parts[b]][idx[idx >= 0]]
        outputs.append(out)
    counts = ((kept_idx >= 0).sum(1, dtype=torch.int32),) if packed or return_num_kept else ()
    given = () if others is None else (outputs[1:],)
    return (outputs[0], kept_idx, *counts, *((score,) if return_score else ()), *given)


def _kept(x: Tensor, num_keep: int, batch_size: int, lead: int) -> Tensor:
    return x.new_empty((batch_size, num_keep, *x.shape[lead:]))


@torch.library.register_fake("tokred::prune_attn")
def _(x: Tensor, q: Tensor, k: Tensor, num_keep: int, *options: Any) -> tuple[Tensor, Tensor]:
    return _kept(x, num_keep, x.shape[0], 2), x.new_empty((x.shape[0], num_keep), dtype=torch.int64)


@torch.library.register_fake("tokred::prune_attn.packed")
def _(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    num_keep: int,
    keep_mask: Any = None,
    drop_mask: Any = None,
    key_bias: Any = None,
    scale: Any = None,
    reduce: str = "mean",
    first_key: int = 0,
    keep_first: int = 0,
    keep_last: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int = 0,
    others: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    batch_size, lead = (x.shape[0], 2) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 1)
    kept = [_kept(t, num_keep, batch_size, lead) for t in (x, *(others or ()))]
    kept_idx = x.new_empty((batch_size, num_keep), dtype=torch.int64)
    num_kept, score = x.new_empty((batch_size,), dtype=torch.int32), x.new_empty(x.shape[:lead], dtype=torch.float32)
    return kept[0], kept_idx, num_kept, score, kept[1:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.num_tokens, ctx.num_inputs = inputs[0].shape[1], len(inputs)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (scatter_rows(grad, ctx.saved_tensors[0], ctx.num_tokens), *(None,) * (ctx.num_inputs - 1))


torch.library.register_autograd("tokred::prune_attn", _backward, setup_context=_setup)


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    save_lists(ctx, inputs[0], inputs[12], inputs[15], output[1])
    ctx.mark_non_differentiable(*output[1:4])


def _backward_packed(ctx: Any, grad: Tensor, _idx: Any, _num: Any, _score: Any, grad_others: list[Any]) -> Any:
    grad_x, others = list_gradients(ctx, grad, grad_others)
    return (grad_x, *(None,) * 14, others)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("tokred::prune_attn.packed", _backward_packed, setup_context=_setup_packed)
for _name in ("prune_attn", "prune_attn.packed"):
    _op.autocast(_name, 2, first=1)
_op.fold_vmap("prune_attn")
_op.fold_vmap("prune_attn.packed", absent=(12,))


def floor(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    num_keep: int,
    *,
    scale: float | None = None,
    reduce: str = "mean",
    first_key: int = 0,
    key_bias: Tensor | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    others: Sequence[Tensor] | None = None,
    return_num_kept: bool = False,
    return_score: bool = False,
) -> _op.Floor:
    """Q, K and masks read once, kept rows read and written, the list written. Packed: as if each row kept ``num_keep``."""
    packed = cu_seqlens is not None
    batch_size, num_heads = q.shape[:2]
    tokens = x.shape[0] if packed else batch_size * x.shape[1]
    keys = k.numel() // (k.shape[-1] * k.shape[1])
    row_bytes = sum(t.nbytes for t in (x, *(others or ()))) // max(tokens, 1)
    read = sum(t.nbytes for t in (q, k, key_bias, keep_mask, drop_mask, cu_seqlens, cu_seqlens_k) if t is not None)
    written = 8 * batch_size * num_keep + 4 * batch_size * (packed or return_num_kept) + 4 * tokens * return_score
    return read + 2 * min(batch_size * num_keep, tokens) * row_bytes + written, 2 * num_heads * keys * k.shape[-1]


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, q, k = randn(2, 13, 24, dtype=dtype), 3 * randn(2, 4, 1, 40, dtype=dtype), randn(2, 2, 14, 40, dtype=dtype)
    mask, bias = randn(2, 13) > 1, randn(2, 1, 14)
    cu_seqlens, cu_seqlens_k = (
        torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 3, 26], [0, 4, 28])
    )
    packed = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "first_key": 1, "max_seqlen": 24}
    return [
        ((x, q, k, 5), {"first_key": 1}),
        ((x, q, k, 5), {"keep_mask": mask, "key_bias": bias, "reduce": "max", "scale": 0.2, "keep_last": 1}),
        ((x, q, k, 0), {}),
        ((x, q, k, 6), {"drop_mask": mask, "reduce": "sum", "others": [mask], "return_score": True, "keep_first": 1}),
        ((x.flatten(0, 1), q, k.transpose(1, 2).flatten(0, 1), 7), {**packed, "return_score": True}),
    ]
