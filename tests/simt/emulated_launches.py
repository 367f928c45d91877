"""The host code: which kernels it launches, what they ask for, what it allocates, and what a CUDA graph cannot hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pglcl_ext import patch_statistics
from tests.problems import ContrastProblem, gaussian_problem
from tests.simt import calls, emulator
from tests.simt.contrast_cases import (
    CAPTURABLE,
    OPTIONS,
    TILED_DTYPES,
    assert_contrast,
    assert_own_keys,
    inside,
)


def launched(dtype: torch.dtype, n: int, m: int, depth: int, **device: int) -> dict[str, int]:
    """Checks a forward and a backward pass. Returns their kernels, and the number of blocks of each in y."""
    emulator.take_launches()
    assert_contrast(ContrastProblem.random(n, depth, m=m, classes=2), dtype, **device)
    blocks: dict[str, int] = {}
    for name, _, y in emulator.take_grids():
        blocks[name] = max(y, blocks.get(name, 0))
    return blocks


# Bytes that one stage takes for 16 columns in float32, and for up to 128 in 16 bits (the backward pass).
ONE_STAGE = {torch.float32: 18288, torch.bfloat16: 28768}


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_one_stage_where_two_do_not_fit(dtype: torch.dtype) -> None:
    kind = "tiles" if dtype == torch.float32 else "mma"
    for n, m in ((5, 9), (5, 0), (70, 100)):
        kernels = launched(dtype, n, m, 16, shared_bytes=ONE_STAGE[dtype])
        assert [f"contrast_{way}_{kind}" in kernels for way in ("forward", "backward")] == [True, True]
    kernels = launched(dtype, 5, 9, 16, shared_bytes=ONE_STAGE[dtype] - 1)
    assert "contrast_forward_plain" in kernels


def test_rows_of_256_take_the_kernels_of_16_bits_where_one_stage_fits() -> None:
    one_stage = 43616  # bytes, of the backward pass
    for room, kind in ((one_stage, "mma"), (one_stage - 1, "plain")):
        kernels = launched(torch.bfloat16, 5, 9, 256, shared_bytes=room)
        assert [f"contrast_{way}_{kind}" in kernels for way in ("forward", "backward")] == [True, True]


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_more_than_48_kib_are_asked_for(dtype: torch.dtype) -> None:
    kernels = launched(dtype, 3, 4, 256)
    assert "contrast_forward_plain" not in kernels  # nor are rows of 256 long ones
    assert_contrast(ContrastProblem.random(3, 256, m=4, channels=3, max_positive_disparity=0.4), dtype)


@pytest.mark.parametrize(("depth", "kernel"), [(4, "mma"), (128, "mma"), (132, "mma"), (256, "mma"), (260, "tiles")])
def test_tf32_keeps_products_of_rows_up_to_256_in_registers(depth: int, kernel: str) -> None:
    for channels in (1, 3):
        problem = ContrastProblem.random(70, depth, m=37, channels=channels, classes=3, max_positive_disparity=0.4)
        emulator.take_launches()
        assert_contrast(problem, torch.float32, allow_tf32=True)
        ways = ("forward", "backward", "backward")
        assert [n for n in emulator.take_launches() if "ward" in n] == [f"contrast_{way}_{kernel}" for way in ways]


def test_a_build_for_an_older_device_takes_the_kernels_that_it_holds() -> None:
    """compute_75 PTX, which a newer device compiles when it starts, has no mma of these shapes and no cp.async."""
    for dtype in TILED_DTYPES:
        for allow_tf32 in (False, True):
            kernels = launched(dtype, 70, 37, 16, capability=90, compiled_for=75, allow_tf32=allow_tf32)
            assert not [name for name in kernels if "mma" in name]
            assert "contrast_forward_tiles" in kernels


def test_tf32_rows_are_shared_out_among_blocks() -> None:
    problem = ContrastProblem.random(70, 16, m=300, classes=3, max_positive_disparity=0.5)
    emulator.take_grids()
    assert_contrast(problem, torch.float32, allow_tf32=True, multiprocessors=6)
    assert all(y == 2 for name, _, y in emulator.take_grids() if "forward_mma" in name)


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_rows_that_do_not_fit_pass_in_chunks(allow_tf32: bool) -> None:
    """64 KiB, as on sm_75, have no room for rows of 240 in float32, and room for chunks of 128."""
    blocks = launched(torch.float32, 70, 40, 240, shared_bytes=64 * 1024, allow_tf32=allow_tf32)
    assert blocks["contrast_backward_tiles"] == 2  # of 128 and 112
    assert "contrast_forward_tiles" in blocks


def test_long_rows_where_no_chunk_fits() -> None:
    kernels = launched(torch.float32, 3, 4, 300, shared_bytes=16 * 1024)
    assert "contrast_forward_plain" in kernels


def test_keys_are_shared_out_four_tiles_to_a_block() -> None:
    for m, parts in ((20, 1), (300, 1), (512, 2)):
        kernels = launched(torch.bfloat16, 3, m, 8, multiprocessors=2)
        assert kernels["contrast_forward_mma"] == parts
    for m, parts in ((255, 1), (256, 2), (800, 6), (5000, 6)):  # tiles of 32 columns; the sixth part of 25 has none
        kernels = launched(torch.float32, 3, m, 8, multiprocessors=2)
        assert kernels["contrast_forward_tiles"] == kernels["contrast_backward_tiles"] == parts


@pytest.mark.parametrize(("depth", "parts"), [(100, 6), (132, 4), (256, 2)])
def test_blocks_that_need_much_shared_memory_get_fewer_parts(depth: int, parts: int) -> None:
    """150 KiB hold one block of rows of 256, and two of shorter ones; 70 rows are two or three blocks."""
    kernels = launched(torch.float32, 70, 1500, depth, multiprocessors=6, shared_bytes=150 * 1024)
    assert kernels["contrast_forward_tiles"] == parts


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_chunks_of_long_rows_are_shared_out(allow_tf32: bool) -> None:
    """The gradient of rows of 300 has three chunks, each in up to two parts of the columns."""
    problem = ContrastProblem.random(70, 300, m=260, classes=3, max_positive_disparity=0.5)
    emulator.take_grids()
    assert_contrast(problem, torch.float32, allow_tf32=allow_tf32, multiprocessors=9)
    tiles = [(name, y) for name, _, y in emulator.take_grids() if name.endswith("tiles")]
    assert tiles == [("contrast_forward_tiles", 2), ("contrast_backward_tiles", 6), ("contrast_backward_tiles", 3)]


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_masks_channels_and_own_keys_in_parts_match_the_reference(dtype: torch.dtype) -> None:
    """A block knows only its part of the keys; an anchor's own key is in one of the parts."""
    parts = {"multiprocessors": 12}
    problem = ContrastProblem.random(20, 16, m=540, channels=3, max_positive_disparity=0.4)
    assert_contrast(problem, dtype, **parts)
    problem.options = {"positive_mask": torch.rand(20, 540) < 0.3, "negative_mask": torch.rand(20, 540) < 0.5}
    assert_contrast(problem, dtype, **parts)
    z, y = torch.nn.functional.normalize(torch.randn(540, 16), dim=1).to(dtype), torch.randint(0, 3, (540,))
    assert_own_keys(z, y, slice(510, 530), **parts)  # in the last part


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "none", "bounds"])
def test_keys_shared_out_among_blocks(name: str, dtype: torch.dtype) -> None:
    """600 keys in parts of four tiles or more give the same loss as one block, also for undecided anchors."""
    problem = ContrastProblem.random(70, 16, m=600, classes=3, **OPTIONS[name])
    assert_contrast(problem, dtype, multiprocessors=6)
    assert_contrast(ContrastProblem.random(600, 16, classes=3, **OPTIONS[name]), dtype, multiprocessors=60)
    if name != "none":
        return
    z, labels = problem.anchors.to(dtype), problem.labels
    for place in (0, 599):
        descriptors = problem.key_descriptors.clone()
        descriptors[place] = math.nan
        arguments = (z, labels, problem.descriptors)
        keys = {"keys": problem.keys.to(dtype), "key_labels": problem.key_labels.abs(), "key_descriptors": descriptors}
        loss, _ = calls.patch_contrast(*arguments, **keys, multiprocessors=6, **problem.options)
        assert torch.equal(loss.isnan(), labels != -1)


def test_columns_are_shared_out_from_two_times_four_tiles_on() -> None:
    kernels = launched(torch.bfloat16, 1, 512, 8, multiprocessors=2)
    assert kernels["contrast_forward_mma"] == 2
    for m, parts in ((255, 1), (256, 2)):  # tiles of 32 columns in the backward pass
        kernels = launched(torch.bfloat16, 3, m, 8, multiprocessors=2)
        assert kernels["contrast_backward_mma"] == parts


def test_columns_of_rows_longer_than_128_are_not_shared_out() -> None:
    kernels = launched(torch.bfloat16, 3, 300, 136, multiprocessors=6)
    assert kernels["contrast_backward_mma"] == 1


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "mma"), (torch.float16, "mma"), (torch.float32, "tiles")], ids=str
)
def test_gradients_of_columns_shared_out_among_blocks(dtype: torch.dtype, kind: str) -> None:
    """The columns of anchors and of keys are in two parts; one launch adds them up."""
    problem = ContrastProblem.random(280, 16, m=300, classes=3, max_positive_disparity=0.5)
    emulator.take_launches()
    assert_contrast(problem, dtype, multiprocessors=60)
    launched = [name for name in emulator.take_launches() if "gradients" in name or "backward" in name]
    assert launched == [f"contrast_backward_{kind}", f"contrast_backward_{kind}", "contrast_finish_gradients"]


def test_parts_of_more_anchors_than_keys() -> None:
    kernels = launched(torch.bfloat16, 300, 280, 8, multiprocessors=60)
    assert kernels["contrast_backward_mma"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 70], ids=["self", "keys"])
def test_launches_and_allocations_of_the_loss(m: int | None, dtype: torch.dtype) -> None:
    """As NOTES has them: three kernels at most in each pass."""
    problem = ContrastProblem.random(67, 24, m=m, max_positive_disparity=0.5).cast(dtype)
    losses: list[Tensor] = []
    emulator.take_launches()
    called, allocated = inside("patch_contrast", lambda: losses.append(problem.loss()))
    launched = emulator.take_launches()
    called_back, allocated_back = inside("patch_contrast_backward", losses[0].backward)
    launched_back = emulator.take_launches()
    assert set(called) | set(called_back) <= CAPTURABLE
    assert (len(launched), allocated) == (3, 7), launched
    assert (len(launched_back), allocated_back) == ((2, 1) if m is None else (3, 2)), launched_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_op_waits_for_the_device(dtype: torch.dtype) -> None:
    """The host code allocates and launches, and calls no function of PyTorch that a graph cannot capture."""
    x = torch.randn(1, 3, 16, 16).to(dtype).requires_grad_()
    outs: list[Any] = []
    a, y = torch.rand(40, 1), torch.randint(0, 3, (40,))
    anchors, *rest = gaussian_problem(20, 8)
    pairwise = gaussian_problem(20, 8, pairwise=True)
    asked = {
        "statistics": inside("patch_statistics", lambda: outs.append(patch_statistics(x, 4))),
        "statistics, backward": inside("patch_statistics_backward", lambda: outs[0].entropy.sum().backward()),
        "bounds": inside(
            "disparity_bounds", lambda: calls.disparity_bounds(a, y, a, y, 3, positives=True, self_offset=0)
        ),
        "disparity": inside("semantic_disparity", lambda: calls.semantic_disparity(a.to(dtype), a.to(dtype))),
        "disparity, backward": inside(
            "semantic_disparity_backward",
            lambda: calls.semantic_disparity_backward(torch.ones(1, 1).expand(40, 40), a, a),
        ),
        "gaussian": inside("gaussian_contrast", lambda: calls.gaussian_contrast(anchors.to(dtype), *rest)),
        "pairwise": inside("gaussian_contrast", lambda: calls.gaussian_contrast(*pairwise)),
    }
    for name, (called, allocated) in asked.items():
        assert set(called) <= CAPTURABLE, (name, sorted(set(called) - CAPTURABLE))
        assert allocated > 0, name
    assert any(called for called, _ in asked.values())
