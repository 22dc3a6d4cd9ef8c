# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The rules of the house that a machine can keep (docs/design.md): an op's files, who may include what, names."""

import inspect
import re
from pathlib import Path

import pytest

import tokred
from tokred import _registry
from tokred.testing import report

ROOT = Path(__file__).parents[1]
OPS = [pytest.param(op, id=op.name) for op in _registry.ops()]
FAMILIES = ("score", "select", "compact", "merge", "attend", "kv")


def sources(*patterns):
    return [p for pattern in patterns for p in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("op", OPS)
def test_op_is_whole(op):
    folder = ROOT / "csrc" / op.family
    for file in (f"{op.name}.h", f"{op.name}.cpp", f"{op.name}_cpu.cpp", f"{op.name}.cu"):
        assert (folder / file).exists(), f"{op.name}: csrc/{op.family}/{file} is missing"
    tests = ROOT / "tests" / op.family / f"test_{op.name}.py"
    assert "def test_offsets_beyond_2_31(" in tests.read_text(), "benchmarks/gpu_check.sh runs these by their name"
    assert (ROOT / "tests" / "cpp" / op.family / f"test_{op.name}.cpp").exists()
    assert "def test_floor_by_hand(" in tests.read_text(), f"{op.name}: no test derives its floor by hand"
    assert (ROOT / "benchmarks" / op.family / f"bench_{op.name}.py").exists()
    assert getattr(tokred, op.name) is op.function
    for name in (op.name, "reference", "floor", "sample_inputs"):
        assert callable(getattr(op.module, name, None)), f"{op.name}: its module has no {name}"
    # The same signature; only the buffers of an out= form need no definition.
    ours = list(inspect.signature(op.function).parameters)
    for function in (op.module.reference, op.module.floor):
        assert list(inspect.signature(function).parameters) in (ours, [name for name in ours if name != "out"])
    text = inspect.getdoc(op.function)
    for word in ("Args:", "Returns:", "eterministic", "Example:"):
        assert word in text, f"{op.name}: its docstring lacks {word!r}"
    assert re.search(r"ifferentiable|gradient", text), f"{op.name}: its docstring does not speak of gradients"
    for overload in op.schemas:
        assert op.has_kernel("CPU", overload), f"{op.name}.{overload}: no CPU kernel"
        assert op.has_kernel("Meta", overload) or has_fake(op, overload), f"{op.name}.{overload}: no fake"
        assert "->" in op.schemas[overload]


@pytest.mark.parametrize("name", _registry.composites())
def test_composite_is_whole(name):
    module = _registry.composites()[name]
    family = module.__name__.split(".")[1]
    assert (ROOT / "tests" / family / f"test_{name}.py").exists()
    assert not list((ROOT / "csrc" / family).glob(f"{name}*"))
    assert getattr(tokred, name) is getattr(module, name)
    text = inspect.getdoc(getattr(module, name))
    for word in ("Args:", "Returns:", "eterministic", "Example:", "omposite"):
        assert word in text, f"{name}: its docstring lacks {word!r}"
    assert re.search(r"ifferentiable|gradient", text), f"{name}: its docstring does not speak of gradients"


def has_fake(op, overload):
    from torch._library.simple_registry import singleton

    name = f"tokred::{op.name}" + (f".{overload}" if overload else "")
    return singleton.find(name).fake_impl.kernel is not None


@pytest.mark.parametrize("op", OPS)
def test_counts_are_symint_and_tensors_positional(op):
    for overload, schema in op.schemas.items():
        arguments = schema[schema.index("(") : schema.rindex("->")]
        keyword_only = arguments.split("*, ")[1] if "*, " in arguments else ""
        assert "Tensor?" not in keyword_only and "Tensor " not in keyword_only, f"{op.name}.{overload}: {schema}"
        assert not re.search(r"(?<!Sym)\bint (k|r|num_out|max_seqlen)\b", schema.replace("SymInt", "Symint")), schema


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


STANDARD = re.compile(r"^[a-z_]+$|^(immintrin|emmintrin|dlfcn)\.h$")
HEADER_ONLY = {"torch/headeronly/util/Half.h", "torch/headeronly/util/BFloat16.h"}
CUDA = {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"}


def test_include_table():
    wrong = []
    for path in sources("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cpp", "csrc/**/*.cu"):
        place = path.relative_to(ROOT / "csrc")
        family = place.parts[0]
        for name in includes(path):
            if STANDARD.match(name) or name in HEADER_ONLY or name.startswith("common/"):
                allowed = not (name.endswith(".cuh") and path.suffix not in (".cu", ".cuh"))
            elif family == "torch" or (family in FAMILIES and path.suffix == ".cpp" and not path.stem.endswith("_cpu")):
                allowed = name.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/glue", f"{family}/")) or (
                    family == "torch" and name in ("cuda_runtime_api.h", "sys/mman.h")
                )
            elif family == "python":
                allowed = name.startswith("pybind11/")
            else:
                allowed = name.startswith(f"{family}/") and family in FAMILIES
                allowed |= path.suffix in (".cu", ".cuh") and name in CUDA
            if not allowed:
                wrong.append(f"{place}: {name}")
    assert not wrong, wrong


def test_kernels_keep_to_the_emulated_language():
    """<<<>>>, __shared__ and inline PTX live in csrc/common/ only."""
    for path in sources("csrc/*/*.cu"):
        text = re.sub(r"//.*", "", path.read_text())
        assert "<<<" not in text and "__shared__" not in text and not re.search(r"\basm\b", text), path.name


def test_layers_of_python():
    """A family sees no method, a method no torch.ops, and only patch imports model libraries."""
    for family in FAMILIES:
        for path in sources(f"tokred/{family}/*.py"):
            for imported in re.findall(r"^\s*(?:from|import) (tokred[\w.]*)", path.read_text(), re.M):
                assert imported in ("tokred",) or imported.startswith(("tokred._", f"tokred.{family}")), path
    for path in sources("tokred/methods/*.py"):
        text = path.read_text()
        assert "torch.ops" not in text, path
        assert len(text.splitlines()) < 150, f"{path.name}: a method is a screen or two"


def test_spdx_and_size():
    for path in sources(
        "csrc/**/*.*", "tokred/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "examples/*.py", "setup.py"
    ):
        lines = path.read_text().splitlines()
        assert not lines or any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:3]), path
        if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            assert len(lines) <= 450, f"{path}: {len(lines)} lines"
            assert max(map(len, lines)) <= 120, path


def test_no_paths_of_a_machine():
    for path in sources("csrc/**/*.*", "tokred/**/*.py", "docs/*.md", "*.md", "benchmarks/results/*.json"):
        assert not re.search(r"/(root|home|work)/[a-z]", path.read_text()), path


def test_readme_tables_are_made_from_results():
    readme = (ROOT / "README.md").read_text()
    names = report.tables_in(readme)
    assert names
    for name in names:
        path = ROOT / "benchmarks" / "results" / name
        assert report.put_table(readme, path) == readme, (
            f"run: python -m tokred report benchmarks/results/{name} --readme"
        )
