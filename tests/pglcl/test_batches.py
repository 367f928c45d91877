"""Batches depend on seed, rank and step alone. Test volumes do not change the training."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from monai.transforms import Compose
from pglcl import formats
from pglcl.batches import StepBatches, loader
from pglcl.model import load_model
from pglcl.train import Training
from pglcl.training_data import TrainingData, load_training_data

from tests.pglcl.folders import decathlon, plain, save, tiny, volume


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return load_training_data(plain(tmp_path_factory.mktemp("plain")), tiny())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_batches_have_unlabelled_views_only_after_the_warm_up(data: TrainingData) -> None:
    batches = StepBatches(data.labelled, data.unlabelled, tiny(flips="all"))
    assert {name: tuple(t.shape) for name, t in batches[0].items()} == {"image": (4, 1, 32, 32), "label": (4, 32, 32)}
    after = batches[3]
    assert {name: tuple(t.shape) for name, t in after.items()} == {
        "image": (2, 1, 32, 32),
        "label": (2, 32, 32),
        "weak": (2, 1, 32, 32),
        "strong": (2, 1, 32, 32),
    }
    assert not torch.equal(after["weak"], after["strong"])
    assert all(torch.isfinite(t).all() for t in after.values())
    assert set(after["label"].unique().tolist()) <= {-1, 0, 1, 2}


def test_a_batch_depends_on_its_step_alone(data: TrainingData) -> None:
    first, second = (StepBatches(data.labelled, data.unlabelled, tiny()) for _ in range(2))
    later = [second[step] for step in (7, 2, 5)]  # in another order
    assert same(first[2], later[1])
    assert same(first[7], later[0])
    assert not same(first[5], first[6])
    assert not same(StepBatches(data.labelled, data.unlabelled, tiny(), rank=1)[5], first[5])
    assert not same(StepBatches(data.labelled, data.unlabelled, tiny(seed=1))[5], first[5])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(data: TrainingData, workers: int) -> None:
    batches = StepBatches(data.labelled, data.unlabelled, tiny())
    made = list(itertools.islice(loader(batches, 2, workers), 6))
    assert len(made) == 6
    assert all(same(batch, batches[step]) for step, batch in enumerate(made, 2))


def test_parts_of_slices_keep_their_resolution(tmp_path: Path) -> None:
    """A part is a window of a slice, unchanged but for the augmentation. Half of the labelled ones show a class."""
    config = tiny(image_size="16", batch_size=16, warmup=0)
    data = load_training_data(plain(tmp_path, shape=(90, 80, 3)), config)
    for one in data.labelled:
        assert one.label is not None
        one.label[:] = 0
        one.label[40:52, 30:42] = 1
    batches = StepBatches(data.labelled, data.unlabelled, config)
    batches.geometric = batches.intensities = Compose([])
    parts, windows = [batches[step] for step in range(8)], []
    for pool in (data.labelled, data.unlabelled):
        windows.append(torch.cat([one.image[0].unfold(0, 16, 1).unfold(1, 16, 1).flatten(0, 2) for one in pool]))
    for batch in parts:
        for images, known in zip((batch["image"], batch["weak"]), windows, strict=True):
            assert all((image[0] == known).flatten(1).all(dim=1).any() for image in images)
    centred = torch.cat([batch["label"][:, 8, 8] > 0 for batch in parts])
    assert 0.4 < centred.float().mean() < 0.65  # one in 50 without a preference


def test_patches_of_volumes_have_all_channels(tmp_path: Path) -> None:
    config = tiny(spatial_dims=3, image_size="16,16,16")
    data = load_training_data(decathlon(tmp_path), config)
    batch = StepBatches(data.labelled, data.unlabelled, config)[4]
    assert batch["image"].shape == (2, 2, 16, 16, 16)
    assert batch["strong"].shape == (2, 2, 16, 16, 16)
    assert data.num_classes == 3


@pytest.mark.parametrize("method", ["supervised", "patchcl"])
def test_volumes_of_the_test_change_no_weight(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    reader = formats.read

    def recording(path: Path, **options: bool) -> object:
        read.add(f"{path.parent.name}/{path.name}")
        return reader(path, **options)

    monkeypatch.setattr(formats, "read", recording)
    # case00, case01 labelled; case02, case06, case07 unlabelled; case03 for validation; case04, case05 for the test.
    root, models = plain(tmp_path / "data"), []
    for run in ("first", "second"):
        Training(root, tmp_path / run, tiny(method=method, validate_every=4), quiet=True).run()
        models.append(load_model(tmp_path / run).network.state_dict())
        for name in ("case04", "case05"):
            other, label = volume(77)
            save(root / "images" / f"{name}.nii.gz", 1000 * other)
            save(root / "labels" / f"{name}.nii.gz", 2 - label)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert {"images/case00.nii.gz", "labels/case03.nii.gz"} <= read
    assert "labels/case05.nii.gz" in read  # it is checked before the training begins
    assert "labels/case02.nii.gz" not in read  # it has a label file, which must not be read
