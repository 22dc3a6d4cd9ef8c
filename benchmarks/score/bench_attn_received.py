# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""attn_received against softmax(q k^T) summed over the queries, which makes the whole matrix."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from tokred import _registry
from tokred.testing.bench import Case, dtype_word, generator

F32, BF16 = torch.float32, torch.bfloat16


class Size(NamedTuple):
    """One problem."""

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int


def make_inputs(i: int, device: str, dtype: torch.dtype, size: Size) -> tuple[Tensor, Tensor]:
    options = {"generator": generator(device, i), "device": device}
    q = torch.randn(size.batch_size, size.num_q_heads, size.q_len, size.head_dim, **options)
    k = torch.randn(size.batch_size, size.num_kv_heads, size.kv_len, size.head_dim, **options)
    return q.to(dtype), k.to(dtype)


def make_with_lse(i: int, device: str, dtype: torch.dtype, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    q, k = make_inputs(i, device, dtype, size)
    return q, k, tokred.attn_received(q, k)[1]


def logits(q: Tensor, k: Tensor) -> Tensor:
    """K is repeated over the group, as attention in eager mode does."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5


def eager(q: Tensor, k: Tensor) -> tuple[Tensor, None]:
    return logits(q, k).softmax(-1, dtype=torch.float32).sum(-2), None


def eager_causal(q: Tensor, k: Tensor) -> tuple[Tensor, None]:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    return logits(q, k).masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).sum(-2), None


def hide_later(logits: Tensor) -> Tensor:
    """Hide in place what the last queries do not see: among the last keys alone, as SnapKV does."""
    later = torch.ones(logits.shape[-2], logits.shape[-2], dtype=torch.bool, device=logits.device).triu(1)
    logits[..., -logits.shape[-2] :].masked_fill_(later, -torch.inf)
    return logits


def eager_window(q: Tensor, k: Tensor) -> tuple[Tensor, None]:
    return hide_later(logits(q, k)).softmax(-1, dtype=torch.float32).sum(-2), None


def eager_window_grouped(q: Tensor, k: Tensor) -> tuple[Tensor, None]:
    """K is not repeated: a group's queries are rows of one product, and scaled, for they are fewer than logits."""
    rows = (q * q.shape[-1] ** -0.5).reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return hide_later((rows @ k.mT).view(*q.shape[:3], -1)).softmax(-1, dtype=torch.float32).sum(-2), None


def eager_with_lse(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, None]:
    return (logits(q, k).float() - lse[..., None]).exp().sum(-2), None


def with_lse(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return tokred.attn_received(q, k, lse=lse)


def call_with_lse(q: Tensor, k: Tensor, lse: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (q, k), {"lse": lse}


def causal(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return tokred.attn_received(q, k, causal=True)


def call_causal(q: Tensor, k: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (q, k), {"causal": True}


def by_head(q: Tensor, k: Tensor, *lse: Tensor, **options: Any) -> tuple[Tensor, None]:
    """The reference head by head: it makes the whole matrix."""
    define, group = _registry.op("attn_received").module.reference, q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        given = {"lse": lse[0][:, h : h + 1]} if lse else {}
        heads.append(define(q[:, h : h + 1], k[:, h // group : h // group + 1], **given, **options)[0])
    return torch.cat(heads, 1), None


def slash(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return tokred.attn_received(q, k, causal=True, return_diagonal=True)


def call_slash(q: Tensor, k: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (q, k), {"causal": True, "return_diagonal": True}


def eager_slash(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Verticals and slashes of MInference: rows padded so that a diagonal is a column of a skewed view."""
    q_len, kv_len = q.shape[2], k.shape[2]
    hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - q_len + 1)
    p = logits(q, k).masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    padded = torch.nn.functional.pad(p, (q_len - 1, 0))
    width = padded.shape[-1]
    view = padded.as_strided((*p.shape[:2], q_len, kv_len), (*padded.stride()[:2], width + 1, 1))
    return p.sum(-2), None, view.sum(-2).flip(-1)


def by_head_slash(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    define, group = _registry.op("attn_received").module.reference, q.shape[1] // k.shape[1]
    options = {"causal": True, "return_diagonal": True}
    heads = [define(q[:, [h]], k[:, [h // group]], **options) for h in range(q.shape[1])]
    return tuple(torch.cat(parts, 1) for parts in zip(*heads))


def received_and_diagonal(out: tuple[Tensor, ...], *inputs: object) -> Tensor:
    return torch.cat([out[0], out[2]], -1)


PAGE = 16


def make_paged(i: int, device: str, dtype: torch.dtype, size: Size) -> tuple[Tensor, ...]:
    """K in pages of 16 in random order, as a serving cache has it, all of them full."""
    q, k = make_inputs(i, device, dtype, size)
    order = torch.randperm(size.batch_size * size.kv_len // PAGE, generator=generator(device, i), device=device)
    pages = torch.empty(len(order), PAGE, size.num_kv_heads, size.head_dim, dtype=dtype, device=device)
    pages[order] = k.transpose(1, 2).reshape(pages.shape)
    return q, pages, order.view(size.batch_size, -1).int()


def paged(q: Tensor, pages: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
    return tokred.attn_received(q, pages, page_table=page_table, causal=True)


def call_paged(q: Tensor, pages: Tensor, page_table: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (q, pages), {"page_table": page_table, "causal": True}


def as_dense(pages: Tensor, page_table: Tensor) -> Tensor:
    return pages[page_table].flatten(1, 2).transpose(1, 2)


def eager_paged(q: Tensor, pages: Tensor, page_table: Tensor) -> tuple[Tensor, None]:
    return eager_causal(q, as_dense(pages, page_table))


def by_head_paged(q: Tensor, pages: Tensor, page_table: Tensor) -> tuple[Tensor, None]:
    return by_head(q, as_dense(pages, page_table), causal=True)


def make_packed(i: int, device: str, dtype: torch.dtype, size: Size) -> tuple[Tensor, ...]:
    """batch_size windows of q_len tokens, packed."""
    q, k = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in make_inputs(i, device, dtype, size))
    return q, k, size.q_len * torch.arange(size.batch_size + 1, dtype=torch.int32, device=device)


def call_packed(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (q, k), {"cu_seqlens": cu_seqlens, "max_seqlen": 64}


def packed(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return tokred.attn_received(q, k, cu_seqlens=cu_seqlens, max_seqlen=64)


def windows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """All windows are of one length, which eager mode needs."""
    return x.unflatten(0, (cu_seqlens.shape[0] - 1, -1)).transpose(1, 2)


def eager_packed(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, None]:
    return eager(windows(q, cu_seqlens), windows(k, cu_seqlens))[0].transpose(0, 1).flatten(1), None


def by_head_packed(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, None]:
    return by_head(windows(q, cu_seqlens), windows(k, cu_seqlens))[0].transpose(0, 1).flatten(1), None


def received(out: tuple[Tensor, Tensor | None], *inputs: object) -> Tensor:
    return out[0]


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    """Yield the rows of this benchmark."""
    cuda = device == "cuda"
    # kind, dtype, size, aim: CLIP-L at 336, LLaVA-NeXT's layer, SnapKV's window, SigLIP, the CLS row, the last token of a
    # prompt; Qwen2.5-VL's 8x8 windows of an image of 1344 x 1008
    sizes: list[tuple[str, torch.dtype, Size, float | None]] = [
        ("", F32, Size(1, 16, 16, 577, 577, 64), 1.2),
        ("", F32, Size(1, 32, 32, 2880, 2880, 128), 2.0),
        ("window", BF16, Size(1, 32, 8, 64, 16384, 128), 4.0),
        ("", BF16, Size(1, 16, 16, 577, 577, 64), None),
        ("", BF16, Size(1, 16, 16, 729, 729, 72), None),
        ("", BF16, Size(8, 16, 16, 1, 577, 64), 1.5),
        ("", BF16, Size(1, 32, 8, 1, 16384, 128), None),
        ("lse", F32, Size(1, 16, 16, 577, 577, 64), None),
        ("paged", BF16, Size(1, 32, 8, 64, 16384, 128), 2.0),
        ("packed", BF16, Size(108, 16, 16, 64, 64, 80), 1.5),
    ]
    if cuda:
        sizes = [
            ("", BF16, Size(32, 16, 16, 577, 577, 64), None),
            ("lse", BF16, Size(32, 16, 16, 577, 577, 64), None),
            ("", BF16, Size(32, 16, 16, 1, 577, 64), None),
            ("", BF16, Size(1, 32, 8, 64, 16384, 128), None),
            ("", BF16, Size(1, 32, 8, 64, 131072, 128), None),
            ("causal", BF16, Size(1, 32, 32, 8192, 8192, 128), None),
            ("", F32, Size(1, 16, 16, 577, 577, 64), None),
            ("paged", BF16, Size(1, 32, 8, 64, 131072, 128), None),
            ("packed", BF16, Size(108, 16, 16, 64, 64, 80), None),
        ]
    sizes.append(("slash", BF16, Size(1, 32, 8, 64, 131072 if cuda else 16384, 128), None))  # MInference
    if smoke:
        tiny = Size(1, 2, 1, 20, 40, 16)
        sizes = [(kind, F32, tiny, None) for kind in ("", "causal", "slash", "window")] + [("lse", BF16, tiny, None)]
        sizes += [("paged", F32, Size(1, 2, 1, 20, 48, 16), None), ("packed", F32, Size(3, 2, 2, 20, 20, 16), None)]
    forms: dict[str, dict[str, Any]] = {
        "": {"run": {"tokred": tokred.attn_received, "eager softmax": eager}, "peers": ("flash_colreduce",)},
        "lse": {"run": {"tokred": with_lse, "eager exp": eager_with_lse}, "call": call_with_lse},
        "causal": {
            "run": {"tokred": causal, "eager softmax": eager_causal},
            "call": call_causal,
            "reference": partial(by_head, causal=True),
        },
        "window": {
            "run": {"tokred": causal, "eager softmax": eager_window, "grouped eager softmax": eager_window_grouped},
            "call": call_causal,
            "reference": partial(by_head, causal=True),
        },
        "paged": {
            "run": {"tokred": paged, "gather+eager softmax": eager_paged},
            "call": call_paged,
            "reference": by_head_paged,
        },
        "packed": {
            "run": {"tokred": packed, "eager softmax": eager_packed},
            "call": call_packed,
            "reference": by_head_packed,
        },
        "slash": {
            "run": {"tokred": slash, "eager softmax": eager_slash},
            "call": call_slash,
            "reference": by_head_slash,
            "compare": received_and_diagonal,
        },
    }
    makers = {"lse": make_with_lse, "paged": make_paged, "packed": make_packed}
    for kind, dtype, size, reach in sizes:
        b, hq, hkv, q_len, kv_len, head_dim = size
        yield Case(
            op="attn_received",
            name=f"B{b} H{hq}/{hkv} q{q_len} k{kv_len} d{head_dim}{' ' * bool(kind)}{kind}",
            dtype=dtype_word(dtype),
            make=partial(makers.get(kind, make_inputs), device=device, dtype=dtype, size=size),
            **{"reference": by_head, "compare": received, **forms[kind]},
            compiled=("eager softmax",) if not kind and q_len == 577 and (b > 1 or not cuda) else (),
            # Eager rounds bfloat16 logits to 8 bits before the softmax; the sums average that out.
            tolerance=(1e-4, 1e-5) if dtype == F32 else (5e-2, 5e-3),
            reach=reach,
            against="" if kind == "window" else list(forms[kind]["run"])[1],
            core=cuda and dtype == BF16 and kv_len != 16384,  # the same window over 131,072 keys is there
        )
