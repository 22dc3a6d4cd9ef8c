# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Train the model of `digits_vit.py` on 1,200 scans, check it on 200 more, and measure it on 397 that it never saw.

    python examples/train_digits.py --epochs 120 --seed 0 --out examples

Most epochs show each image as 48 random patches of its 256, which costs a fifth of the time and teaches the model to do
without the rest; the last epochs show all patches, and drop by CLS attention after a random draw of how many to keep.

The hyper-parameters were checked with ``--tune``, on the 200 validation scans. The 397 held-out scans are looked at
once, by the stored float16 weights at the end of the fixed schedule: neither an epoch nor a setting is picked by them.
Two runs agree if seed, number of threads, torch version and kind of CPU do.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import digits_vit
import torch
import torch.nn.functional as F
from torch import Tensor

PRUNED_COUNTS = (128, 64, 48, 32, 16)


@dataclass(frozen=True)
class Hyper:
    """What was chosen by hand."""

    batch_size: int = 100
    lr: float = 1.0e-3
    weight_decay: float = 0.05  # of matrices and kernels only
    warmup_share: float = 0.05  # of all steps; then a cosine to zero
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.1
    ema_decay: float = 0.995  # of the weights, per step: about the last 14 epochs
    sparse_share: float = 0.88  # of all epochs, with random patches only
    sparse_num_patches: int = 48


HYPER = Hyper()


def augment(scans: Tensor, generator: torch.Generator) -> Tensor:
    """Return enlarged, randomly distorted scans, ``[batch, 1, 64, 64]``.

    Args:
        scans: ``[batch, 1, 8, 8]`` in [0, 1].
        generator: Where all randomness comes from.
    """
    batch_size, size = len(scans), digits_vit.IMAGE_SIZE

    def uniform(*shape: int, bound: float) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    angle, shear = uniform(batch_size, bound=0.26), uniform(batch_size, bound=0.25)
    scale_x, scale_y = uniform(2, batch_size, bound=0.15).exp()
    cos, sin = angle.cos(), angle.sin()
    column_x = torch.stack([cos, sin], dim=1) * scale_x[:, None]
    column_y = torch.stack([shear * cos - sin, shear * sin + cos], dim=1) * scale_y[:, None]
    shift = uniform(batch_size, 2, bound=0.15)
    theta = torch.stack([column_x, column_y, shift], dim=2)  # rotation * shear * scale, and a shift
    grid = F.affine_grid(theta, [batch_size, 1, size, size], align_corners=False)

    bend = torch.randn(batch_size, 2, 5, 5, generator=generator) * 0.04
    grid = grid + F.interpolate(bend, size=(size, size), mode="bicubic").permute(0, 2, 3, 1)
    images = F.grid_sample(F.pad(scans, [digits_vit.MARGIN] * 4), grid, mode="bicubic", align_corners=False).clamp(0, 1)

    images = images ** uniform(batch_size, 1, 1, 1, bound=0.4).exp()  # thinner or fatter strokes
    pixel = torch.arange(size)
    center = torch.rand(2, batch_size, 1, generator=generator) * size
    half_side = 4 + uniform(2, batch_size, 1, bound=4).abs()
    in_y, in_x = (pixel - center).abs() < half_side
    is_hit = torch.rand(batch_size, 1, 1, generator=generator) < 0.5
    images = images.masked_fill((in_y[:, :, None] & in_x[:, None, :] & is_hit)[:, None], 0)
    return images + 0.05 * torch.randn(images.shape, generator=generator)


def keep_random(x: Tensor, num_patches: int, generator: torch.Generator) -> Tensor:
    """Return CLS and ``num_patches`` patches of each row of ``x``, ``[batch, num_tokens, dim]``, chosen at random."""
    chosen = torch.rand(x.shape[0], x.shape[1] - 1, generator=generator).topk(num_patches).indices + 1
    return torch.cat([x[:, :1], x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[-1]))], dim=1)


@torch.inference_mode()
def count_wrong(
    model: digits_vit.DigitsViT, scans: Tensor, labels: Tensor, reducer: digits_vit.Reducer | None = None
) -> int:
    """Return how many scans the model gets wrong."""
    wrong = 0
    for scan, label in zip(scans.split(100), labels.split(100), strict=True):
        wrong += int((model(digits_vit.enlarge(scan), reducer).argmax(dim=1) != label).sum())
    return wrong


def measure(model: digits_vit.DigitsViT, scans: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the accuracy with all 256 patches, and with fewer kept by CLS attention in the third block."""
    wrong = {"256": count_wrong(model, scans, labels)}
    for num_kept in PRUNED_COUNTS:
        wrong[str(num_kept)] = count_wrong(model, scans, labels, digits_vit.ClsPruner(num_kept))
    return {
        "num_images": len(labels),
        "num_wrong_by_patches_kept": wrong,
        "accuracy_by_patches_kept": {num_kept: round(1 - count / len(labels), 4) for num_kept, count in wrong.items()},
    }


def learning_rate(step: int, num_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(HYPER.warmup_share * num_steps))
    if step < warmup:
        return HYPER.lr * (step + 1) / warmup
    return HYPER.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def train(
    scans: Tensor, labels: Tensor, *, num_epochs: int, seed: int
) -> tuple[digits_vit.DigitsViT, list[dict[str, float]]]:
    """Return the averaged model at the end of the schedule, and loss and accuracy on what it was shown, per epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = digits_vit.DigitsViT()
    ema = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": HYPER.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    )
    batch_size = HYPER.batch_size
    steps_per_epoch = len(scans) // batch_size
    num_steps = num_epochs * steps_per_epoch
    num_sparse = round(HYPER.sparse_share * num_epochs)
    cost = [1.0] * num_sparse + [3.5] * (num_epochs - num_sparse)  # of an epoch, about; for the time left
    step, log, started = 0, [], time.perf_counter()
    for epoch in range(num_epochs):
        loss_sum, num_right = 0.0, 0
        order = torch.randperm(len(scans), generator=generator)[: steps_per_epoch * batch_size]
        for batch_idx in order.split(batch_size):
            tokens = model.embed(augment(scans[batch_idx], generator))
            reducer = None
            if epoch < num_sparse:
                tokens = keep_random(tokens, HYPER.sparse_num_patches, generator)
            else:
                halvings = 4 * torch.rand((), generator=generator).item()  # 256 patches down to 16
                reducer = digits_vit.ClsPruner(round(256 * 0.5**halvings))
            logits = model.classify(tokens, reducer)
            loss = F.cross_entropy(logits, labels[batch_idx], label_smoothing=HYPER.label_smoothing)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), HYPER.max_grad_norm)
            optimizer.step()
            step += 1
            decay = min(HYPER.ema_decay, step / (step + 10))  # a short memory at first
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            loss_sum += loss.item() * batch_size
            num_right += int((logits.argmax(dim=1) == labels[batch_idx]).sum())
        log.append({"loss": round(loss_sum / len(order), 4), "accuracy": round(num_right / len(order), 4)})
        seconds = time.perf_counter() - started
        left = seconds * sum(cost[epoch + 1 :]) / sum(cost[: epoch + 1])
        print(
            f"epoch {epoch + 1}/{num_epochs}  loss {log[-1]['loss']:.3f}  accuracy {log[-1]['accuracy']:.3f}  "
            f"{seconds:.0f} s, {left:.0f} s left",
            flush=True,
        )
    return ema.eval(), log


def main() -> None:
    """Train, store the weights as float16 and write what they score beside them."""
    parser = argparse.ArgumentParser(description="Train the digits model.")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=digits_vit.CHECKPOINT.parent, help="folder of the .pt and .json")
    parser.add_argument("--num-val", type=int, default=200, help="training scans set aside for validation; may be 0")
    parser.add_argument("--tune", action="store_true", help="do not look at the held-out scans")
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    torch.use_deterministic_algorithms(True)

    data = digits_vit.load_digits()
    num_train = len(data.train_labels) - args.num_val
    scans, val_scans = data.train_scans[:num_train], data.train_scans[num_train:]
    labels, val_labels = data.train_labels[:num_train], data.train_labels[num_train:]
    started = time.perf_counter()
    model, log = train(scans, labels, num_epochs=args.epochs, seed=args.seed)
    seconds = time.perf_counter() - started

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / digits_vit.CHECKPOINT.name
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, checkpoint)
    stored = digits_vit.load(checkpoint)
    report: dict[str, Any] = {
        "held_out": None if args.tune else measure(stored, data.test_scans, data.test_labels),
        "validation": measure(stored, val_scans, val_labels) if args.num_val else None,
        "num_train": num_train,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
        "split_seed": digits_vit.SPLIT_SEED,
        "epochs": args.epochs,
        "num_threads": args.num_threads,
        "hyper": asdict(HYPER),
        "seconds": round(seconds),
        "torch": torch.__version__,
        "log": log,
    }
    checkpoint.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "log"}, indent=1))


if __name__ == "__main__":
    main()
