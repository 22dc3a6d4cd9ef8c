# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import ctypes

import pytest
import torch

from tokred.testing import machine


def test_peak_counts_what_torch_does_not_see():
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def scratch():
        address = libc.malloc(24 << 20)
        libc.memset(address, 1, 24 << 20)
        libc.free(address)  # gone before the call returns

    slack = 2 << 20
    assert machine.peak_resident(lambda: None) < slack
    assert abs(machine.peak_resident(scratch) - (24 << 20)) < slack
    assert abs(machine.peak_resident(scratch) - (24 << 20)) < slack, "pages that were freed count again"
    assert abs(machine.peak_resident(lambda: torch.ones(4 << 20)) - (16 << 20)) < slack


def test_peak_is_unknown_where_the_system_does_not_say(monkeypatch):
    def missing(field):
        raise OSError(field)

    monkeypatch.setattr(machine, "_status", missing)
    assert machine.peak_resident(lambda: None) is None


def test_ceilings():
    threads = torch.get_num_threads()
    found = machine.measure_ceilings("cpu", 1, smoke=True)
    assert torch.get_num_threads() == threads
    assert found.copy > 0 and found.matrix["bfloat16"] >= found.matrix["float32"] > 0 and found.sm_clock_mhz is None


def test_floor_is_the_larger_of_two_times():
    ceilings = machine.Ceilings("cpu", 1, copy=10.0, matrix={"float32": 2.0, "bfloat16": 8.0})
    assert ceilings.floor(100, 0, "float32") == 10
    assert ceilings.floor(100, 80, "float32") == 40
    assert ceilings.floor(100, 80, "bfloat16") == ceilings.floor(100, 80, "float16") == 10
    assert ceilings.floor(100, 160, "float16") == 20


def test_cache_size_is_read(tmp_path):
    assert machine.llc_bytes(tmp_path) == 32 << 20
    for i, text in enumerate(("48K", "1M", "36608K", "")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(text + "\n")
    assert machine.llc_bytes(tmp_path) == 36608 << 10


@pytest.mark.parametrize(("body", "clock"), [("echo 1980", 1980), ("echo '[N/A]'", None), ("exit 9", None)])
def test_clock_is_asked_of_nvidia_smi(tmp_path, monkeypatch, body, clock):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert machine.sm_clock() == clock


def test_clock_is_never_required(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.sm_clock() is None


def test_facts_name_the_machine():
    found = machine.facts("cpu")
    assert found["torch"] == torch.__version__ and found["cpu"] and found["llc_mib"] > 0
