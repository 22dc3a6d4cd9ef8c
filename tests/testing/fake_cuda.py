# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""A stand-in for ``torch.cuda`` on the CPU: a graph records the ops of its capture and runs them again into their outputs."""

import contextlib
import itertools
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokred.testing.timing import tensors

SYNCHRONIZING = (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)


class _Watch(TorchDispatchMode):
    """Sees every op: counts bytes, refuses to wait where that is an error, records a capture."""

    def __init__(self, api):
        super().__init__()
        self.api = api

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        api = self.api
        if func in SYNCHRONIZING and api.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if func in SYNCHRONIZING and api.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        if api.capturing is not None:
            api.capturing.append((func, args, kwargs or {}, out))
        for t in tensors(out):
            if t._base is None:
                api.allocated += t.nbytes
                api.peak = max(api.peak, api.allocated)
        return out


class FakeGraph:
    def __init__(self, api):
        self.api, self.ops = api, None

    def replay(self):
        assert self.ops is not None, "replay of a graph that was not captured"
        self.api.log.append("replay")
        for func, args, kwargs, out in self.ops:
            for target, value in zip(tensors(out), tensors(func(*args, **kwargs))):
                if target.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    target.copy_(value)


class FakeCuda:
    """What CudaTimer asks of torch.cuda. ``refuse`` makes the next capture fail as it ends, as a driver does."""

    def __init__(self):
        self.log, self.capturing, self.sync_mode, self.refuse = [], None, "default", False
        self.allocated = self.peak = 0
        self.default = SimpleNamespace(name="default", wait_stream=lambda other: self.log.append("wait"))
        self.current = self.default
        self._clock = itertools.count()

    def watch(self):
        return _Watch(self)

    def Stream(self):
        return SimpleNamespace(name="side", wait_stream=lambda other: self.log.append("wait"))

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def CUDAGraph(self):
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        before, self.current = self.current, stream  # as torch: put back only when the capture succeeds
        self.capturing = []
        try:
            yield
        finally:
            captured, self.capturing = self.capturing, None
        if self.refuse:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")
        graph.ops, self.current = captured, before

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None, synchronize=lambda: self.log.append("wait for event"))

        def record():
            event.at = next(self._clock)
            self.log.append("record")

        event.record = record
        event.elapsed_time = lambda other: 8.0 * (other.at - event.at)  # milliseconds
        return event

    def set_sync_debug_mode(self, mode):
        self.sync_mode = mode

    def synchronize(self):
        self.log.append("synchronize")

    def current_device(self):
        return 0

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=1000)

    def mem_get_info(self):
        return 4 << 20, 8 << 20  # free, total

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.allocated
