# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""CUB: DeviceTopK (AIR top-k, unsorted), then a sort of the indices and index_select.

A driver of a few lines is compiled by nvcc on first use, against the newest CCCL that is installed. Not run on a GPU yet.
"""

import ctypes
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from tokred.testing.peers import NotApplicable, Peer

DEVICES = ("cuda",)
_HEADER = "cub/device/device_topk.cuh"


def find_include() -> Path:
    """Return the folder that holds CUB with a top-k: the package nvidia-cuda-cccl, or the toolkit's own."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ImportError("no nvcc")
    toolkit = Path(nvcc).resolve().parents[1]
    installed = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/include/cccl")
    for folder in (*installed, toolkit / "include" / "cccl", toolkit / "include"):
        if (folder / _HEADER).exists():
            return folder
    raise ImportError(f"no CUB with {_HEADER} (CCCL 3.2 or newer: pip install nvidia-cuda-cccl)")


def version(include: Path) -> str:
    number = int(re.search(r"#define CUB_VERSION (\d+)", (include / "cub" / "version.cuh").read_text()).group(1))
    return f"{number // 100000}.{number // 100 % 1000}.{number % 100}"


def compile_driver(include: Path, arch: str) -> Path:
    """Build ``cub_topk.cu`` for one architecture, unless it is there."""
    source = Path(__file__).with_name("cub_topk.cu")
    target = Path(__file__).parents[2] / "build" / "peers" / f"cub_topk_{version(include)}_{arch}.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC", f"-I{include}"]
        done = subprocess.run([*command, "-o", str(target), str(source)], capture_output=True, text=True)
        if done.returncode:
            raise ImportError(f"nvcc failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    return target


def load() -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    library = ctypes.CDLL(str(compile_driver(_include, f"sm_{major}{minor}")))
    library.tokred_cub_topk.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        *([ctypes.c_void_p] * 3),
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return library


def topk(scratch: Tensor | None, num_bytes: ctypes.c_size_t, score: Tensor, keys: Tensor, idx: Tensor) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    pointers = [t.data_ptr() for t in (score, keys, idx)]
    start = None if scratch is None else scratch.data_ptr()
    error = _library.tokred_cub_topk(start, num_bytes, *pointers, score.numel(), idx.numel(), stream)
    if error:
        raise RuntimeError(f"cub::DeviceTopK returned CUDA error {error}")


def prepare_select(score: Tensor, k: int) -> tuple:
    if score.shape[0] != 1:
        raise NotApplicable("DeviceTopK takes one row")
    keys = torch.empty(k, device=score.device)
    idx = torch.empty(k, dtype=torch.int32, device=score.device)
    num_bytes = ctypes.c_size_t(0)
    topk(None, num_bytes, score, keys, idx)
    scratch = torch.empty(num_bytes.value, dtype=torch.uint8, device=score.device)
    return score, scratch, num_bytes, keys, idx


def select_topk(score, scratch, num_bytes, keys, idx):
    topk(scratch, num_bytes, score, keys, idx)
    return idx.long().sort().values[None]


def prepare_prune(x: Tensor, score: Tensor, k: int) -> tuple:
    return x, *prepare_select(score, k)


def prune_topk(x, *prepared):
    kept_idx = select_topk(*prepared)
    return x[0].index_select(0, kept_idx[0])[None], kept_idx


_include = find_include()
VERSION = version(_include)
_library = load()
OPS = {"prune_topk": Peer(prune_topk, prepare_prune), "select_topk": Peer(select_topk, prepare_select)}
