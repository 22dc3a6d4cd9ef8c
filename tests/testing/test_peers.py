# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The adapters of libraries that need a GPU run here on stand-ins with the documented signatures: what is tested is how
inputs are laid out for the library and its output read, not the library."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import tokred
from tokred import _registry
from tokred.testing import assert_close
from tokred.testing.peers import NotApplicable, load_file

ROOT = Path(tokred.__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"


class BatchDecode:
    """FlashInfer's decode over pages, as its documentation states it; pages of one token."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        q_data_type,
        kv_data_type,
    ):
        assert page_size == 1 and (last_page_len == 1).all()
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert q_data_type == kv_data_type
        self.indptr, self.indices, self.heads = indptr.tolist(), indices.long(), (num_qo_heads, num_kv_heads, head_dim)

    def run(self, q, paged_kv_cache):
        k_cache, v_cache = paged_kv_cache  # [num_pages, page_size, num_kv_heads, head_dim]
        assert q.shape[1:] == (self.heads[0], self.heads[2]) and k_cache.shape[1:] == (1, *self.heads[1:])
        out = torch.empty_like(q)
        for i, (begin, end) in enumerate(zip(self.indptr[:-1], self.indptr[1:])):
            pages = self.indices[begin:end]
            k, v = k_cache[pages, 0, 0], v_cache[pages, 0, 0]
            out[i] = (q[i].float() @ k.float().T * q.shape[2] ** -0.5).softmax(-1) @ v.float()
        return out


def memory_efficient_attention_forward(query, key, value):
    """xformers' layout with grouped heads: [batch, tokens, groups, heads per group, head_dim]."""
    assert query.dim() == key.dim() == 5 and query.shape[2:4] == key.shape[2:4] and key.shape == value.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).float() for x in (query, key, value))
    out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out.permute(0, 3, 1, 2, 4).to(query.dtype)


@pytest.fixture
def stubs(monkeypatch):
    def module(name, **content):
        made = ModuleType(name)
        made.__dict__.update({"__version__": "0", **content})
        monkeypatch.setitem(sys.modules, name, made)

    module(
        "flashinfer",
        top_k=lambda input, k: torch.topk(input, k, sorted=False),
        BatchDecodeWithPagedKVCacheWrapper=BatchDecode,
    )
    fmha = SimpleNamespace(memory_efficient_attention_forward=memory_efficient_attention_forward)
    module("xformers.ops", fmha=fmha)
    module("xformers", ops=sys.modules["xformers.ops"])

    def flash_colreduce(query, key, reduction, is_causal=False, scale=None):
        assert reduction == "sum" and query.shape[1] == key.shape[1]
        return (query.float() @ key.float().mT * query.shape[-1] ** -0.5).softmax(-1).sum(-2)

    module("flash_colreduce", flash_colreduce=flash_colreduce)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=lambda: 1), ExternalStream=lambda pointer: contextlib.nullcontext()
    )
    names = ("sort", "argpartition", "from_dlpack")
    module("cupy", cuda=cuda, **{name: getattr(np, name) for name in names})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


def tiny_cases(op):
    (path,) = (ROOT / "benchmarks").glob(f"*/bench_{op}.py")
    return load_file(path).cases("cpu", True)


def agrees(peer, case):
    """Whether a peer did the case; its output is compared with the reference."""
    inputs = case.make(0)
    try:
        prepared = peer.prepare(*inputs)
    except NotApplicable:
        return False
    args, kwargs = case.call(*inputs)
    op = _registry.op(case.op)
    expected = case.compare(
        (case.reference or op.module.reference)(*inputs if case.reference else args, **kwargs), *inputs
    )
    rtol, atol = case.tolerance or op.tolerance(getattr(torch, case.dtype))
    out = case.compare(peer.finish(peer.run(*prepared)), *inputs)
    assert_close(out, expected, rtol=rtol, atol=atol, name=f"{case.op} {case.name} {case.dtype}")
    return True


@pytest.mark.parametrize(
    ("name", "op", "applies"),
    [
        ("flashinfer", "prune_topk", 4),
        ("flashinfer", "attend_selected", 1),  # bfloat16 only
        ("xformers", "attend_selected", 2),
        ("flash_colreduce", "attn_received", 0),  # the tiny cases have grouped heads; see below
        ("cupy", "prune_topk", 4),
        ("cupy", "gather_tokens", 2),  # not the lists per head
    ],
)
def test_adapters_on_stand_ins(stubs, name, op, applies):
    module = load_file(PEERS / f"{name}.py")
    assert module.DEVICES == ("cuda",)
    cases = [c for c in tiny_cases(op) if name in c.peers or name == "cupy"]
    assert sum(agrees(module.OPS[op], case) for case in cases) == applies


def test_flash_colreduce_on_equal_heads(stubs):
    peer = load_file(PEERS / "flash_colreduce.py").OPS["attn_received"]
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 9, 16)
    expected, _ = _registry.op("attn_received").module.reference(q, k)
    assert_close(peer.finish(peer.run(*peer.prepare(q, k)))[0], expected)


def test_several_rows_and_groups(stubs):
    """Batches and groups that the tiny cases do not have together."""
    decode = load_file(PEERS / "flashinfer.py").OPS["attend_selected"]
    grouped = load_file(PEERS / "xformers.py").OPS["attend_selected"]
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 20, 8), torch.randn(3, 2, 20, 8)
    kept_idx = torch.rand(3, 2, 20).argsort()[..., :7].contiguous()
    expected = _registry.op("attend_selected").module.reference(q, k, v, kept_idx)
    assert_close(grouped.run(*grouped.prepare(q, k, v, kept_idx)), expected, rtol=1e-4, atol=1e-5)
    half = [t.to(torch.bfloat16) for t in (q, k, v)]
    assert_close(decode.run(*decode.prepare(*half, kept_idx)), expected, rtol=3e-2, atol=3e-2)
    select = load_file(PEERS / "flashinfer.py").OPS["prune_topk"]
    x, score = torch.randn(3, 20, 4), torch.randn(3, 20)
    assert_close(select.run(x, score, 5), tokred.prune_topk(x, score, 5))


@pytest.mark.parametrize(
    ("name", "op", "applies"),
    [("numpy", "prune_topk", 4), ("numpy", "gather_tokens", 4), ("tomesd", "bipartite_match", 2)],
)
def test_adapters_that_run_here(name, op, applies):
    pytest.importorskip(name)
    module = load_file(PEERS / f"{name}.py")
    assert "cpu" in module.DEVICES and module.VERSION
    assert sum(agrees(module.OPS[op], case) for case in tiny_cases(op)) == applies


def test_numpy_rows_of_a_batch():
    pytest.importorskip("numpy")
    peer = load_file(PEERS / "numpy.py").OPS["prune_topk"]
    x, score = torch.randn(3, 20, 4).to(torch.bfloat16), torch.randn(3, 20)
    assert_close(peer.finish(peer.run(*peer.prepare(x, score, 5))), tokred.prune_topk(x, score, 5))


def test_plug_ins_are_asked_for_and_never_names_of_nothing():
    files = {path.stem for path in PEERS.glob("*.py")}
    asked = {
        name
        for path in (ROOT / "benchmarks").glob("*/bench_*.py")
        for device in ("cpu", "cuda")
        for smoke in (True, False)
        for case in load_file(path).cases(device, smoke)
        for name in case.peers
    }
    assert asked == files


def test_cub_driver_compiles(tmp_path):
    """The driver needs a CUB that is newer than most toolkits' own; nothing runs here."""
    source = (PEERS / "cub.py").read_text().split("\n_include = find_include()")[0]
    (tmp_path / "cub_parts.py").write_text(source)
    parts = load_file(tmp_path / "cub_parts.py")
    try:
        include = parts.find_include()
    except ImportError as error:
        pytest.skip(str(error))  # a peer is optional, and so is the CUB that it is built with
    assert shutil.which("nvcc")
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "--ptx", f"-I{include}", "-o", str(tmp_path / "t.ptx")]
    done = subprocess.run([*command, str(PEERS / "cub_topk.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
