# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The stages of gpu_check.sh: each has a time budget, a log and a state, and a failing one does not stop the next.

Standard library only. Exit status: 0 when every stage passed or was unavailable, 1 when one did not, 2 when there was
nothing to run (no GPU, an unknown stage).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = (
    540  # of all stages; what lends a GPU may stop a command after ten minutes, and facts and table take some, too
)


@dataclass
class Outcome:
    """What a stage came to: passed, failed, timed out, unavailable."""

    state: str
    result: str = ""
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Stage:
    """A bash command with a budget in seconds, and what its exit status and log mean."""

    name: str
    what: str
    budget: float
    command: str
    judge: Callable[[int, str], Outcome]


def by_status(status: int, log: str) -> Outcome:
    lines = [line for line in log.splitlines() if line.strip()]
    return Outcome("failed" if status else "passed", lines[-1].strip()[:100] if lines else "")


def by_junit(path: Path) -> Callable[[int, str], Outcome]:
    """Judge by pytest's report: a run without a single test has failed, too."""

    def judge(status: int, log: str) -> Outcome:
        if not path.exists():
            return Outcome("failed", by_status(status, log).result)
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
        counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
        wrong = [
            str(case.get("name")) for s in suites for case in s if any(e.tag in ("failure", "error") for e in case)
        ]
        result = f"{counts['tests']} tests" + (f", {len(wrong)} wrong: {', '.join(wrong[:3])}" if wrong else "")
        return Outcome("failed" if status or not counts["tests"] else "passed", result, counts)

    return judge


def by_driver(status: int, log: str) -> Outcome:
    found = re.search(r"^(\w+): (\d+) of (\d+) tests passed$", log, re.M)
    counts = {"passed": int(found[2]), "tests": int(found[3])} if found else {}
    return Outcome("failed" if status else "passed", found[0] if found else by_status(status, log).result, counts)


def by_rows(path: Path) -> Callable[[int, str], Outcome]:
    """Judge a benchmark: what it had measured before it failed or ran out of time is kept and counted."""

    def judge(status: int, log: str) -> Outcome:
        rows = len(json.loads(path.read_text())["rows"]) if path.exists() else 0
        if status or not rows:
            return Outcome("failed", f"{rows} rows, then: {by_status(1, log).result}", {"rows": rows})
        return Outcome("passed", f"{rows} rows in {path.name}", {"rows": rows})

    return judge


# What compute-sanitizer says when the host does not let it work, and when it has found something.
REFUSED = re.compile(
    r"device not supported|internal sanitizer error|failed to initialize|insufficient permission|ERR_NVGPUCTRPERM|"
    r"unable to (find|load|attach)|terminated before first instrumented|not found$",
    re.I,
)
FOUND = re.compile(r"Invalid __|Uninitialized |Race reported|hazard at|Barrier error|Leaked \d")


def by_sanitizer(status: int, log: str) -> Outcome:
    """Judge a run of compute-sanitizer: it has to say that it looked, and the tests have to say that they ran."""
    tool = [line.lstrip("= ") for line in log.splitlines() if line.startswith("=========")]
    summaries = [(line, int(m[1])) for line in tool if (m := re.search(r"SUMMARY: (\d+) (?:error|hazard)", line))]
    counts = {"findings": summaries[-1][1]} if summaries else {}
    ran = by_driver(0, log)
    if status == 0 and counts.get("findings") == 0 and ran.counts:
        return Outcome("passed", f"{ran.result}, nothing found", counts)
    refusal = next((line for line in tool if REFUSED.search(line)), None)
    if refusal and not any(FOUND.search(line) for line in tool):
        return Outcome("unavailable", refusal[:100])
    return Outcome("failed", summaries[-1][0] if summaries else by_status(1, log).result, counts)


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit, from there or from PATH."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    for place in (toolkit / "bin" / name, toolkit / "compute-sanitizer" / name, shutil.which(name)):
        if place and Path(place).is_file():
            return str(place)
    return None


def run_stage(stage: Stage, log: Path, seconds: float, environment: dict[str, str]) -> tuple[Outcome, float]:
    """Run one stage; everything that it started is ended with it."""
    start = time.monotonic()
    with open(log, "w") as file:
        file.write(f"$ {stage.command}\n")
        file.flush()
        process = subprocess.Popen(
            ["bash", "-c", f"set -e -o pipefail; {stage.command}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(3)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
    text = log.read_text(errors="replace").partition("\n")[2]
    if status is None:
        outcome = Outcome("timed out", f"after {seconds:.0f} s; {stage.judge(1, text).result}")
    else:
        outcome = stage.judge(status, text)
    return outcome, time.monotonic() - start


def table(rows: list[dict]) -> str:
    """Return the stages as lines of text."""
    lines = [f"{'stage':12} {'state':12} {'seconds':>7}  result"]
    lines += [f"{r['stage']:12} {r['state']:12} {r['seconds']:7.1f}  {r['result']}" for r in rows]
    return "\n".join(lines)


def run_all(stages: list[Stage], out: Path, facts: dict, environment: dict[str, str], total: float) -> int:
    """Run the stages in order, write the JSON after each, print the table last, return the exit status.

    Stages that an earlier call with the same ``out`` has run at this commit keep their place in the JSON and the table.
    """
    begin = time.monotonic()
    path = out / "gpu_check.json"
    before = json.loads(path.read_text()) if path.exists() else {"facts": {}}
    names = [stage.name for stage in stages]
    same = before["facts"].get("commit") == facts["commit"]
    kept = [row for row in before["stages"] if row["stage"] not in names] if same else []
    rows: list[dict] = []
    for stage in stages:
        seconds = min(stage.budget, total - (time.monotonic() - begin))
        log = out / f"{stage.name}.log"
        print(f"{stage.name}: {stage.what} ...", flush=True)
        if seconds < 1:
            outcome, taken = Outcome("timed out", "no time was left to start it"), 0.0
        else:
            outcome, taken = run_stage(stage, log, seconds, environment)
        row = {"stage": stage.name, **asdict(outcome), "seconds": round(taken, 1), "log": log.name}
        rows.append(row | {"nvidia_smi": nvidia_smi()})
        report = {"schema": 1, "facts": facts, "seconds": round(time.monotonic() - begin, 1), "stages": kept + rows}
        path.write_text(json.dumps(report, indent=1) + "\n")
    good = all(r["state"] in ("passed", "unavailable") for r in rows)
    print(f"\n{facts['gpu'] or 'no GPU'}, {time.monotonic() - begin:.0f} s, logs and {path.name} in {out}")
    print(table(kept + rows))
    return 0 if good else 1


def output_of(*command: str) -> str:
    """Return what a command prints, or "" when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


SMI_FIELDS = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def nvidia_smi() -> dict[str, str]:
    """Return the GPU's state as the driver reports it; empty without the tool."""
    printed = output_of("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader", "--id=0")
    return dict(zip(SMI_FIELDS.split(","), printed.split(", "))) if printed else {}


TORCH_FACTS = """
import importlib.util, json, sys, torch
gpu = torch.cuda.is_available()
print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
  "torch_dir": torch.__path__[0], "xdist": bool(importlib.util.find_spec("xdist")),
  "gpu": torch.cuda.get_device_name() if gpu else None,
  "capability": torch.cuda.get_device_capability() if gpu else None}))
"""


def gather_facts() -> dict:
    """Return what the results depend on."""
    printed = output_of(sys.executable, "-c", TORCH_FACTS)
    if not printed:
        raise SystemExit(stop(f"{sys.executable} cannot import torch"))
    facts = json.loads(printed.splitlines()[-1])
    facts["commit"] = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
    facts["cores"] = len(os.sched_getaffinity(0))
    facts["nvcc"] = (output_of(find_tool("nvcc") or "nvcc", "--version").splitlines() or ["missing"])[-1]
    facts["nvidia_smi"] = nvidia_smi()
    return facts


def stop(why: str) -> int:
    print(f"gpu_check: {why}", file=sys.stderr)
    return 2


def build_command(facts: dict, wheel: Path | None, rehearse: bool) -> tuple[str, Path]:
    """Return the command that puts the library into tokred/ and builds the C++ tests beside it, and the latter's folder."""
    q, jobs = shlex.quote, facts["cores"]
    generator = "-G Ninja " if shutil.which("ninja") else ""
    options = f"-DTOKRED_CPP_TESTS=ON -DTOKRED_TORCH_DIR={q(facts['torch_dir'])} "
    if rehearse:
        folder, options = ROOT / "build" / "cpp-simt", options + "-DTOKRED_SIMT=ON -DTOKRED_WERROR=ON"
        library = "test -f tokred/libtokred.so"
    else:
        major, minor = facts["capability"] or (8, 0)  # --list works without a GPU
        arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
        compiler = q(find_tool("nvcc") or "nvcc")
        folder = ROOT / "build" / "cpp-cuda"
        options += f"-DTOKRED_CUDA=ON -DCMAKE_CUDA_COMPILER={compiler} -DCMAKE_CUDA_ARCHITECTURES={arch}-real"
        library = f"TOKRED_CUDA=1 TOKRED_CUDA_ARCH_LIST={arch} MAX_JOBS={jobs} {q(sys.executable)} setup.py -q"
        library += " build_ext --inplace"
    if wheel:  # what an installation in place would leave; the Python files are the checkout's
        code = "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); z.extractall(members=[n for n in z.namelist()"
        code += " if n.startswith('tokred/') and n.endswith(('.so', 'build_info.json'))])"
        library = f"{q(sys.executable)} -c {q(code)} {q(str(wheel))}"
    driver = f"cmake -S . -B {q(str(folder))} {generator}{options}"
    driver += f" && cmake --build {q(str(folder))} --target tokred_cpp_tests -j {jobs}"
    doctor = f"{q(sys.executable)} -m tokred doctor --device {'cpu' if rehearse else 'cuda'}"
    # Side by side: each is as slow as its slowest file.
    both = f"({driver}) & driver=$!; wrong=0; {library} || wrong=1; wait $driver || wrong=1"
    return f"{both}; [ $wrong = 0 ]; {doctor}", folder


def all_stages(facts: dict, out: Path, wheel: Path | None, rehearse: bool) -> list[Stage]:
    """Return every stage in order; the rehearsal's do the same on the CPU and the emulator, with less to do."""
    python = shlex.quote(sys.executable)
    build, folder = build_command(facts, wheel, rehearse)
    driver = shlex.quote(str(folder / "tokred_cpp_tests")) + (" gather_tokens segment_expand" if rehearse else "")
    device = "cpu" if rehearse else "cuda"
    # Tests without a device of their own take the GPU where there is one, so all but those of the CPU are chosen.
    chosen, suite = ("gather_tokens", "test_gather_tokens") if rehearse else ("not cpu", "not cpu")
    aside = "--ignore=tests/simt --ignore=tests/test_gpu_check.py"

    def pytest(name: str, what: str, budget: float, arguments: str) -> Stage:
        report = out / f"{name}.xml"
        command = f"rm -f {shlex.quote(str(report))}; {python} -m pytest {arguments} -p no:cacheprovider"
        return Stage(name, what, budget, f"{command} --junitxml={shlex.quote(str(report))}", by_junit(report))

    # Processes share the GPU; each has a context of half a GiB there.
    parallel = f"-n {max(2, min(8, facts['cores'] // 2))}" if facts["xdist"] else ""
    numbers = out / "bench.json"
    length = "--smoke --op gather_tokens --threads 1" if rehearse else "--seconds 0.15"
    bench = f"rm -f {shlex.quote(str(numbers))}; {python} -m tokred bench --device {device} {length}"
    stages = [
        Stage("build", "the library and the C++ tests", 150, build, by_status),
        pytest(
            "wrappers",
            "each PTX wrapper against its twin's expectations",
            60,
            f"tests/simt/test_wrappers.py -k {'plain-half' if rehearse else 'cuda'}",
        ),
        Stage("driver", "the kernels against the CPU's, without torch", 30, driver, by_driver),
        pytest(
            "tests",
            f"the test suite on {device}",
            200,
            f"tests {aside} --ignore=tests/test_cuda.py {parallel} -k '{suite} and not beyond_2_31'",
        ),
        pytest(
            "cuda",
            "graphs, streams, beyond 2^31 elements",
            60,
            f"tests {aside} -k '{chosen} and (test_cuda or beyond_2_31)'",
        ),
        Stage(
            "bench", "the benchmarks' core rows", 190, f"{bench} --json {shlex.quote(str(numbers))}", by_rows(numbers)
        ),
    ]
    sanitizer = find_tool("compute-sanitizer")
    for tool, budget in (("memcheck", 60), ("racecheck", 75), ("synccheck", 45), ("initcheck", 45)):
        options = "--tool memcheck --leak-check full" if tool == "memcheck" else f"--tool {tool}"
        command = f"{shlex.quote(sanitizer or '')} {options} --error-exitcode 99 --print-limit 20 {driver}"
        if tool == "initcheck":
            command = f"TOKRED_CPP_POISON=0 {command}"
        if not sanitizer:
            command = "echo '========= compute-sanitizer: not found'; false"
        stages.append(Stage(tool, "compute-sanitizer on the C++ tests", budget, command, by_sanitizer))
    return stages


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--wheel", type=Path, help="a wheel of this commit, instead of a build")
    parser.add_argument("--wheelhouse", type=Path, help="a folder of wheels to use beside what is installed")
    parser.add_argument("--only", help="stages, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="for logs and JSON")
    parser.add_argument("--list", action="store_true", help="print the stages with budgets and commands")
    parser.add_argument("--rehearse", action="store_true", help="try this script on CPU and emulator, tiny")
    parsed = parser.parse_args(arguments)
    for name in ("wheel", "wheelhouse"):
        path = getattr(parsed, name)
        if path and not path.exists():
            return stop(f"--{name}: {path} does not exist")
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    places = [str(ROOT)]
    if parsed.wheelhouse:
        site = out / "site"
        wheels = [str(path) for path in sorted(parsed.wheelhouse.glob("*.whl"))]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--upgrade",
            "--target",
            str(site),
        ]
        if subprocess.run([*pip, *wheels]).returncode:
            return stop(f"--wheelhouse: pip could not install the wheels in {parsed.wheelhouse}")
        places.append(str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"])
    facts = gather_facts()
    if not parsed.list and not parsed.rehearse and not facts["gpu"]:
        return stop(f"torch {facts['torch']} sees no CUDA device; --rehearse tries this script without one")
    wheel = parsed.wheel.resolve() if parsed.wheel else None
    stages = all_stages(facts, out, wheel, parsed.rehearse)
    known = [stage.name for stage in stages]
    only = parsed.only.split(",") if parsed.only else known
    if unknown := [name for name in only if name not in known]:
        return stop(f"no stage named {', '.join(unknown)}; there are {', '.join(known)}")
    stages = [stage for stage in stages if stage.name in only]
    if parsed.list:
        for stage in stages:
            print(f"{stage.name:12} {stage.budget:4.0f} s  {stage.what}\n    {stage.command}")
        return 0
    environment = {key: value for key, value in os.environ.items() if key != "TOKRED_LIBRARY"}
    environment |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if not parsed.rehearse:
        environment["TOKRED_REQUIRE_CUDA"] = "1"
    del facts["torch_dir"]  # a path of this machine, no fact about it
    return run_all(stages, out, facts, environment, TOTAL_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
