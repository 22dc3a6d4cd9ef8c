# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The emulator finds what it should, raises no false alarm, and its twins follow the documented layouts.

Compiles ``selftest/selftest.cu`` with the emulator, plain and with the race detector; needs a C++ compiler.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-DTOKRED_SIMT"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")),
]
SEEDS = range(3)
LIBRARIES = ("libasan", "libstdc++")  # to preload; the second for exceptions


class Selftest:
    """One build of selftest.cu; ``run`` returns the error's text, or None."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(str(path))
        pointer = ctypes.c_void_p
        self.lib.selftest_run.argtypes = [ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_int]
        self.lib.selftest_error.restype = ctypes.c_char_p
        self.lib.selftest_names.restype = ctypes.c_char_p
        self.names = set(self.lib.selftest_names().decode().split())

    def run(self, name, a=None, b=None, out=None, n=0):
        def address(t):
            return None if t is None else t.data_ptr()

        error = self.lib.selftest_run(name.encode(), address(a), address(b), address(out), n)
        assert error >= 0, f"selftest.cu has no {name}"
        return self.lib.selftest_error(error).decode() if error else None


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Both builds, plain and race, made side by side."""
    folder = tmp_path_factory.mktemp("simt")
    jobs = [[CXX, *FLAGS, "-c", str(f), "-o", str(folder / f"{f.stem}.o")] for f in sorted(HERE.glob("*.cpp"))]
    parts = [job[-1] for job in jobs]
    for build, flags in (("plain", []), ("race", ["-fsanitize=thread", "-fsanitize=bounds-strict"])):
        source = str(HERE / "selftest" / "selftest.cu")
        jobs.append([CXX, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", str(folder / f"selftest_{build}.o")])
    running = [subprocess.Popen(job) for job in jobs]
    assert [process.wait() for process in running] == [0] * len(jobs)
    for build in ("plain", "race"):
        inputs = [str(folder / f"selftest_{build}.o"), *parts]
        subprocess.run([CXX, "-shared", *inputs, "-o", str(folder / f"{build}.so"), "-ldl", "-lpthread"], check=True)
    return {build: Selftest(folder / f"{build}.so") for build in ("plain", "race")}


@pytest.fixture(params=["plain", "race"])
def build(request, builds):
    return builds[request.param]


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("TOKRED_SIMT_SEED", str(request.param))
    return request.param


def ints(n, high=100):
    return torch.randint(high, (n,), dtype=torch.int32)


# ---- right kernels: right results, and no alarm from either build, whatever the order of the threads


def test_warp_functions(build, seed):
    v = ints(32)
    out = torch.zeros(21, 32, dtype=torch.int32)
    assert build.run("ok_warp_functions", v, out=out) is None
    lane = torch.arange(32)
    odd = int(sum(1 << i for i in range(32) if v[i] % 2))

    def signed(x):
        return (x + 2**31) % 2**32 - 2**31

    same = [sum(1 << j for j in range(32) if v[j] % 4 == v[i] % 4) for i in range(32)]
    xor = 0
    for x in v.tolist():
        xor ^= x
    expected = [
        v[5].expand(32),
        v[lane // 8 * 8 + 3],
        v[torch.where(lane >= 3, lane - 3, lane)],
        v[torch.where(lane % 16 >= 3, lane - 3, lane)],
        v[torch.where(lane + 7 < 32, lane + 7, lane)],
        v[torch.where(lane % 4 + 2 < 4, lane + 2, lane)],
        v[lane ^ 21],
        # Lanes may read groups below their own, not above (PTX ISA, shfl.bfly).
        v[torch.where((lane ^ 9) <= lane // 8 * 8 + 7, lane ^ 9, lane)],
        torch.full((32,), signed(odd)),
        torch.full((32,), 1 + 2 * bool((v == v[7]).all())),
        torch.tensor([signed(s) for s in same]),
        torch.full((32,), signed(2**32 - 1) + 2),
        torch.zeros(32),
        v.sum().expand(32),
        v.min().expand(32),
        v.max().expand(32),
        torch.full((32,), xor),
        v.sum().expand(32),
        v.view(4, 8).amax(1).repeat_interleave(8),
        v.min().expand(32),
        v.cumsum(0),
    ]
    for row, want in zip(out, expected, strict=True):
        torch.testing.assert_close(row, want.int(), rtol=0, atol=0)


def test_two_masks_in_flight(build, seed):
    v = ints(32).long()
    out = torch.zeros(32, dtype=torch.int32)
    assert build.run("ok_two_masks", v.int(), out=out) is None
    lane = torch.arange(32)
    want = torch.zeros(32, dtype=torch.int64)
    for i in range(8):
        want += torch.where(lane < 16, 0 if i >= 4 else 1, 1) * (v[lane ^ (1 << i % 4)] + i)
    want += torch.where(lane % 2 == 1, v[1::2].max(), v[::2].sum())
    torch.testing.assert_close(out.long(), want, rtol=0, atol=0)


@pytest.mark.parametrize("num_threads", [32, 96, 1024])
def test_block_functions(build, num_threads):
    v = torch.randint(-50, 50, (3, num_threads)).float()
    scan = torch.zeros(3, num_threads, dtype=torch.int32)
    out = torch.zeros(3, 4)
    assert build.run("ok_block_functions", v, scan, out, num_threads) is None
    want = torch.stack([v.sum(1), v.amax(1), v.amin(1), v.sum(1)], 1)
    torch.testing.assert_close(out, want, rtol=0, atol=0)  # integers: exact in any order
    torch.testing.assert_close(scan, (v.cumsum(1) - v).int(), rtol=0, atol=0)


def test_barrier_votes(build, seed):
    v = ints(96, 6)
    out = torch.zeros(96, 4, dtype=torch.int32)
    assert build.run("ok_barrier_votes", v, out=out) is None
    want = torch.tensor([(v == 3).any(), (v == 3).all(), (v == 3).sum(), 1], dtype=torch.int32)
    torch.testing.assert_close(out, want.expand(96, 4), rtol=0, atol=0)


def test_named_barriers(build, seed):
    v = ints(64)
    out = torch.zeros(2, 64, dtype=torch.int32)
    assert build.run("ok_named_barriers", v, out=out) is None
    torch.testing.assert_close(out, torch.stack([v.flip(0), v.flip(0) + 1]), rtol=0, atol=0)


def test_atomics(build, seed):
    v = ints(500)
    out = torch.tensor([0, 0, 0, 0, -1, 0, 1000], dtype=torch.int32)
    assert build.run("ok_atomics", v, out=out, n=500) is None
    want = [5 * int((v % 4 == i).sum()) for i in range(4)]
    want += [int(v.max()), 5 * len((v % 64).unique()), int(v.min())]
    assert out.tolist() == want


def test_last_block(build, seed):
    v = torch.randint(-50, 50, (7 * 64,)).float()
    out = torch.zeros(9)
    assert build.run("ok_last_block", v, out=out) is None
    assert out[0] == v.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma(build, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    out = c.clone()
    name = "half" if dtype == torch.float16 else "bf16"
    assert build.run(f"ok_mma_{name}", a, b, out) is None
    want = (c.double() + a.double() @ b.double()).float()
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)  # one rounding each


def test_mma_tf32(build):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    exact = c.double() + a.double() @ b.double()

    def run(mode):
        out = c.clone()
        assert build.run("ok_mma_tf32", a, b, out, mode) is None
        return out

    def truncate(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    def rounded(x):
        return truncate((x.view(torch.int32) + 0x1000).view(torch.float32))

    for mode, to_tf32 in ((0, rounded), (1, truncate)):
        want = (c.double() + to_tf32(a) @ to_tf32(b)).float()
        torch.testing.assert_close(run(mode), want, rtol=1e-6, atol=1e-6)
    assert (run(0).double() - exact).abs().max() > 1e-5  # one product is not float32 accuracy,
    torch.testing.assert_close(run(2).double(), exact, rtol=1e-6, atol=2e-6)  # three are


@pytest.mark.parametrize("mode", ["x2", "x4", "x2_trans", "x4_trans"])
def test_ldmatrix(build, mode):
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 16).half(), torch.randn(16, 16)
    out = c.clone()
    stored = b if mode.endswith("trans") else b.T.contiguous()  # [k][n], or [n][k]
    assert build.run("ok_ldmatrix", a, stored, out, ["x2", "x4", "x2_trans", "x4_trans"].index(mode)) is None
    want = (c.double() + a.double() @ b.double()).float()
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


def test_mma_chain(build):
    a, b = torch.randn(16, 16).half(), torch.randn(16, 16).half()
    out = torch.zeros(16, 16)
    assert build.run("ok_mma_chain", a, b, out) is None
    want = (a.double() @ b.double()).float().half().double() @ b.double()
    torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("valid", [0, 1, 700, 1279, 1280])
def test_cp_async(build, seed, valid):
    v = torch.randn(1280)
    out = torch.zeros(1280)
    assert build.run("ok_async_ring", v, out=out, n=valid) is None
    first = torch.arange(1280)  # copies of 4, 2 and 1 floats, each all or nothing
    rank = first // 4 % 64
    size = torch.where(rank < 32, 4, torch.where(rank < 48, 2, 1))
    want = torch.where(first // size * size + size <= valid, v, 0)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_shared_tail(build):
    v = torch.randn(77)
    out = torch.zeros(77)
    assert build.run("ok_tail", v, out=out, n=77) is None
    torch.testing.assert_close(out, v.flip(0), rtol=0, atol=0)


def test_launch(build):
    assert build.run("ok_empty_grid") is None
    out = torch.zeros(2, 2, 3, 2, 4, 4, dtype=torch.int32)
    assert build.run("ok_indices", out=out) is None
    axes = [torch.arange(s) * f for s, f in zip(out.shape, (1000000, 100000, 10000, 1000, 100, 1), strict=True)]
    want = sum(torch.meshgrid(*axes, indexing="ij"))
    torch.testing.assert_close(out, want.int(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["half", "float"])
def test_packs(build, dtype):
    v = torch.randn(512).to(getattr(torch, dtype))
    out = torch.zeros_like(v)
    assert build.run(f"ok_packs_{dtype}", v, out=out, n=512) is None
    torch.testing.assert_close(out, v + 1, rtol=0, atol=0)


def test_math(build):
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(torch.float32).tiny
    v = torch.cat(
        [torch.tensor([0.0, 1.0, 3.0, inf, -inf, nan, tiny / 2, -200.0, -126.5, 1.0 + 2**-11]), torch.randn(50)]
    )
    out = torch.zeros(4, 60)
    assert build.run("ok_math", v, out=out, n=60) is None
    exp = v.exp2()
    torch.testing.assert_close(out[0], torch.where(exp < tiny, 0, exp), rtol=1e-6, atol=0, equal_nan=True)
    flushed = torch.where(v.abs() < tiny, 0, v)
    torch.testing.assert_close(out[1], flushed.log2(), rtol=1e-6, atol=0, equal_nan=True)
    assert out[2, 9] == 1.0 + 2**-10  # a tie goes away from zero
    assert (out[2].view(torch.int32)[~v.isnan()] & 0x1FFF == 0).all()
    finite = v.isfinite()
    torch.testing.assert_close(out[3][finite], v[finite], rtol=2**-21, atol=tiny)


@pytest.mark.parametrize("name", ["ok_bytes", "ok_syncwarp_chain", "ok_leader"])
def test_no_false_alarm(build, seed, name):
    assert build.run(name, ints(256), out=torch.zeros(512, dtype=torch.int32)) is None


# ---- wrong kernels: an error that names the place

ERRORS = {
    "bad_exit_before_barrier": r"divergent barrier: .*exited",
    "bad_barrier_in_branch": r"divergent barrier: .*exited",
    "bad_barrier_against_warp": r"deadlock: .*8 wait in __syncthreads .*lanes 0,1,2,3,4,5,6,7",
    "bad_barrier_kinds": r"divergent barrier: .*__syncthreads.*others are in __syncthreads",
    "bad_named_barrier_short": r"deadlock: .*32 wait in named_barrier_sync .*32 have exited",
    "bad_named_barrier_count": r"named barrier 3: .*expects? (32|64)",
    "bad_named_barrier_id": r"named barrier: expected id in \[1, 15\], got 16",
    "bad_mask_without_caller": r"__shfl_sync: lane 7 calls with mask 0000007f, which does not name it",
    "bad_mask_names_exited": r"__shfl_xor_sync: mask ffffffff names lane 3[01], which has exited",
    "bad_mask_names_missing": r"__ballot_sync: mask ffffffff names lane 8, which the block of 40 threads does not have",
    "bad_functions_mixed": r"lanes of mask ffffffff are in different functions",
    "bad_masks_cross": r"deadlock: .*__syncwarp with mask 0001ffff",
    "bad_shuffle_unnamed": r"shuffle: lane \d+ reads lane \d+, which mask 0000ffff does not name",
    "bad_shuffle_width": r"shuffle: expected width a power of two up to 32, got 12",
    "bad_loop_counts": r"__syncwarp: mask ffffffff names lane \d+, which has exited",
    "bad_shared_past_end": r"shared memory out of bounds: byte 512 of 512",
    "bad_shared_before_start": r"shared memory (written )?out of bounds",
    "bad_null": r"access to the invalid address 0",
    "bad_left_array": r"__trap.*thread \(3,0,0\)",
    "bad_trap": r"__trap.*thread \(3,0,0\)",
    "bad_storage": r"the kernel's shared storage has 512 bytes, the launch gave 508",
    "bad_block_size": r"block \(1025,1,1\) does not have 1 to 1024 threads",
    "bad_shared_size": r"102400 bytes of shared memory, more than",
    "bad_grid_size": r"grid \(1,65536,1\) is too large",
    "bad_stack": r"local memory is larger",
    "bad_cp_async_alignment": r"cp_async_16: an address is not aligned to 16 bytes",
    "bad_cp_async_target": r"cp_async: the destination is not in shared memory",
    "bad_ldmatrix_alignment": r"ldmatrix: the row's address is not aligned",
    "bad_ldmatrix_target": r"ldmatrix: the row's address is not in shared memory",
}
RACES = {
    "bad_local_index": r"array index 4 out of bounds",
    "bad_unwritten": r"shared memory is read that nobody wrote",
    "bad_async_wait_short": r"before its cp.async was waited for|written by a cp.async",
    "bad_async_no_barrier": r"race: .*without a barrier between|nobody wrote",
    "bad_async_no_wait": r"before its cp.async was waited for|written by a cp.async",
    "race_removed_barrier": r"race: .* shared memory, .* thread \(\d+,0,0\) without a barrier between|nobody wrote",
    "race_write_after_read": r"race: (write|read)",
    "race_write_write": r"race: write \(4 bytes\) of byte \d+ of shared memory, written by thread",
    "race_no_syncwarp": r"race: |nobody wrote",
    "race_shuffle_is_no_fence": r"race: |nobody wrote",
    "race_syncwarp_across_warps": r"race: |nobody wrote",
    "race_syncwarp_of_halves": r"race: |nobody wrote",
    "race_named_barrier_left_out": r"race: |nobody wrote",
    "race_atomic_and_plain": r"race: ",
    "race_across_blocks": r"race: .*written by block \(0,0,0\) of the same launch",
    "race_global_in_block": r"race: .*global memory",
    "race_bytes": r"race: write \(1 bytes\)",
}
ADDRESS = {
    "address_global_past_end": "heap-buffer-overflow",
    "address_global_before_start": "heap-buffer-overflow",
}


def message_of(build, name):
    return build.run(name, torch.zeros(4096, dtype=torch.int32), out=torch.zeros(4096, dtype=torch.int32), n=1280)


@pytest.mark.parametrize("name", ERRORS)
def test_error(build, seed, name):
    message = message_of(build, name)
    assert message is not None and re.search(ERRORS[name], message), message
    assert "selftest.cu: kernel launched at line " in message and f"TOKRED_SIMT_SEED={seed}" in message
    test_shared_tail(build)  # the emulator works on


@pytest.mark.parametrize("name", RACES)
def test_race(builds, seed, name):
    message = message_of(builds["race"], name)
    assert message is not None and re.search(RACES[name], message), message
    assert re.search(r"block \([01],0,0\), thread \(\d+,0,0\), at .*selftest.cu:\d+", message), message


def test_every_wrong_kernel_is_tested(builds):
    wrong = {name for name in builds["race"].names if not name.startswith("ok_")}
    assert wrong == set(ERRORS) | set(RACES) | set(ADDRESS)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Run kernels, one after the other, in a process of their own with the address build; returns what it says."""
    library = tmp_path_factory.mktemp("simt") / "address.so"
    flags = [*FLAGS, "-O1", "-fsanitize=address", "-DTOKRED_SANITIZE"]
    sources = [*sorted(HERE.glob("*.cpp")), HERE / "selftest" / "selftest.cu"]
    jobs = [[CXX, *flags, "-x", "c++", "-c", str(f), "-o", str(library.with_name(f"{f.stem}.o"))] for f in sources]
    running = [subprocess.Popen(job) for job in jobs]
    assert [process.wait() for process in running] == [0] * len(jobs)
    objects = [job[-1] for job in jobs]
    subprocess.run(
        [CXX, "-shared", "-fsanitize=address", *objects, "-o", str(library), "-ldl", "-lpthread"], check=True
    )
    preload = [subprocess.check_output([CXX, f"-print-file-name={lib}.so"], text=True).strip() for lib in LIBRARIES]
    script = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.selftest_run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
libc = ctypes.CDLL(None)  # of Python's own memory the sanitizer knows nothing
libc.calloc.restype = ctypes.c_void_p
a, out = libc.calloc(4096, 4), libc.calloc(4096, 4)
for name in sys.argv[2:]:
    print(name, lib.selftest_run(name.encode(), a, None, out, 4096), flush=True)
"""

    def run(*names):
        env = os.environ | {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
        command = [sys.executable, "-c", script, str(library), *names]
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    return run


@pytest.mark.parametrize("name", ADDRESS)
def test_address(address, name):
    said = address("ok_own_array", name)
    assert "ok_own_array 0" in said, said
    assert f"AddressSanitizer: {ADDRESS[name]}" in said and re.search(rf"{name}.*selftest.cu:\d+", said), said


def test_address_sees_shared_memory_and_no_ghosts(address):
    """The guard page works there, too, and stacks of fibers that were left for good carry no poison on."""
    said = address("bad_shared_past_end", *["bad_left_array", "ok_own_array"] * 3)
    assert "shared memory out of bounds: byte 512 of 512" in said, said
    assert said.count("ok_own_array 0") == 3 and "AddressSanitizer" not in said, said


def test_poison_shows_what_nobody_wrote(builds):
    out = torch.zeros(512, dtype=torch.int32)
    assert builds["plain"].run("bad_unwritten", out=out) is None
    assert (out[:32] == -1).all()


@pytest.mark.parametrize("name", ["bad_async_wait_short", "bad_async_no_wait"])
def test_cp_async_lands_at_its_wait(builds, seed, name):
    v, out = torch.randn(1280), torch.zeros(1280)
    assert builds["plain"].run(name, v, out=out, n=1280) is None
    assert not torch.equal(out, v) and out.isnan().any()


def test_order_is_a_function_of_the_seed(builds, monkeypatch):
    def run(seed, threads):
        monkeypatch.setenv("TOKRED_SIMT_SEED", str(seed))
        monkeypatch.setenv("TOKRED_SIMT_THREADS", str(threads))
        out = torch.zeros(512, dtype=torch.int32)
        builds["plain"].run("race_removed_barrier", out=out)
        return out.tolist()

    assert run(0, 1) == run(0, 2) == run(0, 1)
    assert any(run(seed, 1) != run(0, 1) for seed in range(1, 5))
