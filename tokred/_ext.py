# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Loads the compiled library, or says plainly why it could not."""

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
#: The library that is loaded. TOKRED_LIBRARY names another one (the tests' emulator), read once, here.
LIBRARY = Path(os.environ.get("TOKRED_LIBRARY") or _HERE / "libtokred.so")


def load() -> None:
    """Load the library, which registers ``torch.ops.tokred``."""
    version = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"tokred: expected torch >= 2.10, got {torch.__version__}")
    if not LIBRARY.exists():
        raise ImportError(
            f"tokred: {LIBRARY.name} is not in {LIBRARY.parent}. In a checkout, build it with "
            "`pip install --no-build-isolation -e .`, and start Python outside of the checkout if tokred was installed."
        )
    try:
        ctypes.CDLL(str(LIBRARY))  # reports what is missing; torch's own message hides it
    except OSError as error:
        raise ImportError(f"tokred: {LIBRARY.name} does not load beside torch {torch.__version__}: {error}") from error
    torch.ops.load_library(str(LIBRARY))


def build_info() -> dict[str, Any]:
    """Return what the build wrote about itself: version, CUDA release, architectures, compiler."""
    path = LIBRARY.parent / "build_info.json"
    info: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return info


load()
