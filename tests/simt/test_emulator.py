"""The emulator catches every planted fault, accepts its correct counterpart, and multiplies as mma.sync does."""

from __future__ import annotations

import pytest
import torch

from tests.simt.emulator import fault_names, run_fault, run_mma, run_votes

EXPECTED = {
    "global_bounds": "out-of-bounds global access",
    "shared_bounds": "out-of-bounds shared access",
    "unwritten_shared": "read of shared memory that nobody wrote",
    "unwritten_output": "read of output memory that nobody wrote",
    "different_barriers": "threads of a block at different barriers",
    "gone_at_barrier": "thread is gone while others wait",
    "gone_at_shuffle": "waits for lanes of its warp that are elsewhere or gone",
    "different_shuffles": "waits for lanes of its warp that are elsewhere or gone",
    "race_write_read": "race on a shared address",
    "race_read_write": "race on a shared address",
    "race_write_write": "race on a shared address",
    "race_within_warp": "race on a shared address",
    "race_with_atomic": "race on a shared address",
    "misaligned_global": "misaligned global access of 16 bytes",
    "misaligned_shared": "misaligned shared access of 8 bytes",
    "copy_without_wait": "before cp.async delivered it",
    "copy_waits_for_older": "before cp.async delivered it",
    "copy_seen_by_others": "race on a shared address",
    "too_little_shared": "asked for less shared memory",
    "race_behind_second_reader": "race on a shared address",
    "global_race_in_block": "race in global memory, output: thread 0 touched it",
    "global_race_of_blocks": "race in global memory, output: another block",
    "output_left_out": "output memory that nobody wrote: byte 36 of output",
    "write_to_input": "write to an input: input",
    "copy_pending_at_exit": "ends while cp.async is under way",
    "write_under_copy": "write to shared memory that cp.async is about to write",
    "mma_of_old_device": "mma needs compute capability 80, the code is of 75",
    "tf32_of_old_device": "rounding to TF32 needs compute capability 80, the code is of 75",
    "pack_of_old_device": "rounding to pairs of 16 bits needs compute capability 80, the code is of 75",
    "copy_of_old_device": "race on a shared address",
    "shared_not_asked_for": "50000 bytes of shared memory, of 49152 asked for",
    "static_beside_all": "16 bytes of static shared memory beside 166912 of dynamic, of 166912",
    "static_beside_48_kib": "16 bytes of static shared memory beside 49152 of dynamic, of 49152",
    "shared_above_the_limit": "asks for 200000 bytes of shared memory, the device has 166912",
    "grid_too_high": "a grid of 1 x 65536 blocks",
    "grid_of_nothing": "a grid of 0 x 1 blocks",
    "other_stream": "not on the current stream",
    "no_guard": "no device guard",
}


def test_every_fault_is_listed() -> None:
    assert sorted(fault_names()) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_fault_is_caught(name: str) -> None:
    index = fault_names().index(name)
    message = run_fault(index, True)
    assert message is not None, "the fault went unnoticed"
    assert EXPECTED[name] in message
    if "thread" in message:  # It says where: kernel, block, thread and source line.
        assert f"kernel {name}, block (" in message
        assert ", faults.cpp:" in message or name == "copy_pending_at_exit"
    assert run_fault(index, False) is None


@pytest.mark.parametrize(("kind", "dtype", "depth"), [(0, torch.bfloat16, 16), (1, torch.float16, 16), (2, None, 8)])
def test_mma_multiplies(kind: int, dtype: torch.dtype | None, depth: int) -> None:
    rows, columns = torch.randn(16, depth), torch.randn(8, depth)
    got = run_mma(kind, rows, columns)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        if dtype is not None:
            return t.to(dtype).float()
        return (t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)  # TF32: 10 bits of mantissa

    torch.testing.assert_close(got, rounded(rows) @ rounded(columns).t(), rtol=1e-5, atol=1e-5)


def test_votes_and_shuffles() -> None:
    for bits in (0, 0xFFFFFFFF, 0x80000001, 0x12345678):
        assert run_votes(bits) == (bits, sum(range(32)))
