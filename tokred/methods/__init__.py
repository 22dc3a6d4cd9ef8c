# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Published methods as functions on tensors, one file each, made of tokred ops. Nothing here knows a model.

A method takes tokens and whatever its paper scores them with, and returns ``Reduced``. Its ``METHOD`` entry says what the
implementation rests on and where it differs; ``python -m tokred methods`` prints them.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import tokred


class Reduced(NamedTuple):
    """What a method returns; fields that it does not produce are None.

    Fields:
        x: The reduced tokens, ``[batch_size, num_kept, dim]``; of methods for the KV cache the keys, ``[batch_size, num_heads,
            num_kept, head_dim]``, and the other fields have a dimension of heads, too.
        kept_idx: ``[batch_size, num_kept]`` int64, original positions of kept tokens, -1 past ``num_kept``.
        dst_idx: ``[batch_size, num_tokens]`` int64, the row of ``x`` that each token went to.
        size: ``[batch_size, num_kept]`` float32, how many original tokens each row stands for.
        score: The scores that the selection was made from.
        num_kept: ``[batch_size]`` int32, for ragged input and for counts that the scores decide.
        v: The values that go with the keys ``x``.
    """

    x: Tensor
    kept_idx: Tensor | None = None
    dst_idx: Tensor | None = None
    size: Tensor | None = None
    score: Tensor | None = None
    num_kept: Tensor | None = None
    v: Tensor | None = None


def take_kept(x: Tensor, kept_idx: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the rows of tokens that a list names, ``[batch_size, k, dim]``, rows of zeros where it says -1.

    ``x`` is ``[batch_size, num_tokens, dim]``, or packed ``[total_tokens, dim]`` with ``cu_seqlens``. Differentiable in it.
    """
    if cu_seqlens is None:
        return tokred.gather_tokens([x], kept_idx)[0]
    rows = torch.where(kept_idx < 0, kept_idx, kept_idx + cu_seqlens[:-1, None]).reshape(1, -1)
    return tokred.gather_tokens([x[None]], rows)[0].reshape(*kept_idx.shape, x.shape[1])


def kept_mask(kept_idx: Tensor, num_tokens: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return lists as a mask, ``[batch_size, num_tokens]``, or ``[num_tokens]`` of all packed sequences together."""
    if cu_seqlens is not None:
        kept_idx = torch.where(kept_idx < 0, -1, kept_idx + cu_seqlens[:-1, None]).flatten()
    return tokred.list_to_mask(kept_idx, num_tokens)


def prune_span(x: Tensor, score: Tensor, keep: int, first: int, last: int, kv_lens: Tensor | None = None) -> Reduced:
    """Keep the ``keep`` best-scored of the visual tokens ``[first, last)`` of prompts, and all that is around them.

    ``x`` is ``[batch_size, num_tokens, dim]``, ``score`` ``[batch_size, num_tokens]`` (values outside of the span do not
    matter); ``kv_lens`` ``[batch_size]`` are the lengths of prompts that are padded at their end.
    """
    num_tokens = x.shape[1]
    if not 0 <= first <= last <= num_tokens:
        raise ValueError(f"prune_span: expected 0 <= first <= last <= {num_tokens}, got {first} and {last}")
    if not 0 <= keep <= last - first:
        raise ValueError(f"prune_span: expected keep in [0, last - first = {last - first}], got {keep}")
    longest, behind = first + keep + num_tokens - last, num_tokens - last
    if kv_lens is None:
        x_kept, kept_idx = tokred.prune_topk(x, score, longest, keep_first=first, keep_last=behind)
        return Reduced(x_kept, kept_idx=kept_idx, score=score)
    padding = torch.arange(num_tokens, device=x.device) >= kv_lens[:, None]
    count = longest - num_tokens + kv_lens  # what is padding takes no place that a visual token could fill
    kept_idx, num_kept = tokred.select_topk(
        score, count, max_k=longest, keep_first=first, keep_last=behind, drop_mask=padding
    )
    return Reduced(take_kept(x, kept_idx), kept_idx=kept_idx, score=score, num_kept=num_kept)


@dataclass(frozen=True)
class Method:
    """A registry entry: what a method is and what its implementation rests on.

    Args:
        name: As in ``tokred.methods.NAME``.
        paper: The paper's title.
        stage: encoder, projector, prefill, decode, KV or training; several with commas.
        basis: "authors' code", "paper" or "abstract only".
        deviations: Where this implementation differs, one sentence each.
        compat: Switches that bring back the behaviour of released code, with their meaning.
    """

    name: str
    paper: str
    stage: str
    basis: str
    deviations: tuple[str, ...] = ()
    compat: dict[str, str] = field(default_factory=dict)


def registry() -> list[Method]:
    """Return the entries of all methods, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}").METHOD for name in names]


def markdown() -> str:
    """Return the registry as the page docs/methods.md."""
    lines = ["# Methods", "", "Made by `python -m tokred methods --markdown`; do not edit.", ""]
    for entry in registry():
        lines += [f"## `tokred.methods.{entry.name}`", "", f"*{entry.paper}*", ""]
        lines += [f"- Stage: {entry.stage}. Rests on: {entry.basis}."]
        lines += [f"- Differs: {text}" for text in entry.deviations]
        lines += [f"- `compat={switch!r}`: {text}" for switch, text in entry.compat.items()]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"
