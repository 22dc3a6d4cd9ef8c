# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Devices: cpu, cuda where there is one; simt when the emulator's library is loaded (TOKRED_LIBRARY), whose CUDA path
runs on CPU tensors. A test takes `device` and runs on each."""

import os

import pytest
import torch
from hypothesis import settings

from tokred import _ext

SIMT = "simt" in _ext.LIBRARY.name
REQUIRE_CUDA = os.environ.get("TOKRED_REQUIRE_CUDA") == "1"  # on a machine with a GPU a skipped CUDA test is a failure
if SIMT:
    DEVICES = [pytest.param("cpu", id="simt")]
else:
    DEVICES = [pytest.param("cpu", id="cpu")]
    if torch.cuda.is_available():
        DEVICES.append(pytest.param("cuda", id="cuda"))
    elif REQUIRE_CUDA:
        raise RuntimeError("TOKRED_REQUIRE_CUDA=1, but torch sees no CUDA device")


def pytest_terminal_summary(terminalreporter, exitstatus):
    if SIMT and exitstatus != 0:  # the order of threads is a function of this
        terminalreporter.write_line(f"repeat with TOKRED_SIMT_SEED={os.environ.get('TOKRED_SIMT_SEED', '0')}")


settings.register_profile("tokred", max_examples=10 if SIMT else 40, deadline=None, print_blob=True, derandomize=True)
settings.load_profile("tokred")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if REQUIRE_CUDA and report.skipped and "cuda" in item.nodeid and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"TOKRED_REQUIRE_CUDA=1, but skipped: {report.longrepr}"
    return report


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def simt():
    """Whether this process runs the emulator: cap sizes."""
    return SIMT


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Call f under 1, 2 and 4 threads and return the results."""

    def run(f):
        before = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                results.append(f())
        finally:
            torch.set_num_threads(before)
        return results

    return run
