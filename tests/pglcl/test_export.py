"""Exported networks give the logits of the run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from pglcl import export
from pglcl.cli import main
from pglcl.files import save_tensors
from pglcl.intensity import Channel, Intensity
from pglcl.labels import LabelMap
from pglcl.model import TrainedModel, load_model, network_for
from pglcl.train import Interrupted, Training

from tests.pglcl.folders import tiny

Trained = tuple[Path, Path]


def test_torchscript_gives_the_same_logits(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = trained[1], tmp_path / "network.ts"
    assert main(["export", str(run), "--format", "torchscript", "-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    about = {"pglcl": ""}
    script = torch.jit.load(str(path), _extra_files=about)
    image = torch.randn(3, 1, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(script(image), load_model(run).network(image))
    assert json.loads(about["pglcl"])["classes"] == ["background", "label 1", "label 2"]
    assert main(["export", str(run), "--format", "torchscript", "-o", str(path)]) == 2
    assert "exists; add --overwrite" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "torchscript", "-o", str(run / "model.pt"), "--overwrite"]) == 2
    assert main(["export", str(run), "--format", "tflite", "-o", str(tmp_path / "x")]) == 2
    assert "--format must be one of torchscript, onnx, got tflite" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
@pytest.mark.parametrize(
    ("name", "dims", "channels"),
    [("basicunet", 2, "4,8,8,8,8"), ("dynunet", 2, "4,8,8"), ("segresnet", 2, "8,16,32"), ("dynunet", 3, "4,8,8")],
)
def test_each_network_is_exported_with_the_same_logits(
    name: str, dims: int, channels: str, kind: str, tmp_path: Path
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    size = "32" if dims == 2 else "16"
    config = tiny(network=name, channels=channels, spatial_dims=dims, image_size=size)
    intensity = Intensity((Channel("none"),), "")
    labels = LabelMap.of_values([1, 2])
    model = TrainedModel(network_for(config, 1, 3), config, 2 if dims == 2 else None, labels, intensity)
    save_tensors(tmp_path / "run" / "model.pt", model.state())
    path, difference = export.export_run(tmp_path / "run", kind)
    assert path.exists()
    assert difference < 1e-4
    assert export.description(load_model(tmp_path / "run"))["network"] == name


def test_a_file_with_other_logits_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = export._load_script
    monkeypatch.setattr(export, "_load_script", lambda path: lambda image: load(path)(image) + 0.01)
    assert main(["export", str(trained[1]), "--format", "torchscript", "-o", str(tmp_path / "network.ts")]) == 2
    assert "was not written: logits of the exported network differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_onnx_gives_the_same_logits(trained: Trained, tmp_path: Path) -> None:
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    run, path = trained[1], tmp_path / "network.onnx"
    assert main(["export", str(run), "--format", "onnx", "-o", str(path), "-q"]) == 0
    session = onnxruntime.InferenceSession(str(path))
    image = torch.randn(1, 1, 64, 32)
    with torch.no_grad():
        expected = load_model(run).network(image)
    found = torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert json.loads(onnx.load(str(path)).metadata_props[0].value)["spatial_dims"] == 2


def test_export_says_that_a_run_is_unfinished(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    training = Training(trained[0], run, tiny(validate_every=2, checkpoint_every=2), quiet=True)
    training.stop.asked = True
    with pytest.raises(Interrupted):
        training.run()
    arguments = ["export", str(run), "--format", "torchscript", "-o"]
    assert main([*arguments, str(tmp_path / "a.ts")]) == 0
    assert f"pglcl: {run}: unfinished, step 1 of 8" in capsys.readouterr().err
    about = {"pglcl": ""}
    torch.jit.load(str(tmp_path / "a.ts"), _extra_files=about)
    found = json.loads(about["pglcl"])
    assert (found["step"], found["steps"]) == (1, 8)
    assert found["voxels_seen"]["units"] == ["mm"]
    Training(trained[0], run, tiny(validate_every=2, checkpoint_every=2), resume=True, quiet=True).run()
    assert main([*arguments, str(tmp_path / "b.ts")]) == 0
    assert main([*arguments, str(tmp_path / "best.ts"), "--weights", "best"]) == 0
    assert capsys.readouterr().err == ""
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        best = torch.jit.load(str(tmp_path / "best.ts"))(image)
        torch.testing.assert_close(best, load_model(run, weights="best").network(image))


@pytest.mark.skipif(importlib.util.find_spec("onnx") is not None, reason="onnx is installed")
def test_missing_packages_of_onnx_are_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained[1]), "--format", "onnx", "-o", str(tmp_path / "network.onnx")]) == 2
    assert "--format onnx needs onnx" in capsys.readouterr().err
