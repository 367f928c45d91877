"""Components: how they are counted and kept, and when a class is a single organ."""

from __future__ import annotations

import pytest
import torch
from pglcl.postprocess import clean, components, each_class, keep_largest, single_organs


@pytest.mark.parametrize("dims", [2, 3])
def test_the_largest_component_of_each_named_class_is_kept(dims: int) -> None:
    mask = torch.zeros((9,) * dims, dtype=torch.uint8)
    mask[(slice(0, 3),) * dims] = 1
    mask[(slice(3, 5),) * dims] = 1  # touches it at a corner: one component
    mask[(slice(7, 9),) * dims] = 1
    mask[(8, *[0] * (dims - 1))] = 2
    mask[(slice(6, 8), 3, *[3] * (dims - 2))] = 2
    assert components(mask, 1) == components(mask, 2) == 2
    kept = keep_largest(mask, [(1,)])
    assert (kept == 1).sum() == 3**dims + 2**dims
    assert (kept == 2).sum() == 3
    assert (keep_largest(mask, [(1,), (2,)]) == 2).sum() == 2
    touching = mask.clone()
    touching[(5,) * dims] = 2  # of its class the smallest piece, but one with class 1
    together = keep_largest(touching, [(1, 2)])
    assert torch.equal(together == 1, kept == 1)
    assert (together == 2).nonzero().tolist() == [[5] * dims]
    assert torch.equal(keep_largest(touching, [(1, 2), (1,), (2,)]), together)
    assert (mask == 1).sum() == 3**dims + 2 * 2**dims  # it is a copy


def test_a_class_of_one_piece_is_an_organ_and_one_of_many_is_not() -> None:
    first, second = torch.zeros(2, 40, 40, dtype=torch.int8)
    first[0:20, 0:20] = 1
    first[30, 30] = 1  # 1 voxel of 801
    second[0:10, 0:10] = 1
    for i in range(5):
        second[20 + 4 * i, :8] = 2
    second[0, 30:] = -1
    candidates = [(1, 2, 3), *each_class(4)]
    assert single_organs([first, second], candidates) == [(1,)]  # class 3 occurs nowhere
    second[10:22, 8] = 2  # now it hangs together with class 1
    second[20:40, 8] = 2
    assert single_organs([first, second], candidates) == candidates[:3]


def test_no_class_and_no_image_change_nothing() -> None:
    pseudo, prediction = torch.tensor([[[1, 0, 1, 1]]]), torch.rand(1, 2, 1, 4)
    kept, certainty = clean(pseudo, prediction, [])
    assert torch.equal(kept, pseudo)
    assert torch.equal(certainty, prediction.gather(1, pseudo[:, None])[:, 0])
    kept, certainty = clean(pseudo[:0], prediction[:0], [(1,)])
    assert kept.shape == certainty.shape == (0, 1, 4)
    assert clean(pseudo, prediction, [(1,)])[0].tolist() == [[[0, 0, 1, 1]]]
