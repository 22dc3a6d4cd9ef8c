# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""That `make test-asan` would notice: a read out of bounds and undefined behaviour in an op end the process."""

import os
import subprocess
import sys

import pytest

CALLS = {
    # A tensor whose memory ends before its shape does.
    "heap-buffer-overflow": """
x = torch.zeros(1, 64, 40)
x.untyped_storage().resize_(63 * 40 * 4)
""",
    # Floats at an odd address.
    "misaligned address": """
x = torch.frombuffer(bytearray(64 * 40 * 4 + 1), dtype=torch.float32, offset=1).view(1, 64, 40)
""",
}
MERGE = "tokred.segment_merge(x, torch.zeros(1, 64, dtype=torch.int64), 1)"


@pytest.mark.skipif("asan" not in os.environ.get("LD_PRELOAD", ""), reason="make test-asan runs this")
@pytest.mark.parametrize("report", CALLS)
def test_sanitizer_ends_the_process(report):
    code = f"import torch, tokred\n{CALLS[report]}\n{MERGE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert report in done.stderr and "segment_merge" in done.stderr, done.stderr[-2000:]
