# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The mutation tool finds the places that it promises to find, and leaves the others alone."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("tokred_mutate", Path(__file__).with_name("mutate.py"))
mutate = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = mutate  # dataclasses look their module up
spec.loader.exec_module(mutate)

SOURCE = """\
#if defined(A) && defined(B)
template <typename T, int kN>
__global__ void kernel(const Args args) {  // a comment: x < y && z
  const char* text = "a < b && c";
  for (int i = 0; i < args.n; ++i) {
    if (a && f(b, c && d) && !e) return;
  }
  __syncthreads();
  __syncwarp(mask);
  cp_async_wait<1>();
  shift << 2;
  const bool take = above || tied == x;
  static_assert(kN > 0 && kN <= 8, "no");
}
"""


def test_mutants(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    after = {(m.line, m.kind, m.after.replace("( ", "(")) for m in mutate.mutants_of(path)}
    assert after == {
        (5, "bound", "for (int i = 0; i <= args.n; ++i) {"),
        (6, "term", "if (f(b, c && d) && !e) return;"),
        (6, "term", "if (a && !e) return;"),
        (6, "term", "if (a&& !e) return;"),
        (6, "term", "if (a && f(b, c && d)) return;"),
        (6, "term", "if (a && f(b, c) && !e) return;"),
        (6, "term", "if (a && f(b, d) && !e) return;"),
        (8, "barrier", ";"),
        (9, "barrier", ";"),
        (10, "barrier", ";"),
        (12, "term", "const bool take = above;"),
        (12, "term", "const bool take = tied == x;"),
    }


def test_each_replacement_is_where_it_says(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    for m in mutate.mutants_of(path):
        mutated = SOURCE[: m.start] + m.replacement + SOURCE[m.end :]
        assert mutated.count("\n") == SOURCE.count("\n") and mutated != SOURCE
        assert " ".join(mutated.splitlines()[m.line - 1].split()) == m.after
