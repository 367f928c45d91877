"""The pairs that the report draws are those of the loss."""

from __future__ import annotations

import pytest
import torch
from pglcl.bases import ViewBatch
from pglcl.contrast import Guidance, PatchContrast
from pglcl.pairs import choose_pairs, pairs_of_prediction, qualifying, rows_of_patches

from pglcl_ext import PatchRows
from tests.pglcl.folders import tiny
from tests.pglcl.steps import networks


def rows(labels: list[int], entropy: list[float], coverage: list[float]) -> PatchRows:
    """A row for each patch, one patch to each class."""
    index = torch.arange(len(labels))[:, None].expand(-1, 3)
    return PatchRows(torch.tensor(labels), torch.tensor(entropy), torch.tensor(coverage), index)


@pytest.mark.parametrize(("options", "anchor", "positives", "negatives"), [
    ({}, 0, [1], [4, 5, 6]),
    ({"mixed_patches": "together"}, 0, [1, 2], [4, 5, 6]),
    ({"mixed_patches": "leave-out"}, 2, [], [4, 5, 6]),
    ({"mixed_patches": "leave-out", "guidance": False}, 2, [3], [4, 5, 6]),
    ({"guidance": False}, 0, [1], [4, 5, 6]),
    ({"guidance": False, "mixed_patches": "together"}, 0, [1, 2, 3], [4, 5, 6]),
    ({"min_negative_disparity": 0.5}, 0, [1], [4, 6]),
    ({"min_negative_disparity": 0.5, "mixed_patches": "together"}, 0, [1, 2], [4]),
])  # fmt: skip
def test_pairs_follow_the_options(options: dict, anchor: int, positives: list[int], negatives: list[int]) -> None:
    """Patches 0 and 1 are mixed, 2 and 3 filled, all of class 1; 4 and 6 are filled, 5 is mixed. K = 3."""
    keys = rows([1, 1, 1, 1, 0, 2, 2], [0.9, 0.7, 0.65, 0.1, 0.0, 0.8, 0.6], [0.5, 0.6, 0.95, 1.0, 1.0, 0.7, 1.0])
    config = tiny(**{"max_positive_disparity": 0.3, "inside_coverage": 0.9, **options})
    found = choose_pairs(Guidance(config, 3), keys, keys)
    assert found.anchor.index.tolist() == keys.index[[anchor]].tolist()
    assert found.positive.nonzero().flatten().tolist() == positives
    assert found.negative.nonzero().flatten().tolist() == negatives


@pytest.mark.parametrize("patches", ["pooled", "crop"])
def test_a_patch_has_a_row_for_each_class_as_in_training(patches: str) -> None:
    config = tiny(patches=patches, patch_size=4, **({"crops_per_class": 100} if patches == "crop" else {}))
    p = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=1)
    found = rows_of_patches(config, p, p.amax(dim=1))
    assert len(found.labels) > 16  # patches

    contrast, (network, _) = PatchContrast(config, 3), networks()
    contrast.threshold.value.zero_()
    image = torch.randn(1, 1, 16, 16)
    ones = torch.ones(1, 16, 16)
    views = ViewBatch(image, p.argmax(dim=1), ones, p.amax(dim=1), ones.bool(), p, 1)
    batch = contrast.patches(
        network, views, views.class_weights(3), torch.randn(1, 8, 8, 8), 0, torch.Generator().manual_seed(0)
    )
    assert torch.equal(found.labels, batch.labels)
    torch.testing.assert_close((found.entropy, found.coverage), (batch.entropy, batch.coverage))
    assert torch.equal(found.index[:, 1:], batch.index[:, 1:] * (4 if patches == "pooled" else 1))


def test_the_best_covered_rows_of_each_class_qualify() -> None:
    keys = rows([0, 1, 1, 1, 1, 1], [0.0] * 6, [0.1, 0.5, 0.2, 0.9, 0.4, 0.3])
    assert qualifying(keys, 0.6).coverage.tolist() == pytest.approx([0.1, 0.5, 0.9, 0.4])


@pytest.mark.parametrize("patches", ["pooled", "crop"])
@pytest.mark.parametrize("shape", [(16, 24), (12, 16, 4)])
def test_the_anchor_is_foreground_and_not_its_own_positive(shape: tuple[int, ...], patches: str) -> None:
    """In two dimensions and in three: the anchor is of the foreground, and is not its own positive."""
    config = tiny(patches=patches, patch_size=4, mixed_patches="together", guidance=False)
    p = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1)
    found = pairs_of_prediction(config, p)
    label = int(found.anchor.labels)
    assert label > 0
    others = (found.keys.labels == label) & (found.keys.index != found.anchor.index).any(dim=1)
    assert torch.equal(found.positive, others)
    assert torch.equal(found.negative, found.keys.labels != label)
    # No pixel is certain enough: the keys take the place of the anchors.
    vague = pairs_of_prediction(config, torch.full_like(p, 1 / 3))
    assert int(vague.anchor.labels) == 0
