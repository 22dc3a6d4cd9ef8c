# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""A small vision transformer for scikit-learn's handwritten digits, with a place to reduce tokens in every block.

Plain PyTorch: the model knows nothing of tokred. `train_digits.py` made the checkpoint beside this file.

    model = digits_vit.load()
    data = digits_vit.load_digits()
    logits = model(digits_vit.enlarge(data.test_scans), reducer=None)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECKPOINT = Path(__file__).with_name("digits_vit.pt")
IMAGE_SIZE = 64  # pixels; a scan is 8 x 8, so the enlarged digit holds far more tokens than information
GRID_SIZE = 16  # patch tokens per side, 4 pixels each: 256 patches, and CLS in front makes 257 tokens
MARGIN = 1  # blank scan pixels put around a scan, whose strokes often touch its border
NUM_TRAIN, NUM_TEST = 1400, 397
SPLIT_SEED = 0


class Digits(NamedTuple):
    """The split: scans are ``[num_images, 1, 8, 8]`` float32 in [0, 1], labels ``[num_images]`` int64."""

    train_scans: Tensor
    train_labels: Tensor
    test_scans: Tensor
    test_labels: Tensor


class Reducer(Protocol):
    """What `DigitsViT.forward` calls in each block, between attention and MLP."""

    def __call__(
        self, layer_idx: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that go on and their sizes.

        Args:
            layer_idx: Which block, from 0.
            x: Tokens after attention and its residual, ``[batch, num_tokens, dim]``; token 0 is CLS.
            q: Queries of this block's attention, ``[batch, num_heads, num_tokens, head_dim]``, not yet scaled.
            k: Keys, same shape as ``q``.
            size: How many patches each token stands for, ``[batch, num_tokens]`` float32; None means one each.

        Returns:
            ``x`` with CLS still first and any number of tokens behind it, and ``size`` to match: a tensor makes
            attention from the next block on proportional (log size is added to the key's logit), None keeps it plain.
        """
        ...


class Block(nn.Module):
    """A pre-norm transformer block, callable in halves so that tokens can be reduced in between."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def attention(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x`` plus its attention, the queries and the keys (shapes as in `Reducer`)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = None if size is None else size.log().to(q.dtype)[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.proj(out.transpose(1, 2).flatten(2)), q, k

    def mlp(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its MLP."""
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsViT(nn.Module):
    """A ViT of 257 tokens: convolutional stem, fixed sine-cosine positions, CLS token, linear head on CLS."""

    position: Tensor  # [256, dim], not stored in checkpoints

    def __init__(self, dim: int = 128, depth: int = 6, num_heads: int = 4, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, dim // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, padding=1),
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("position", sincos_position(GRID_SIZE, dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens of ``images``, ``[batch, 1, 64, 64]``, as ``[batch, 257, dim]`` with CLS first."""
        patches = self.stem(images).flatten(2).transpose(1, 2) + self.position
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)

    def classify(self, x: Tensor, reducer: Reducer | None = None) -> Tensor:
        """Return the logits, ``[batch, 10]``, of tokens ``x``, ``[batch, num_tokens, dim]`` with CLS first."""
        size = None
        for layer_idx, block in enumerate(self.blocks):
            x, q, k = block.attention(x, size)
            if reducer is not None:
                x, size = reducer(layer_idx, x, q, k, size)
            x = block.mlp(x)
        return self.head(self.norm(x[:, 0]))

    def forward(self, images: Tensor, reducer: Reducer | None = None) -> Tensor:
        """Return the logits, ``[batch, 10]``, of ``images``, ``[batch, 1, 64, 64]``; ``reducer`` may drop tokens."""
        return self.classify(self.embed(images), reducer)


def sincos_position(grid_size: int, dim: int) -> Tensor:
    """Return positions of a square grid, ``[grid_size**2, dim]``: half of ``dim`` for rows, half for columns."""
    frequency = torch.exp(torch.arange(dim // 4) * (-math.log(100.0) / (dim // 4)))
    angle = torch.arange(grid_size)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, cols = axis[:, None].expand(-1, grid_size, -1), axis[None].expand(grid_size, -1, -1)
    return torch.cat([rows, cols], dim=-1).flatten(0, 1)


def cls_attention(q: Tensor, k: Tensor) -> Tensor:
    """Return how much CLS attends to each patch, ``[batch, num_patches]``: softmax over all keys, mean over heads."""
    logits = (q[:, :, :1] @ k.transpose(-1, -2)).squeeze(2) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1).mean(dim=1)[:, 1:]


class ClsPruner:
    """Keep, in one block, the ``num_kept`` patches that CLS attends to most, and CLS: plain-PyTorch FasterVLM."""

    def __init__(self, num_kept: int, layer_idx: int = 2) -> None:
        self.num_kept = num_kept
        self.layer_idx = layer_idx

    def __call__(
        self, layer_idx: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Reducer`."""
        if layer_idx != self.layer_idx:
            return x, size
        kept_idx = cls_attention(q, k).topk(self.num_kept).indices.sort().values + 1
        x_kept = x.gather(1, kept_idx[:, :, None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], x_kept], dim=1), size


def load_digits() -> Digits:
    """Load scikit-learn's 1,797 scans and split them, 1,400 to train and 397 held out, stratified by label.

    The split is random over scans, and the data does not say who wrote them: the same hands write on both sides.
    """
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import train_test_split

    bunch = load_scans()
    scans = torch.from_numpy(bunch.images).float()[:, None] / 16
    labels = torch.from_numpy(bunch.target).long()
    train_idx, test_idx = train_test_split(
        range(len(labels)), train_size=NUM_TRAIN, test_size=NUM_TEST, stratify=labels, random_state=SPLIT_SEED
    )
    return Digits(scans[train_idx], labels[train_idx], scans[test_idx], labels[test_idx])


def enlarge(scans: Tensor) -> Tensor:
    """Return ``scans``, ``[batch, 1, 8, 8]``, as images, ``[batch, 1, 64, 64]``, inside a blank margin."""
    padded = F.pad(scans, [MARGIN] * 4)
    return F.interpolate(padded, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)


def load(path: str | Path = CHECKPOINT) -> DigitsViT:
    """Return the model of a checkpoint, in float32 and in eval mode; stored weights may be float16."""
    model = DigitsViT()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
