# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Draws what demo.py computed; here are no tokred ops and no decisions, only ink."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]

TEXT, QUIET, LINE = "#1f2a37", "#5b6675", "#d9822b"
INK = LinearSegmentedColormap.from_list("ink", ["#f3f5f8", "#1b2a41"])  # 0 is paper
DROPPED = np.array([1.0, 1.0, 1.0])  # what dropped patches fade to
STYLE = {"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": TEXT, "axes.titlecolor": TEXT}
DPI = 160  # figures are 9 inches wide: sharp at 900 pixels and on dense screens


def fade(image: Floats, kept_idx: Ints, grid_size: int, strength: float = 0.86) -> tuple[Floats, Ints]:
    """Return ``image``, ``[height, width, 3]``, with all patches but the kept ones faded, and 1 for kept, 0 for dropped."""
    patch = image.shape[0] // grid_size
    kept = np.zeros(grid_size * grid_size, dtype=np.int64)
    kept[kept_idx] = 1
    group = kept.reshape(grid_size, grid_size)
    mask = group.repeat(patch, 0).repeat(patch, 1)[..., None] > 0
    return np.where(mask, image, image * (1 - strength) + DROPPED * strength), group


def borders(group: Ints, size: float) -> list[list[tuple[float, float]]]:
    """Return the line segments between different neighbours of ``group``, ``[grid, grid]``, ``size`` units a patch."""
    lines = []
    for row, col in zip(*np.nonzero(group[:, 1:] != group[:, :-1])):
        lines.append([((col + 1) * size, row * size), ((col + 1) * size, (row + 1) * size)])
    for row, col in zip(*np.nonzero(group[1:] != group[:-1])):
        lines.append([(col * size, (row + 1) * size), ((col + 1) * size, (row + 1) * size)])
    return lines


def show(axes: Axes, image: Floats, group: Ints | None = None, color: str = LINE, width: float = 0.6) -> None:
    """Draw ``image`` without axes and, given ``group`` (``[grid, grid]``), the borders of its regions."""
    height, breadth = image.shape[:2]
    axes.imshow(image, extent=(0, breadth, height, 0), interpolation="nearest")
    if group is not None:
        axes.add_collection(LineCollection(borders(group, height / len(group)), colors=color, linewidths=width))
    axes.set(xticks=[], yticks=[], xlim=(0, breadth), ylim=(height, 0))
    for spine in axes.spines.values():
        spine.set(color="#c3cad4", linewidth=0.7)


def save(figure: Figure, path: Path, num_colors: int = 256) -> None:
    """Write the figure as a PNG with a palette, a third of the size for colours nobody can tell apart."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    image = Image.open(buffer).convert("RGB")
    image.quantize(num_colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG).save(
        path, optimize=True
    )


def mean_of_groups(image: Floats, group: Ints) -> Floats:
    """Return ``image``, ``[height, width]``, with each region of ``group``, ``[grid, grid]``, in its mean."""
    patch = image.shape[0] // len(group)
    fine = group.repeat(patch, 0).repeat(patch, 1)
    total, count = np.bincount(fine.ravel(), image.ravel()), np.bincount(fine.ravel())
    return (total / np.maximum(count, 1))[fine]


def digits(
    path: Path,
    images: Floats,
    kept: Sequence[tuple[str, Ints]],
    merged: Sequence[tuple[str, Ints]],
    caption: str,
) -> None:
    """Draw digits in columns: as they are, the patches kept, the patches merged.

    Args:
        path: The PNG.
        images: ``[num_images, height, width]`` in [0, 1].
        kept: Rows: label and kept patches, ``[num_images, num_kept]``.
        merged: Rows: label and group of each patch, ``[num_images, num_patches]``.
        caption: Text under the picture.
    """
    num_rows = 1 + len(kept) + len(merged)
    grid_size = round(merged[0][1].shape[1] ** 0.5)
    with matplotlib.rc_context(STYLE):
        cell, left, bottom, top = 0.98, 1.16, 0.50, 0.04
        width, height = left + cell * len(images), top + bottom + cell * num_rows
        figure = Figure(figsize=(width, height))
        colored = INK(images)[..., :3]
        rows: list[tuple[str, list[Any]]] = [("held-out\ndigits", [(image, None) for image in colored])]
        for label, kept_idx in kept:
            rows.append((label, [fade(image, idx, grid_size) for image, idx in zip(colored, kept_idx)]))
        for label, groups in merged:
            squares = groups.reshape(-1, grid_size, grid_size)
            rows.append((label, [(INK(mean_of_groups(i, g))[..., :3], g) for i, g in zip(images, squares)]))
        for row_idx, (label, row) in enumerate(rows):
            y = height - top - cell * (row_idx + 1)
            figure.text((left - 0.1) / width, (y + cell / 2) / height, label, ha="right", va="center", linespacing=1.35)
            for col_idx, (image, squares_of) in enumerate(row):
                box = (left + cell * col_idx + 0.03, y + 0.03, cell - 0.06, cell - 0.06)
                axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
                show(axes, image, squares_of, width=0.6 if row_idx <= len(kept) else 0.4)
        figure.text(0.5, 0.20 / height, caption, ha="center", va="center", color=QUIET, fontsize=8.5, linespacing=1.4)
        save(figure, path, num_colors=64)


def photo(path: Path, panels: Sequence[tuple[str, Floats, Ints | None]], caption: str) -> None:
    """Draw images beside each other.

    Args:
        path: The PNG.
        panels: Title, image ``[height, width, 3]`` in [0, 1], and the group of each patch, ``[grid, grid]``, or None.
        caption: Text under the picture.
    """
    with matplotlib.rc_context(STYLE):
        cell, bottom, top = 2.25, 0.50, 0.27
        width, height = cell * len(panels), top + bottom + cell
        figure = Figure(figsize=(width, height))
        for idx, (title, image, group) in enumerate(panels):
            axes = figure.add_axes(
                ((cell * idx + 0.03) / width, (bottom + 0.03) / height, (cell - 0.06) / width, (cell - 0.06) / height)
            )
            show(axes, image, group)
            axes.set_title(title, fontsize=9.5, pad=5)
        figure.text(0.5, 0.23 / height, caption, ha="center", va="center", color=QUIET, fontsize=8.5, linespacing=1.4)
        save(figure, path)
