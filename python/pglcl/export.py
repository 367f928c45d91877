"""The network of a run as a file that other programs read: TorchScript or ONNX."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pglcl.errors import UserError
from pglcl.files import replacing
from pglcl.model import TrainedModel, load_model
from pglcl.outputs import check_outputs

SUFFIXES = {"torchscript": ".ts", "onnx": ".onnx"}
INSTALL = "pip install '.[export]'"
TOLERANCE = 1e-4  # of the largest logit: other programs sum in another order


class Logits(nn.Module):
    """The network, of which only the logits are used."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *S), prepared as in training, to logits (B, K, *S)."""
        logits: Tensor = self.network(image)
        return logits


def export_run(
    run: Path,
    kind: str,
    output: Path | None = None,
    *,
    weights: str = "last",
    overwrite: bool = False,
    print_line: Callable[[str], None] | None = None,
) -> tuple[Path, float]:
    """Writes the network of `run`, reads it back, and compares its logits.

    The exported network takes any size of batch, and images whose sides are multiples of the network's stride.

    Args:
        run: the folder that training wrote.
        kind: "torchscript" or "onnx".
        output: the file; default: model.ts or model.onnx in the run.
        weights: as :func:`pglcl.model.load_model` takes them.
        overwrite: replace `output` if it exists.
        print_line: gets a line if the run is unfinished.

    Returns:
        The file, and the largest difference of a logit, as a share of the largest logit.

    Raises:
        UserError: an unknown format, a missing package, a file in the way, or logits that are not the same.
    """
    if kind not in SUFFIXES:
        raise UserError(f"--format must be one of {', '.join(SUFFIXES)}, got {kind}")
    missing = [n for n in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(n) is None]
    if kind == "onnx" and missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}. From the source folder: {INSTALL}")
    path = output or run / f"model{SUFFIXES[kind]}"
    model = load_model(run, "cpu", weights)
    of_the_run = [file for file in run.iterdir() if file.suffix not in SUFFIXES.values()]
    check_outputs([path], inputs=of_the_run, overwrite=overwrite)
    if print_line and weights == "last" and not model.finished:
        print_line(model.unfinished(run))
    network = Logits(model.network).eval()
    save, load = {"torchscript": (_save_script, _load_script), "onnx": (_save_onnx, _load_onnx)}[kind]
    with replacing(path, new=not overwrite) as partial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' warnings to their own developers
            save(network, _example(model, 2), partial, description(model))
        difference = _compare(model, network, load(partial))
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path}: was not written: logits of the exported network differ by {difference:.2g} of the largest "
                f"logit, more than {TOLERANCE:g}"
            )
    return path, difference


def description(model: TrainedModel) -> dict[str, Any]:
    """The facts that a program needs to run the network; the exported file holds them as "pglcl"."""
    config = model.config
    return {
        "classes": [
            model.class_names.get(k, "background" if k == 0 else f"class {k}") for k in range(model.num_classes)
        ],
        "label_values": model.labels.describe(),
        "intensity": model.intensity.state(),
        "channels": model.channels,
        "network": config.network,
        "spatial_dims": config.spatial_dims,
        "size": list(config.size),
        "stride": model.network.stride,
        "slices": config.slices if config.spatial_dims == 2 else None,
        "spacing": config.target_spacing,
        "slice_axis": model.slice_axis,
        "voxels_seen": model.resolution.state() if model.resolution else None,
        "values_seen": model.levels.state() if model.levels else None,
        "step": model.step,
        "steps": config.steps,
    }


def _example(model: TrainedModel, batch: int, more: int = 0) -> Tensor:
    """A batch of noise. Each axis is longer by `more` strides than in training."""
    generator = torch.Generator().manual_seed(batch + more)
    size = [n + more * model.network.stride for n in model.config.size]
    return torch.randn(batch, model.channels, *size, generator=generator)


@torch.no_grad()
def _compare(model: TrainedModel, network: nn.Module, exported: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of the logits, as a share of the largest, over several sizes of batch and image."""
    worst = 0.0
    for batch, more in ((1, 0), (2, 0), (3, 1)):
        image = _example(model, batch, more)
        expected, got = network(image), exported(image)
        if got.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
    return worst


@torch.no_grad()
def _save_script(network: nn.Module, example: Tensor, path: Path, about: dict[str, Any]) -> None:
    script = torch.jit.trace(network, example, check_trace=False)
    with path.open("wb") as file:  # torch itself cannot open a file whose name is not UTF-8
        torch.jit.save(script, file, _extra_files={"pglcl": json.dumps(about)})


def _load_script(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        loaded: Callable[[Tensor], Tensor] = torch.jit.load(file)
    return loaded


@torch.no_grad()
def _save_onnx(network: nn.Module, example: Tensor, path: Path, about: dict[str, Any]) -> None:
    import onnx

    axes = {0: "batch", **{axis: f"side{axis - 1}" for axis in range(2, example.ndim)}}
    torch.onnx.export(
        network, (example,), str(path), input_names=["image"], output_names=["logits"], opset_version=17,
        dynamic_axes={"image": axes, "logits": axes}, dynamo=False,
    )  # fmt: skip
    content = onnx.load(str(path))
    onnx.helper.set_model_props(content, {"pglcl": json.dumps(about)})
    onnx.checker.check_model(content)
    onnx.save(content, str(path))


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
