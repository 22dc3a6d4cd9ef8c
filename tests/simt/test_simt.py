# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The emulator finds what it should: kernels of ``selftest/selftest.cu`` that are wrong. The right ones are in
test_wrappers.py."""

import re

import pytest
import torch


@pytest.fixture(params=["plain", "race"])
def build(request, emulated):
    return emulated[request.param]


# What each wrong kernel says; the place is named, too.

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
    values, out = torch.randn(77), torch.zeros(77)
    assert build.run("ok_tail", values, out=out, n=77) is None  # the emulator works on
    assert torch.equal(out, values.flip(0))


@pytest.mark.parametrize("name", RACES)
def test_race(emulated, seed, name):
    message = message_of(emulated["race"], name)
    assert message is not None and re.search(RACES[name], message), message
    assert re.search(r"block \([01],0,0\), thread \(\d+,0,0\), at .*selftest.cu:\d+", message), message


def test_every_wrong_kernel_is_tested(emulated):
    wrong = {name for name in emulated["race"].names if not name.startswith("ok_")}
    assert wrong == set(ERRORS) | set(RACES) | set(ADDRESS)


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


def test_poison_shows_what_nobody_wrote(emulated):
    out = torch.zeros(512, dtype=torch.int32)
    assert emulated["plain"].run("bad_unwritten", out=out) is None
    assert (out[:32] == -1).all()


@pytest.mark.parametrize("name", ["bad_async_wait_short", "bad_async_no_wait"])
def test_cp_async_lands_at_its_wait(emulated, seed, name):
    v, out = torch.randn(1280), torch.zeros(1280)
    assert emulated["plain"].run(name, v, out=out, n=1280) is None
    assert not torch.equal(out, v) and out.isnan().any()


def test_order_is_a_function_of_the_seed(emulated, monkeypatch):
    def run(seed, threads):
        monkeypatch.setenv("TOKRED_SIMT_SEED", str(seed))
        monkeypatch.setenv("TOKRED_SIMT_THREADS", str(threads))
        out = torch.zeros(512, dtype=torch.int32)
        emulated["plain"].run("race_removed_barrier", out=out)
        return out.tolist()

    assert run(0, 1) == run(0, 2) == run(0, 1)
    assert any(run(seed, 1) != run(0, 1) for seed in range(1, 5))


@pytest.mark.parametrize("name", ["ok_bytes", "ok_syncwarp_chain", "ok_leader"])
def test_no_false_alarm(build, seed, name):
    """Right, though it looks a little like a race; test_wrappers.py has the rest."""
    values = torch.randint(100, (256,), dtype=torch.int32)
    assert build.run(name, values, out=torch.zeros(512, dtype=torch.int32)) is None
