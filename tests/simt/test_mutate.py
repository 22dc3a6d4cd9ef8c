# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The mutation tool finds the places that it promises to find, and leaves the others alone."""

import ctypes
import importlib.util
import itertools
import subprocess
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
  constexpr bool kSmall = kN <= 4;
  if constexpr (kSmall && kN > 1) {
    x = y - 1;
  }
}
#ifdef TOKRED_SIMT
#else
bool gpu = a < b;
#endif
"""


def test_mutants(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    after = {(m.line, m.kind, m.after) for m in mutate.mutants_of(path)}
    assert after == {
        (5, "bound", "for (int i = 0; i <= args.n; ++i) {"),
        (6, "term", "if (true && f(b, c && d) && !e) return;"),
        (6, "term", "if (a && true && !e) return;"),
        (6, "term", "if (a && f(b, c && d) && true) return;"),
        (6, "term", "if (a && f(b, true && d) && !e) return;"),
        (6, "term", "if (a && f(b, c && true) && !e) return;"),
        (8, "barrier", ";"),
        (9, "barrier", ";"),
        (10, "barrier", ";"),
        (12, "term", "const bool take = above || false;"),
        (12, "term", "const bool take = false || tied == x;"),
        (16, "step", "x = y - 0;"),
    }


def test_each_replacement_is_where_it_says(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    for m in mutate.mutants_of(path):
        mutated = SOURCE[: m.start] + m.replacement + SOURCE[m.end :]
        assert mutated.count("\n") == SOURCE.count("\n") and mutated != SOURCE
        assert " ".join(mutated.splitlines()[m.line - 1].split()) == m.after


FUNCTION = "a < b + 1 && (b - 1 >= c || c == a || (a > c && b <= c))"


def test_a_branch_does_what_the_replacement_says(tmp_path):
    path = tmp_path / "function.cpp"
    path.write_text(f'extern "C" bool function(int a, int b, int c) {{\n  return {FUNCTION};\n}}\n')
    mutants = dict(enumerate(mutate.mutants_of(path), start=1))
    assert len(mutants) == 4 + 2 + 7
    (tmp_path / "mutants.cpp").write_text(mutate._RUNTIME + mutate._ACTIVE + mutate.schemata(path, mutants))
    library = tmp_path / "mutants.so"
    subprocess.run(["g++", "-std=c++17", "-fPIC", "-shared", tmp_path / "mutants.cpp", "-o", library], check=True)
    function, active = ctypes.CDLL(library).function, ctypes.c_int.in_dll(ctypes.CDLL(library), "tokred_mutant")
    function.restype = ctypes.c_bool
    for number, after in [(0, f"return {FUNCTION};"), *((n, m.after) for n, m in mutants.items())]:
        active.value = number
        expression = after[len("return ") : -1]
        for c_plus_plus, python in (("&&", "and"), ("||", "or"), ("true", "True"), ("false", "False")):
            expression = expression.replace(c_plus_plus, python)
        for a, b, c in itertools.product(range(4), repeat=3):
            assert function(a, b, c) == eval(expression, {"a": a, "b": b, "c": c}), after


def test_a_kernel_file_has_the_tests_of_its_op():
    for kernel, op in (("prune_topk", "prune_topk"), ("attn_received_diagonal", "attn_received")):
        assert [p.name for p in mutate.tests_of(kernel)] == [f"test_{op}.py"]
