"""Batches depend on seed, rank and step alone; test volumes are never opened."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import pytest
import torch
from pglcl.batches import StepBatches, loader
from pglcl.prepare import normalise
from pglcl.train import Training
from pglcl.training_data import TrainingData, load_training_data

from tests.pglcl.folders import decathlon, plain, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return load_training_data(plain(tmp_path_factory.mktemp("plain")), tiny())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_shapes_before_and_after_warm_up(data: TrainingData) -> None:
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
    for step, batch in zip(range(2, 8), loader(batches, 2, workers)):
        assert same(batch, batches[step])


def test_patches_of_volumes_with_channels(tmp_path: Path) -> None:
    config = tiny(spatial_dims=3, image_size="16,16,16")
    data = load_training_data(decathlon(tmp_path), config)
    batch = StepBatches(data.labelled, data.unlabelled, config)[4]
    assert batch["image"].shape == (2, 2, 16, 16, 16)
    assert batch["strong"].shape == (2, 2, 16, 16, 16)
    assert data.num_classes == 3


def test_normalised(tmp_path: Path) -> None:
    x = torch.randn(2, 9, 9, 9) * torch.tensor([3.0, 50.0])[:, None, None, None] + 7
    y = normalise(x)
    torch.testing.assert_close(y.mean(dim=(1, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(dim=(1, 2, 3)), torch.ones(2), atol=1e-2, rtol=0)
    assert torch.isfinite(normalise(torch.full((1, 4, 4, 4), 5.0))).all()


@pytest.mark.parametrize("method", ["supervised", "patchcl"])
def test_training_never_opens_a_test_volume(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[str] = set()
    load = nib.load

    def recording(path, *arguments, **options):
        opened.add(f"{Path(path).parent.name}/{Path(path).name}")
        return load(path, *arguments, **options)

    monkeypatch.setattr(nib, "load", recording)
    run = Training(plain(tmp_path / "data"), tmp_path / "run", tiny(method=method, validate_every=4), quiet=True)
    run.run()
    # case00, case01 labelled; case02, case06, case07 unlabelled; case03 for validation; case04, case05 for the test.
    seen = {name for name in opened if name.startswith(("images/", "labels/"))}
    assert "images/case00.nii.gz" in seen
    assert "labels/case03.nii.gz" in seen
    assert not [name for name in seen if "case04" in name or "case05" in name]
    assert "labels/case02.nii.gz" not in seen  # its label file is there; nobody looked
