"""The contrastive loss of tensors of any strides and offsets, and of masks beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pglcl_ext._arguments import Choice, ContrastArguments, ContrastOutputs, Side
from tests.problems import DTYPES, TOLERANCE, ContrastProblem, contrast_arguments
from tests.simt import calls, emulator
from tests.simt.contrast_cases import TILED_DTYPES, apart, assert_contrast, inside, shifted


@pytest.mark.parametrize("dtype", [torch.float64, *TILED_DTYPES], ids=str)
def test_inputs_of_any_strides_give_the_same_bits(dtype: torch.dtype) -> None:
    bounds = {"max_positive_disparity": torch.rand(9) / 2 + 0.2, "min_negative_disparity": torch.rand(9) / 3}
    problem = ContrastProblem.random(9, 8, m=12, classes=2, **bounds)
    arguments = (problem.anchors.to(dtype), problem.labels, problem.descriptors)
    options = {"key_labels": problem.key_labels, "key_descriptors": problem.key_descriptors, **bounds}
    want, wanted = calls.patch_contrast(*arguments, keys=problem.keys.to(dtype), **options)
    got, grads = calls.patch_contrast(
        *map(apart, arguments), keys=apart(problem.keys.to(dtype)), **{k: apart(v) for k, v in options.items()}
    )
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_backward_takes_saved_outputs_of_any_strides_and_gives_no_gradient_of_keys_that_are_anchors() -> None:
    x = contrast_arguments(Side(torch.randn(9, 8), torch.randint(0, 2, (9,))))
    out = calls.contrast_outputs(x)
    strided = out._replace(
        max_logit=apart(out.max_logit), log_sum=apart(out.log_sum), num_positives=apart(out.num_positives)
    )
    want, of_keys = calls.contrast_gradients(torch.tensor(1.0), out, x)
    got, _ = calls.contrast_gradients(torch.tensor(1.0), strided, x, needs_keys=False)
    assert of_keys.shape == (0,)
    assert torch.equal(got, want)


def test_rows_are_copied_only_where_vectors_need_it() -> None:
    z, y = torch.randn(10, 8).bfloat16(), torch.randint(0, 2, (10,))
    moved = torch.cat([z.flatten()[:1], z.flatten()])[1:].view(10, 8)
    odd = torch.randn(10, 7).double()
    for rows, copies in ((z, set()), (moved, {"aten::clone"}), (odd, set()), (odd.float(), {"aten::constant_pad_nd"})):
        emulator.take_launches()
        x = contrast_arguments(Side(rows, y))
        asked, _ = inside("patch_contrast", lambda x=x: calls.contrast_outputs(x))
        assert set(asked) & {"aten::clone", "aten::constant_pad_nd"} == copies
        kernel = {2: "contrast_forward_mma", 4: "contrast_forward_tiles", 8: "contrast_forward_plain"}
        assert emulator.take_launches()[0] == kernel[rows.element_size()]


def test_rows_that_begin_at_16_bytes_are_not_copied() -> None:
    problem = ContrastProblem.random(5, 8).cast(torch.float32)
    called, _ = inside("patch_contrast", lambda: problem.loss())
    assert "aten::clone" not in called


def test_masks_whose_strides_exceed_32_bits_match_the_reference() -> None:
    # Pages that are not written take no memory.
    row = 2**31 + 8
    problem = ContrastProblem.random(3, 8, m=5)
    masks = []
    for _ in range(2):
        mask = torch.empty(2 * row + 5, dtype=torch.bool).as_strided((3, 5), (row, 1))
        masks.append(mask.copy_(torch.rand(3, 5) < 0.5))
    problem.options = {"positive_mask": masks[0], "negative_mask": masks[1]}
    assert_contrast(problem, torch.float32)
    assert_contrast(problem, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_of_what_the_backward_pass_takes(dtype: torch.dtype) -> None:
    problem = ContrastProblem.random(35, 16, m=40).cast(dtype)
    x = contrast_arguments(
        Side(problem.anchors.detach(), problem.labels),
        Side(problem.keys.detach(), problem.key_labels),
        Choice(positive_mask=torch.rand(35, 40) < 0.3, negative_mask=torch.rand(35, 40) < 0.5),
        allow_tf32=False,
    )
    moved = ContrastArguments.nested(shifted(t) if isinstance(t, Tensor) else t for t in x.flat())
    out = calls.contrast_outputs(x)
    torch.testing.assert_close(calls.contrast_outputs(moved).loss, out.loss)
    upstream = torch.ones_like(out.loss)
    want = calls.contrast_gradients(upstream, out, x)
    got = calls.contrast_gradients(shifted(upstream), ContrastOutputs(*map(shifted, out)), moved)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_of_every_tensor(dtype: torch.dtype) -> None:
    problem = ContrastProblem.random(
        40, 16, m=50, max_positive_disparity=torch.rand(40), min_negative_disparity=torch.rand(40) / 3
    )
    ours = problem.cast(dtype)
    moved = ContrastProblem(
        *(shifted(t.detach()) for t in (ours.anchors, ours.labels, ours.descriptors, ours.keys, ours.key_labels)),
        shifted(ours.key_descriptors),
        {name: shifted(v) if isinstance(v, Tensor) else v for name, v in ours.options.items()},
    )
    (want, wanted), (got, grads) = (
        calls.patch_contrast(
            p.anchors,
            p.labels,
            p.descriptors,
            keys=p.keys,
            key_labels=p.key_labels,
            key_descriptors=p.key_descriptors,
            **p.options,
        )
        for p in (ours, moved)
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
