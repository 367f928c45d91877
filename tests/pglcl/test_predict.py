"""Predictions: restored resolution, averages, post-processing, output files and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pglcl import cli, predict
from pglcl.cli import main
from pglcl.errors import UserError
from pglcl.labels import LabelMap
from pglcl.layouts import Case
from pglcl.model import load_model
from pglcl.postprocess import each_class, keep_largest
from pglcl.predict import FlipAverage, Part, Prediction, Predictor, network_output, restore_rows
from pglcl.train import Training
from pglcl.volumes import Geometry
from torch import nn

from pglcl_ext.patch_statistics import pixel_entropy
from tests.pglcl.folders import STRAIGHT, nnunet, plain, tiny, volume, write

Trained = tuple[Path, Path]


def case(root: Path, number: int = 0) -> Case:
    return Case(f"case{number:02d}", "p", (root / "images" / f"case{number:02d}.nii.gz",), None)


@pytest.mark.parametrize("resized", [(9, 12, 5), (7, 12, 9), (20, 31, 5), (1, 12, 5)])
def test_a_volume_restored_by_slabs_equals_the_whole(resized: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume that is restored slab by slab is the same as one restored at once, up to rounding."""
    geometry = Geometry((13, 17, 5), resized)
    p = torch.randn(3, *(n + 2 for n in resized)).softmax(dim=0)
    whole = geometry.restore(p)
    for rows in (1, 4, 13):
        parts = [restore_rows(Part(p, geometry), slice(a, min(13, a + rows))) for a in range(0, 13, rows)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    monkeypatch.setattr("pglcl.predict.SLAB_ELEMENTS", 3 * 17 * 5 * 2)
    prediction = Prediction([Part(p, geometry)], lambda mask: mask)
    assert len(list(prediction.slabs())) == 7
    torch.testing.assert_close(prediction.probabilities(), whole / whole.sum(dim=0))
    assert torch.equal(prediction.mask(), prediction.probabilities().argmax(dim=0).to(torch.uint8))
    torch.testing.assert_close(prediction.entropy(), pixel_entropy(whole / whole.sum(dim=0), dim=0))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"image_size": "16", "channels": "4,8"}, (2, 40, 21, 3)),
        ({"image_size": "16,32", "channels": "4,8"}, (2, 16, 32, 1)),
        ({"spatial_dims": 3, "image_size": "16", "channels": "4,8"}, (2, 40, 21, 16)),
    ],
)
def test_windows_cover_a_slice_or_volume(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """A network that looks at single voxels gives the same in windows as in the whole."""
    config, shares = tiny(**options), []
    image = torch.randn(shape)
    network = (nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d)(2, 3, 1)
    logits = network_output(network, image, config, shares.append)
    expected = torch.einsum("kc,c...->k...", network.weight.detach().flatten(1), image)
    expected += network.bias.detach()[:, None, None, None]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert shares[-1] == 1
    assert shares == sorted(shares)


def test_runs_are_averaged(trained: Trained) -> None:
    root, run = trained
    model, other = load_model(run), load_model(run)
    with torch.no_grad():
        for p in other.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    one, two = (Predictor([m])(case(root))[0].probabilities() for m in (model, other))
    both = Predictor([model, other])(case(root))[0].probabilities()
    assert not torch.allclose(one, two, atol=1e-3)
    torch.testing.assert_close(both, (one + two) / 2)
    other.labels = LabelMap.of_values([1, 2, 3])
    with pytest.raises(UserError, match="must agree: labels of run 1 are 0,1,2, of run 2 0,1,2,3"):
        Predictor([model, other])


@pytest.mark.parametrize("dims", [2, 3])
def test_flips_are_averaged(dims: int) -> None:
    """The average of a network that depends on the position does not depend on the side."""
    weights = torch.randn(3, *(4,) * dims)
    network = torch.nn.Module()
    network.forward = lambda x: x.expand(-1, 3, *x.shape[2:]) * weights  # type: ignore[method-assign]
    average = FlipAverage(network, dims)
    assert len(average.flips) == 2**dims
    x = torch.randn(2, 1, *(4,) * dims)
    p = average(x).exp()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(2, *(4,) * dims))
    torch.testing.assert_close(average(x.flip(2)).exp(), p.flip(2))
    by_hand = [network(x.flip(axes)).softmax(dim=1).flip(axes) for axes in average.flips]
    torch.testing.assert_close(p, torch.stack(by_hand).mean(dim=0))


def test_flips_are_refused_for_a_model_trained_without_them(trained: Trained, tmp_path: Path) -> None:
    root, run = trained
    model = load_model(run)
    plainly, flipped = (Predictor([model], tta=tta)(case(root))[0].probabilities() for tta in ("none", "flips"))
    assert not torch.equal(plainly, flipped)
    Training(root, tmp_path / "run", tiny(steps=1, warmup=0, method="supervised"), quiet=True).run()
    with pytest.raises(UserError, match="--tta flips: the model was trained without mirrored images"):
        Predictor([load_model(tmp_path / "run")], tta="flips")
    with pytest.raises(UserError, match="--tta must be one of none, flips, got turns"):
        Predictor([model], tta="turns")


def test_the_largest_component_is_kept() -> None:
    mask = torch.zeros(12, 12, 6, dtype=torch.uint8)
    mask[1:4, 1:4, 1:4] = 1
    mask[4, 4, 4] = 1  # touches at a corner
    mask[8:10, 8:10, 1] = 1
    mask[9, 9, 4] = 2  # the only one of its class
    kept = keep_largest(mask, each_class(4))
    assert int((kept == 1).sum()) == 28
    assert kept[4, 4, 4] == 1
    assert kept[9, 9, 4] == 2
    assert int((mask == 1).sum()) == 32  # a copy
    assert torch.equal(keep_largest(kept, each_class(3)), kept)
    assert torch.equal(keep_largest(mask, [(2,)]), mask)
    two = torch.zeros(5, 5, 5, dtype=torch.int32)
    two[0, 0, 0] = two[4, 4, 4] = 300
    assert keep_largest(two, [(300,)]).nonzero().tolist() == [[0, 0, 0]]  # of the same size: the first


def test_post_processing_changes_the_mask_alone(trained: Trained, tmp_path: Path) -> None:
    root, run = trained
    scan = str(root / "images" / "case00.nii.gz")
    for name in ("none", "largest-component"):
        out = str(tmp_path / name)
        assert main(["predict", str(run), scan, "-o", out, "--postprocess", name, "--probabilities"]) == 0
    before, after = (nib.load(tmp_path / n / "case00.nii.gz") for n in ("none", "largest-component"))
    expected = keep_largest(torch.from_numpy(np.asarray(before.dataobj).copy()), each_class(3))
    np.testing.assert_array_equal(np.asarray(after.dataobj), expected.numpy())
    one, two = ((tmp_path / n / "case00_probabilities.nii.gz").read_bytes() for n in ("none", "largest-component"))
    assert one == two


def test_predictions_never_replace_their_input(trained: Trained, tmp_path: Path) -> None:
    run = trained[1]
    root = plain(tmp_path / "data", 2, unlabelled=0)
    scan, label = root / "images" / "case00.nii.gz", root / "labels" / "case00.nii.gz"
    before = {path: path.read_bytes() for path in (scan, label)}
    (tmp_path / "link").symlink_to(root / "images")
    for folder in (root / "images", root / "images" / ".." / "images", tmp_path / "link", root / "labels"):
        for more in ([], ["--overwrite"]):
            assert main(["predict", str(run), str(scan), "-o", str(folder), *more]) == 2
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(scan, alone / "scan.nii.gz")
    assert main(["predict", str(run), str(alone / "scan.nii.gz"), "-o", str(alone), "--overwrite"]) == 2
    assert (alone / "scan.nii.gz").read_bytes() == scan.read_bytes()
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((root / "labels").iterdir())) == 2


def test_masks_in_the_folder_of_the_images_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks of another format would replace no image, but would be predicted next time."""
    folder = tmp_path / "scans"
    write(folder / "scan.mhd", volume(0)[0], STRAIGHT)
    (tmp_path / "link").symlink_to(folder)
    for output in (folder, tmp_path / "link", folder / ".." / "scans"):
        assert main(["predict", str(trained[1]), str(folder), "-o", str(output), "--overwrite"]) == 2
        assert "holds the images, and masks in it would be read as images next time" in capsys.readouterr().err
    assert sorted(path.suffix for path in folder.iterdir()) in ([".mhd", ".raw"], [".mhd", ".zraw"])
    assert main(["predict", str(trained[1]), str(folder), "-o", str(folder / "masks")]) == 0


def test_masks_among_the_labels_of_another_data_set_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would silently make its unlabelled images labelled ones."""
    scan = write(tmp_path / "scans" / "case05.nii.gz", volume(0)[0])
    for other, folder in ((plain(tmp_path / "plain", 6), "labels"), (nnunet(tmp_path / "nnunet"), "labelsTr")):
        before = sorted((other / folder).iterdir())
        for output in (other / folder, other / folder / "more", other):
            assert main(["predict", str(trained[1]), str(scan), "-o", str(output), "--overwrite"]) == 2
            assert f"lies in the data folder {other}" in capsys.readouterr().err
        assert sorted((other / folder).iterdir()) == before
        assert main(["predict", str(trained[1]), str(scan), "-o", str(other / "predicted"), "-q"]) == 0


def test_masks_in_the_folder_of_the_labels_of_a_list_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = plain(tmp_path / "data", 3, unlabelled=0)
    (root / "labels").rename(root / "truth")
    rows = [f"images/case0{i}.nii.gz,truth/case0{i}.nii.gz" for i in range(3)]
    (root / "list.csv").write_text("\n".join(["image,label", *rows]))
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(root / "list.csv")}))
    before = (root / "truth" / "case00.nii.gz").read_bytes()
    images = str(root / "images")
    assert main(["predict", str(run), images, "-o", str(root / "truth"), "--overwrite"]) == 2
    assert "truth: holds the labels that" in capsys.readouterr().err
    assert (root / "truth" / "case00.nii.gz").read_bytes() == before
    assert main(["predict", str(run), images, "-o", str(root / "masks"), "-q"]) == 0


def test_a_network_that_gives_nan_predicts_nothing(trained: Trained) -> None:
    """Its most probable class would be the background, everywhere."""
    root, run = trained
    model = load_model(run)
    with torch.no_grad():
        next(model.network.parameters())[0] = torch.nan
    with pytest.raises(UserError, match=r"case00\.nii\.gz: the network gives NaN"):
        Predictor([model])(case(root))


def test_an_earlier_mask_is_kept(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = trained
    scan = str(root / "images" / "case00.nii.gz")
    mask = tmp_path / "case00.nii.gz"
    mask.write_text("corrected by hand")
    assert main(["predict", str(run), scan, "-o", str(tmp_path)]) == 2
    assert "case00.nii.gz: exists; add --overwrite" in capsys.readouterr().err
    assert mask.read_text() == "corrected by hand"
    assert main(["predict", str(run), scan, "-o", str(tmp_path), "--overwrite", "-q"]) == 0
    assert nib.load(mask).shape
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_the_files_of_a_case_are_replaced_together(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the probabilities of other weights are written leaves the earlier mask, too."""
    root, run = trained
    command = ["predict", str(run), str(root / "images" / "case00.nii.gz"), "-o", str(tmp_path), "--probabilities"]
    assert main([*command, "-q"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    written: list[Path] = []

    def write_two(data: np.ndarray, source: Any, path: Path) -> None:
        path.write_text("other weights")
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_like", write_two)
    assert main([*command, "--overwrite", "-q"]) == 130
    assert len(written) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_mask_that_appears_during_the_prediction_is_kept(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = trained
    mask, write_like = tmp_path / "case00.nii.gz", predict.write_like

    def beside_another(data: np.ndarray, source: Any, path: Path) -> None:
        write_like(data, source, path)
        mask.write_text("corrected by hand")

    monkeypatch.setattr(predict, "write_like", beside_another)
    assert main(["predict", str(run), str(root / "images" / "case00.nii.gz"), "-o", str(tmp_path), "-q"]) == 1
    assert f"{mask}: appeared while this command ran, and is kept" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["corrected by hand"]


def test_two_outputs_with_one_file_name_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probabilities of one image would have the file name of another image's mask."""
    root, run = trained
    for name in ("a.nii.gz", "a_probabilities.nii.gz"):
        shutil.copy(root / "images" / "case00.nii.gz", tmp_path / name)
    out = str(tmp_path / "out")
    assert main(["predict", str(run), str(tmp_path), "-o", out, "--probabilities"]) == 2
    assert "a_probabilities.nii.gz: would be written twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unforeseen_error_does_not_end_the_batch(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of error stops its own image, and no other."""
    root, run = trained
    predict = Predictor.__call__
    errors = {
        "case01": MemoryError("Unable to allocate 7 GiB"),
        "case02": OSError(5, "Input/output error", "scan.nii.gz"),
        "case03": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
        "case04": ZeroDivisionError("division by zero"),
    }

    def sometimes(self: Predictor, case: Case, report=None):
        if case.name in errors:
            raise errors[case.name]
        return predict(self, case, report)

    monkeypatch.setattr(Predictor, "__call__", sometimes)
    assert main(["predict", str(run), str(root / "images"), "-o", str(tmp_path)]) == cli.BUG
    assert len(list(tmp_path.iterdir())) == 4
    text = capsys.readouterr().err
    assert "skipped case01: out of memory: Unable to allocate 7 GiB" in text
    assert "skipped case02: scan.nii.gz: Input/output error" in text
    assert "skipped case03: out of memory" in text
    assert text.count("Traceback") == 1
    assert "skipped case04: this is a bug of pglcl" in text
    assert "4 of 8 images were skipped" in text


def test_a_full_disk_ends_the_batch(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = trained

    def full(image, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    assert main(["predict", str(run), str(root / "images"), "-o", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert text == f"pglcl: {tmp_path / 'case00.nii.gz'}: cannot be written: No space left on device\n"
    assert list(tmp_path.iterdir()) == []
