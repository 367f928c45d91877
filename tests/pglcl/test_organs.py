"""The classes of which a pseudo-label keeps only the largest component."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pglcl.organs import organs_of_pseudo_labels
from pglcl.training_data import load_training_data

from tests.pglcl.folders import save, tiny


@pytest.fixture(scope="module")
def rings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class 1 is a ring around class 2, a disc."""
    root = tmp_path_factory.mktemp("rings")
    far = np.hypot(*np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5, indexing="ij"))
    label = np.where(far < 6, 2, (far > 24) & (far < 28)).astype(np.uint8)[..., None].repeat(4, axis=2)
    for i in range(4):
        noise = np.random.default_rng(i).normal(0, 0.1, label.shape)
        save(root / "images" / f"{i}.nii.gz", (label + noise).astype(np.float32))
        save(root / "labels" / f"{i}.nii.gz", label)
    return root


@pytest.mark.parametrize(
    ("options", "organs"),
    [
        ({"slices": "whole", "image_size": "32"}, [(1,), (2,)]),
        ({"slices": "crop", "image_size": "64"}, [(1,), (2,)]),
        ({"slices": "crop", "image_size": "32"}, [(2,)]),  # a part shows two arcs of the ring
        ({"spatial_dims": 3, "image_size": "64,64,16"}, [(1,), (2,)]),
        ({"slices": "crop", "image_size": "32", "clean_pseudo_labels": "largest-component"}, [(1,), (2,)]),
        ({"slices": "crop", "image_size": "32", "clean_pseudo_labels": "none"}, []),
        ({"slices": "crop", "image_size": "64", "method": "supervised"}, []),
    ],
    ids=str,
)
def test_a_class_that_parts_cut_in_pieces_is_no_organ(
    options: dict[str, object], organs: list[tuple[int, ...]], rings: Path
) -> None:
    config = tiny(**options, labelled=1, validation=1, test=1)
    assert organs_of_pseudo_labels(config, load_training_data(rings, config)) == organs
