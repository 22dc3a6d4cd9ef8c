# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""A trained vision transformer on real images, with all tokens, with fewer by pruning, with fewer by merging.

    python examples/demo.py --out out

Writes to OUT: digits.md and digits.json (accuracy, tokens, speed, memory), digits.png (which patches of held-out digits
were kept, and how they were merged) and photo.png (the same ops on a photograph cut as for a ViT-L/14 at 336 pixels).
Needs scikit-learn, scikit-image and matplotlib, and no network: both packages carry the images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _figures
import digits_vit
import torch
import torch.nn.functional as F
from digits_vit import DigitsViT, Reducer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import tokred
from tokred.methods.fastervlm import cls_attention, fastervlm
from tokred.methods.tome import tome
from tokred.testing import machine

BATCH_SIZE = 50
PRUNE_LAYER = 1  # the second of six blocks: the first whose CLS token has seen the patches
KEEPS = (128, 32, 8)  # patches kept of 256
MERGES = (32, 72, 104)  # merged away per block; on average as many tokens per block as the three above
PHOTO_SIZE, PHOTO_GRID, PHOTO_DIM = 336, 24, 1024  # ViT-L/14 at 336 pixels: 576 patches of 14 x 14 pixels
PHOTO_KEEPS = (192, 64)
PHOTO_LAYERS, PHOTO_R = 24, 18  # ViT-L has 24 blocks; 576 - 24 * 18 = 144 tokens remain
PICTURED = (0, 2, 3, 4, 5, 6, 8, 9)  # the first held-out scan of each
NOISY = 0.25  # spread of a row's speeds above which the table says so
SCHEMA = 1  # of digits.json


class Prune:
    """In one block, keep CLS and the ``num_kept`` patches it attends to most (FasterVLM's selection)."""

    def __init__(self, num_kept: int, layer_idx: int = PRUNE_LAYER) -> None:
        self.num_kept = num_kept
        self.layer_idx = layer_idx
        self.kept_idx: Tensor | None = None  # of the last call, [batch, num_kept], positions among the patches

    def __call__(
        self, layer_idx: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `digits_vit.Reducer`."""
        if layer_idx != self.layer_idx:
            return x, size
        # CLS gets the highest score there is, so one selection and one gather keep it in front of its patches.
        score = F.pad(cls_attention(q[:, :, :1], k), (1, 0), value=math.inf)
        reduced = fastervlm(x, score=score, keep=1 + self.num_kept)
        assert reduced.kept_idx is not None
        self.kept_idx = reduced.kept_idx[:, 1:] - 1
        return reduced.x, size


class Merge:
    """In every block, merge ``r`` tokens into the ones most like them (ToMe); attention then weighs by size."""

    def __init__(self, r: int) -> None:
        self.r = r
        self.dst_idx: list[
            Tensor
        ] = []  # of the last pass, after each block, [batch, 257]: where each first token is now

    def __call__(
        self, layer_idx: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `digits_vit.Reducer`."""
        reduced = tome(x, k, r=self.r, size=size, num_protected=1)
        assert reduced.dst_idx is not None
        if layer_idx == 0:
            self.dst_idx = [reduced.dst_idx]
        else:
            self.dst_idx.append(reduced.dst_idx.gather(1, self.dst_idx[-1]))
        return reduced.x, reduced.size


@dataclass
class Row:
    """One line of the table."""

    method: str
    budget: str
    tokens: list[int]  # per image, entering the attention and the MLP of each block
    num_images: int
    num_wrong: int
    images_per_second: float  # median over batches
    spread: float  # interquartile range of that rate over its median
    speedup: float
    peak_mib: float  # activations of one batch
    peak_late_mib: float  # the same from the fourth block on

    @property
    def mean_tokens(self) -> float:
        """Tokens that attention or MLP sees, on average over the blocks."""
        return statistics.mean(self.tokens)


class Progress:
    """One line on stderr that says what goes on; on something that is no terminal, a line every few seconds."""

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.start = time.perf_counter()
        self.shown = -math.inf

    def __call__(self, text: str) -> None:
        """Show ``text``."""
        now = time.perf_counter()
        if now - self.shown < (0.1 if self.tty else 5.0):
            return
        self.shown = now
        print(f"\r\033[K{text}" if self.tty else text, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Clear the line."""
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def configurations() -> dict[tuple[str, str], Reducer | None]:
    """Return the reducers of the table by method and budget; None is the whole model."""
    rows: dict[tuple[str, str], Reducer | None] = {("all tokens", ""): None}
    rows |= {("pruning (fastervlm)", f"keep {k} of 256"): Prune(k) for k in KEEPS}
    rows |= {("merging (tome)", f"r = {r} per block"): Merge(r) for r in MERGES}
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries print to stderr: torch's profiler says when it starts and stops, each time."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def count_tokens(model: DigitsViT, images: Tensor, reducer: Reducer | None) -> list[int]:
    """Return how many tokens per image enter attention and MLP of each block, counted at their first linear layer."""
    counts: list[int] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            for layer in (block.qkv, block.fc1):
                hook = layer.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
                hooks.callback(hook.remove)
        model(images, reducer)
    return counts


def peak_bytes(model: DigitsViT, images: Tensor, reducer: Reducer | None, device: str) -> tuple[int, int]:
    """Return the most bytes that torch held for activations in one pass, and the most in its second half.

    On CUDA by the caching allocator's statistics, on the CPU by the profiler's record of every allocation and release
    through torch's allocator. Weights and images are there before and do not count; nor do stacks and the scratch that
    kernels take from malloc.
    """
    half = len(model.blocks) // 2
    if device == "cuda":
        peaks: list[int] = []
        before = torch.cuda.memory_allocated()

        def note(*_: Any) -> None:
            peaks.append(torch.cuda.max_memory_allocated() - before)
            torch.cuda.reset_peak_memory_stats()

        torch.cuda.reset_peak_memory_stats()
        hook = model.blocks[half].norm1.register_forward_pre_hook(note)
        model(images, reducer)
        note()
        hook.remove()
        return max(peaks), peaks[1]

    def mark(*_: Any) -> None:
        with record_function("second half"):
            pass

    hook = model.blocks[half].norm1.register_forward_pre_hook(mark)
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(images, reducer)
    hook.remove()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    start = next(e["ts"] for e in events if e.get("name") == "second half")
    held = peak = late = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
        late = max(late, held) if event["ts"] >= start else held
    return peak, late


def run_table(
    model: DigitsViT, images: Tensor, labels: Tensor, device: str, seconds: float, progress: Progress
) -> list[Row]:
    """Measure all configurations on the images; ``seconds`` is aimed at for the timing.

    The configurations take turns batch by batch, forwards and backwards, so that whatever else the machine does meets
    all of them alike. The first round counts wrong answers and, as the warm-up, no time.
    """
    reducers = configurations()
    batches = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE)))
    wrong = dict.fromkeys(reducers, 0)
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in reducers}
    start = time.perf_counter()
    rounds, round_idx = 1, 0
    while round_idx <= rounds:
        for batch_idx, (batch, truth) in enumerate(batches):
            order = list(reducers.items())
            for key, reducer in order if batch_idx % 2 == 0 else reversed(order):
                progress(f"digits, pass {round_idx + 1} of {rounds + 1}, batch {batch_idx + 1} of {len(batches)}")
                synchronize(device)
                begin = time.perf_counter()
                logits = model(batch, reducer)
                synchronize(device)
                rates[key].append(len(batch) / (time.perf_counter() - begin))
                if round_idx == 0:
                    wrong[key] += int((logits.argmax(dim=1) != truth).sum())
        if round_idx == 0:
            for rate in rates.values():
                rate.clear()
            rounds = max(1, min(20, round(seconds / (time.perf_counter() - start))))
        round_idx += 1

    rows = []
    whole = statistics.median(rates["all tokens", ""])
    for key, reducer in configurations().items():  # new ones: a reducer's last index lists would count as memory freed
        progress(f"digits, memory of {' '.join(key).strip()}")
        median = statistics.median(rates[key])
        low, _, high = statistics.quantiles(rates[key]) if len(rates[key]) > 1 else (median,) * 3
        peak, late = peak_bytes(model, batches[0][0], reducer, device)
        rows.append(
            Row(
                method=key[0],
                budget=key[1],
                tokens=count_tokens(model, batches[0][0][:1], reducer),
                num_images=len(labels),
                num_wrong=wrong[key],
                images_per_second=median,
                spread=(high - low) / median,
                speedup=median / whole,
                peak_mib=peak / 2**20,
                peak_late_mib=late / 2**20,
            )
        )
    return rows


HEADER = (
    "method",
    "budget",
    "tokens per block",
    "at the end",
    "accuracy",
    "wrong",
    "images/s",
    "speed-up",
    "peak MiB",
    "blocks 4-6",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return the row's columns as text, as `HEADER` names them."""
    return (
        row.method,
        row.budget or "-",
        f"{row.mean_tokens:.0f}",
        f"{row.tokens[-1]}",
        f"{100 * (1 - row.num_wrong / row.num_images):.1f}%",
        f"{row.num_wrong} of {row.num_images}",
        f"{row.images_per_second:.0f}",
        f"{row.speedup:.2f}x",
        f"{row.peak_mib:.1f}",
        f"{row.peak_late_mib:.1f}",
    )


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Return the table, columns aligned, and the notes under it."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    align: list[Callable[[str, int], str]] = [str.ljust, str.ljust, *[str.rjust] * (len(HEADER) - 2)]
    text = ["| " + " | ".join(f(c, w) for f, c, w in zip(align, line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if f is str.ljust else ":") for f, w in zip(align, widths)) + "|"
    return "\n".join([text[0], rule, *text[1:], "", *notes]) + "\n"


def table_notes(rows: Sequence[Row], device: str, dtype: str, facts: dict[str, Any]) -> list[str]:
    """Return what the table's numbers mean."""
    where = facts["gpu"] if device == "cuda" else f"{facts['cpu']}, {facts['cores']} thread(s)"
    counted = "the CUDA allocator's peak" if device == "cuda" else "the peak of what torch allocated"
    notes = [
        f"- Speed: {where}; torch {facts['torch']}, {dtype}, batches of {BATCH_SIZE}, median over batches, the rows "
        "taking turns.",
        "- Tokens per block: mean over the attention and the MLP of all blocks, CLS included. "
        f"Pruning happens in block {PRUNE_LAYER + 1} of 6, merging in every block.",
        f"- Peak MiB: {counted} for the activations of one batch, in a whole pass and in blocks 4 to 6. "
        "All rows run the first block's attention on all tokens.",
        "- The model was trained to stand missing patches: for most epochs it saw 48 random ones of each image.",
    ]
    spread = max(row.spread for row in rows)
    if spread > NOISY:
        notes.append(f"- The machine was busy: half of a row's batches differ by up to {100 * spread:.0f}% in speed.")
    return notes


def draw_digits(path: Path, model: DigitsViT, images: Tensor, labels: Tensor) -> None:
    """Draw which patches of some digits were kept and how they were merged."""
    chosen = [int((labels == digit).nonzero()[0]) for digit in PICTURED]
    shown = images[chosen]
    kept, merged = [], []
    for num_kept in KEEPS:
        prune = Prune(num_kept)
        model(shown, prune)
        assert prune.kept_idx is not None
        kept.append((f"{num_kept} of 256\nkept", prune.kept_idx.cpu().numpy()))
    merge = Merge(MERGES[0])
    model(shown, merge)
    for num_blocks in (2, 4, 6):
        dst_idx = merge.dst_idx[num_blocks - 1]
        label = f"merged to {int(dst_idx.max())}\n({num_blocks} blocks)"
        merged.append((label, dst_idx[:, 1:].cpu().numpy()))
    caption = (
        f"Kept: the patches that the model's own CLS token attends to most in block {PRUNE_LAYER + 1} of 6 "
        "(tokred.prune_topk).\n"
        f"Merged: the {MERGES[0]} most similar tokens per block (tokred.bipartite_match, tokred.segment_merge); "
        "each group in its mean shade."
    )
    _figures.digits(path, shown[:, 0].float().cpu().numpy(), kept, merged, caption)


def draw_photo(path: Path, device: str, dtype: torch.dtype) -> None:
    """Draw a photograph pruned and merged at ViT-L/14 sizes. No pretrained weights: its pixels are its tokens."""
    from skimage import data, transform

    photo = data.rocket()
    left = (photo.shape[1] - photo.shape[0]) // 2
    square = photo[:, left : left + photo.shape[0]]
    pixels = transform.resize(square, (PHOTO_SIZE, PHOTO_SIZE), anti_aliasing=True).astype("float32").clip(0, 1)
    patch = PHOTO_SIZE // PHOTO_GRID
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, 336, 336]
    patches = F.unfold(image, patch, stride=patch).transpose(1, 2)  # [1, 576, 588]
    mean, std = patches.mean(), patches.std()
    position = digits_vit.sincos_position(PHOTO_GRID, PHOTO_DIM - patches.shape[2])
    # 588 pixel values and 436 of position make the 1,024 channels of ViT-L.
    x = torch.cat([(patches - mean) / std, position[None]], dim=2).to(device, dtype)
    score = patches.unflatten(2, (3, -1)).std(dim=3).mean(dim=2).to(device)  # local contrast

    panels: list[tuple[str, Any, Any]] = [(f"{PHOTO_GRID**2} patches", pixels, None)]
    for num_kept in PHOTO_KEEPS:
        _, kept_idx = tokred.prune_topk(x, score, num_kept)
        kept = kept_idx[0].cpu().numpy()
        panels.append((f"{num_kept} kept", *_figures.fade(pixels, kept, PHOTO_GRID)))

    merged, size, dst_idx = x, None, torch.arange(x.shape[1], device=device)[None]
    for _ in range(PHOTO_LAYERS):
        reduced = tome(merged, merged[:, None], r=PHOTO_R, size=size, num_protected=0)
        assert reduced.dst_idx is not None
        merged, size, dst_idx = reduced.x, reduced.size, reduced.dst_idx.gather(1, dst_idx)
    expanded = tokred.segment_expand(merged, dst_idx)[..., : patches.shape[2]].float().cpu() * std + mean
    back = F.fold(expanded.transpose(1, 2), PHOTO_SIZE, patch, stride=patch)[0].permute(1, 2, 0).clamp(0, 1)
    group = dst_idx[0].cpu().numpy().reshape(PHOTO_GRID, PHOTO_GRID)
    panels.append((f"merged to {merged.shape[1]}", back.numpy(), group))
    caption = (
        f"{PHOTO_SIZE} x {PHOTO_SIZE} pixels cut as for ViT-L/14. No pretrained weights: patches are scored by their "
        "local contrast and\ncompared by pixels and position. "
        f"Merged: r = {PHOTO_R} in each of {PHOTO_LAYERS} rounds, then tokred.segment_expand. Photo: SpaceX, public domain."
    )
    _figures.photo(path, panels, caption)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Prune and merge the tokens of a real vision transformer.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=None, help="CPU threads, torch's default unless given")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the table and the pictures")
    parser.add_argument("--smoke", action="store_true", help="table only, on 40 images, timed once")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("demo: --device cuda, but torch sees no CUDA device (python -m tokred doctor says more)", file=sys.stderr)
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    progress = Progress()

    progress("the model and the digits")
    dtype = getattr(torch, options.dtype)
    model = digits_vit.load().to(options.device, dtype)
    data = digits_vit.load_digits()
    num_images = 40 if options.smoke else len(data.test_labels)
    images = digits_vit.enlarge(data.test_scans[:num_images]).to(options.device, dtype)
    labels = data.test_labels[:num_images].to(options.device)
    print(
        f"{num_images} held-out handwritten digits, {images.shape[-1]} x {images.shape[-1]} pixels, 256 patches and CLS;"
        f" a {len(model.blocks)}-block transformer of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    )
    rows = run_table(model, images, labels, options.device, 0.0 if options.smoke else 20.0, progress)
    facts = machine.facts(options.device)
    text = markdown(rows, table_notes(rows, options.device, options.dtype, facts))
    (options.out / "digits.md").write_text(text)
    content = {
        "schema": SCHEMA,
        "facts": facts,
        "device": options.device,
        "dtype": options.dtype,
        "batch_size": BATCH_SIZE,
        "prune_layer": PRUNE_LAYER,
        "rows": [asdict(row) | {"mean_tokens": row.mean_tokens} for row in rows],
    }
    (options.out / "digits.json").write_text(json.dumps(content, indent=1) + "\n")

    if not options.smoke:
        progress("pictures")
        draw_digits(options.out / "digits.png", model, images, labels)
        draw_photo(options.out / "photo.png", options.device, dtype)
    progress.done()
    print(f"\n{text}")
    written = ("digits.md", "digits.json") + (() if options.smoke else ("digits.png", "photo.png"))
    print(f"tokred {tokred.__version__} in {time.perf_counter() - progress.start:.0f} s. Written:")
    for name in written:
        print(f"  {options.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
