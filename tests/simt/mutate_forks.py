# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""A pytest plugin for mutate.py: collect once, then run the tests in a fork per mutant of TOKRED_MUTANTS.

Prints ``mutant NUMBER passed|failed|endless TEST``, the test being the one that failed. Number 0 is the unchanged
library: put it first, for its run says how long each test may take.
"""

import contextlib
import ctypes
import faulthandler
import mmap
import os
import resource
import signal
import time
from array import array
from collections.abc import Sequence

import pytest

from tokred import _ext

PARALLEL = 2
UNKNOWN_S = 60.0  # of processor time: a test may take this when nobody has timed it,
MARGIN_S = 10.0  # and else this and ten times what it took;
ASLEEP_S = 600.0  # whoever works for so little in so long a time waits for ever


class Child:
    """A process that runs the tests, in this order, with a mutant; stops at the first failure."""

    def __init__(self, session: pytest.Session, number: int, order: Sequence[pytest.Item], times: dict[str, float]):
        self.number, self.order = number, order
        # Shared with the process: how many tests it has begun, and how long each took.
        self.shared = memoryview(mmap.mmap(-1, 8 * (len(order) + 1))).cast("d")
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.run(session, times)
            finally:
                os._exit(1)

    def run(self, session: pytest.Session, times: dict[str, float]) -> None:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the server
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        ctypes.c_int.in_dll(ctypes.CDLL(str(_ext.LIBRARY)), "tokred_mutant").value = self.number
        for i, item in enumerate(self.order):
            self.shared[0] = i + 1
            known = times.get(item.nodeid)
            signal.setitimer(signal.ITIMER_PROF, UNKNOWN_S if known is None else MARGIN_S + 10 * known)
            signal.setitimer(signal.ITIMER_REAL, ASLEEP_S)
            start = time.process_time()
            following = self.order[i + 1] if i + 1 < len(self.order) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.shared[i + 1] = time.process_time() - start
            if session.testsfailed:
                return
        os._exit(0)

    def verdict(self, status: int) -> tuple[str, pytest.Item | None]:
        """Return what the ended process found, and the test behind it."""
        if os.waitstatus_to_exitcode(status) == 0:
            return "passed", None
        endless = os.waitstatus_to_exitcode(status) in (-signal.SIGPROF, -signal.SIGALRM)
        return "endless" if endless else "failed", self.order[int(self.shared[0]) - 1]


def pytest_runtestloop(session: pytest.Session) -> bool:
    if session.testsfailed:
        raise session.Failed("the tests do not load")
    order = list(session.items)
    times: dict[str, float] = {}
    waiting = array("i", map(int, os.environ["TOKRED_MUTANTS"].split()))
    running: dict[int, Child] = {}
    while waiting or running:
        first = bool(waiting) and waiting[0] == 0
        while waiting and len(running) < (1 if first else PARALLEL):
            child = Child(session, waiting.pop(0), list(order), times)
            running[child.pid] = child
        pid, status = os.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it has started
        child = running.pop(pid)
        verdict, test = child.verdict(status)
        print(f"mutant {child.number} {verdict} {test.nodeid if test else ''}", flush=True)
        if test:
            order.remove(test)  # neighbours die of the same test
            order.insert(0, test)
        elif child.number == 0:
            times = {item.nodeid: child.shared[i + 1] for i, item in enumerate(order)}
            order.sort(key=lambda item: times[item.nodeid])
    return True
