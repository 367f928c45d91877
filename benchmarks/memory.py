"""Peak memory of ``pglcl predict`` and ``evaluate`` on a large CT: 512 x 512 x 300 voxels of int16, six classes.

The networks are small and not trained: the benchmark measures the memory for a volume, not that for a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from pglcl.config import TrainConfig
from pglcl.files import save_tensors
from pglcl.intensity import Channel, Intensity
from pglcl.labels import LabelMap
from pglcl.model import TrainedModel, network_for

from benchmarks.runner import markdown

SHAPE = (512, 512, 300)
CLASSES = 6
MODELS: dict[int, dict[str, Any]] = {
    2: {"image_size": "512", "channels": "1,1", "patch_size": 4},
    3: {"image_size": "64", "channels": "1,1", "patch_size": 4},
}
COMMANDS = ("evaluate", "predict --probabilities", "predict")
LIMITS = {False: 4 * 2**30, True: 6 * 2**30}  # without and with probabilities


def run(*, threads: int) -> tuple[list[dict[str, Any]], str]:
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        volume = make_volume(folder / "data")
        for dims in MODELS:
            make_run(folder / f"run{dims}", dims)
            for command in COMMANDS:
                results.append(measure(folder, volume, dims, command, threads))
                print(results[-1], flush=True)
    return results, table(results)


def make_volume(root: Path) -> Path:
    """One labelled CT: five boxes of their own intensity, the last of which reaches from corner to corner."""
    random = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    for k in range(1, CLASSES - 1):
        corner = [int(random.integers(0, n // 2)) for n in SHAPE]
        label[tuple(slice(c, c + n // 3) for c, n in zip(corner, SHAPE, strict=True))] = k
    label[:8, :8, :8] = label[-8:, -8:, -8:] = CLASSES - 1
    coarse = random.integers(-1000, 1000, [-(-n // 32) for n in SHAPE]).astype(np.int16)
    image = np.kron(coarse, np.ones((32, 32, 32), np.int16))[tuple(map(slice, SHAPE))] // 4 + 100 * label.astype(
        np.int16
    )
    affine = np.diag([-0.8, -0.8, 1.0, 1.0])  # usual for CTs; so the axes are turned on the way to the network and back
    for name, data in (("images", image), ("labels", label)):
        (root / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(data, affine), root / name / "ct.nii.gz")
    return root / "images" / "ct.nii.gz"


def make_run(folder: Path, dims: int) -> None:
    config = TrainConfig(spatial_dims=dims, embedding_dim=8, normalise="none", **MODELS[dims])
    labels, intensity = LabelMap.of_values(range(CLASSES)), Intensity((Channel("ct", -1000, 1000, 0, 300),), "")
    torch.manual_seed(0)
    network = network_for(config, 1, CLASSES)
    for name, parameter in network.unet.named_parameters():
        if name.endswith("bias") and len(parameter) == CLASSES:
            with torch.no_grad():
                parameter[-1] += 10  # predicts the last class everywhere; its truth reaches from corner to corner
    model = TrainedModel(network, config, 2 if dims == 2 else None, labels, intensity)
    save_tensors(folder / "model.pt", model.state())


def measure(folder: Path, volume: Path, dims: int, command: str, threads: int) -> dict[str, Any]:
    """The peak memory of a process of the command, including Python and PyTorch."""
    name, *options = command.split()
    run = str(folder / f"run{dims}")
    output = str(folder / f"out{dims}{command}".replace(" ", ""))
    what = [str(volume)] if name == "predict" else [str(volume.parents[1]), "--part", "all"]
    words = [sys.executable, "-W", "ignore", "-m", "pglcl", name, run, *what, "-o", output, "-q", *options]
    began = time.monotonic()
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)}: exit code {os.waitstatus_to_exitcode(status)}")
    return {
        "dims": dims, "command": name, "probabilities": "--probabilities" in options, "bytes": 1024 * used.ru_maxrss,
        "seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for row in results:
        name = row["command"] + " --probabilities" * row["probabilities"]
        limit = LIMITS[row["probabilities"]]
        size, most = f"{row['bytes'] / 2**30:.2f} GiB", f"{limit // 2**30} GiB"
        rows.append([f"{row['dims']}-D", f"`{name}`", size, most, f"{row['cpu_seconds']:.0f} s"])
    head = ["network", "command", "peak memory", "limit", "CPU time"]
    shape = " x ".join(map(str, SHAPE))
    return f"One volume of {shape} voxels, int16, {CLASSES} classes.\n\n" + markdown(head, rows)
