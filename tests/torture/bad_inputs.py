"""Bad files, folders, options and machines of a user. Each must be refused in a line, with a documented exit code."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.pglcl.folders import TINY, plain, volume
from tests.torture.children import run_pglcl
from tests.torture.kills import flags
from tests.torture.tally import Tally

MOST_MEMORY = 2048.0  # MiB that a refusal may take
MOST_SECONDS = 60.0

Case = tuple[str, list[object]]


def attack_inputs(tally: Tally, folder: Path, draw: random.Random, count: int = -1) -> None:
    """Runs every bad input, or `count` of them, and counts how they end."""
    data, run = plain(folder / "data"), folder / "run"
    ended = run_pglcl(["train", data, "-o", run, *flags({**TINY, "steps": 4})], folder / "log")
    if ended.code:
        raise SystemExit(f"a sound run fails:\n{ended.output}")
    cases = [
        *bad_volumes(folder, data, run),
        *bad_folders(folder, data),
        *bad_options(folder, data),
        *bad_runs(folder, data, run),
    ]
    for what, arguments in cases if count < 0 else draw.sample(cases, count):
        ended = run_pglcl(arguments, folder / "log")
        if ended.memory > MOST_MEMORY or ended.seconds > MOST_SECONDS:
            tally.fault(f"{what}: {ended.memory:.0f} MiB, {ended.seconds:.0f} s")
        elif ended.refused:
            tally.good("refused in words")
        else:
            tally.fault(f"{what}: exit code {ended.code}; {ended.output[-300:]}")


def bad_volumes(folder: Path, data: Path, run: Path) -> Iterator[Case]:
    """Bad volumes, each the only image of a `pglcl predict`."""
    scans, masks = folder / "scans", folder / "masks"
    scans.mkdir()
    sound = nib.Nifti1Image(volume(0)[0], np.eye(4)).to_bytes()
    for name, content in {**bad_headers(sound), **bad_voxels()}.items():
        for ending, stored in ((".nii", content), (".nii.gz", gzip.compress(content))):
            path = scans / f"{name.replace(' ', '_')}_{len(ending)}{ending}"
            path.write_bytes(stored)
            yield f"{name}, {ending}", ["predict", run, path, "-o", masks]
    for name, stored in bad_gzip(gzip.compress(sound)).items():
        path = scans / f"gzip_{name.replace(' ', '_')}.nii.gz"
        path.write_bytes(stored)
        yield f"gzip: {name}", ["predict", run, path, "-o", masks]
    yield "no such file", ["predict", run, scans / "nothing.nii.gz", "-o", masks]
    yield "a folder without images", ["predict", run, run, "-o", masks]
    same = data / "images" / "case00.nii.gz"
    yield "the same file twice", ["predict", run, same, same, "-o", masks]
    yield "over its input", ["predict", run, same, "-o", data / "images"]
    yield "over the labels", ["predict", run, same, "-o", data / "labels"]


def bad_headers(sound: bytes) -> dict[str, bytes]:
    """Files whose header is cut or claims what is not so, made of a sound one."""

    def patched(offset: int, value: bytes) -> bytes:
        return sound[:offset] + value + sound[offset + len(value) :]

    def with_affine(rows: np.ndarray) -> bytes:
        """A file whose header has `rows` as its sform, which nibabel itself would not write."""
        return patched(252, struct.pack("<hh", 0, 1) + sound[256:280] + rows[:3].astype("<f4").tobytes())

    return {
        "empty": b"",
        "text": b"not an image\n",
        "header alone": sound[:352],
        "half": sound[: len(sound) // 2],
        "unknown datatype": patched(70, struct.pack("<h", 4711)),
        "vox_offset < 0": patched(108, struct.pack("<f", -8.0)),
        "vox_offset past the end": patched(108, struct.pack("<f", 1e9)),
        "NaN vox_offset": patched(108, struct.pack("<f", float("nan"))),
        "1500^3 voxels claimed": patched(42, struct.pack("<hhh", 1500, 1500, 1500)),
        "no dimension": patched(40, struct.pack("<h", 0)),
        "nine dimensions": patched(40, struct.pack("<h", 9)),
        "negative size": patched(42, struct.pack("<h", -3)),
        "singular affine": with_affine(np.diag([1.0, 0.0, 1.0, 1.0])),
        "NaN affine": with_affine(np.full((4, 4), np.nan)),
    }


def bad_voxels() -> dict[str, bytes]:
    """Files of voxels that are no image, or not one for this model."""

    def image(array: np.ndarray) -> bytes:
        return bytes(nib.Nifti1Image(array, np.eye(4)).to_bytes())

    with_nan = volume(0)[0]
    with_nan[0, 0, 0] = np.nan
    return {
        "complex": image(np.zeros((6, 6, 4), np.complex64)),
        "RGB voxels": image(np.zeros((6, 6, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "NaN voxel": image(with_nan),
        "five axes": image(np.zeros((6, 6, 4, 2, 2), np.float32)),
        "one axis": image(np.zeros(6, np.float32)),
        "no voxels": image(np.zeros((0, 6, 4), np.float32)),
        "two channels for one": image(np.stack([volume(0)[0]] * 2, axis=-1)),
    }


def bad_gzip(whole: bytes) -> dict[str, bytes]:
    """Compressed files that were damaged afterwards."""
    return {
        "checksum": whole[:-8] + b"\0" * 8,
        "no end": whole[:-20],
        "bytes behind": whole + b"garbage",
        "deflate": whole[:40] + b"\xff" * 8 + whole[48:],
    }


def bad_folders(folder: Path, data: Path) -> Iterator[Case]:
    """Copies of a good folder with one fault each, for `pglcl train`."""

    def changed(name: str, change: Callable[[Path], object]) -> Case:
        root = folder / "folders" / name.replace(" ", "_")
        shutil.copytree(data, root)
        change(root)
        return name, ["train", root, "-o", folder / "runs" / root.name, *flags({**TINY, "steps": 4})]

    def label(root: Path, number: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        path = root / "labels" / f"case{number:02d}.nii.gz"
        old = nib.load(path)
        nib.save(nib.Nifti1Image(change(np.asarray(old.dataobj)), old.affine), path)

    def one_voxel(value: float) -> Callable[[np.ndarray], np.ndarray]:
        def change(y: np.ndarray) -> np.ndarray:
            y = y.astype(np.float32)
            y[0, 0, 0] = value
            return y

        return change

    yield changed("no images", lambda r: shutil.rmtree(r / "images"))
    yield changed("no labels", lambda r: shutil.rmtree(r / "labels"))
    yield changed("label without image", lambda r: (r / "images" / "case00.nii.gz").unlink())
    yield changed("truncated label", lambda r: (r / "labels" / "case00.nii.gz").write_bytes(b"\x1f\x8b"))
    yield changed("truncated validation image", lambda r: (r / "images" / "case03.nii.gz").write_bytes(b"\x1f\x8b"))
    yield changed("truncated test image", lambda r: (r / "images" / "case05.nii.gz").write_bytes(b"\x1f\x8b"))
    yield changed("label of another shape", lambda r: label(r, 0, lambda y: y[:-1]))
    yield changed("label value 0.5", lambda r: label(r, 0, one_voxel(0.5)))
    yield changed("NaN label", lambda r: label(r, 0, one_voxel(float("nan"))))
    yield changed("all labels empty", lambda r: [label(r, i, np.zeros_like) for i in range(6)])
    yield changed(
        "nii beside nii.gz", lambda r: shutil.copy(r / "images" / "case00.nii.gz", r / "images" / "case00.nii")
    )
    yield changed(
        "channels with a gap",
        lambda r: [
            (r / "images" / "case00.nii.gz").rename(r / "images" / "case00_0000.nii.gz"),
            shutil.copy(r / "images" / "case01.nii.gz", r / "images" / "case00_0002.nii.gz"),
        ],
    )
    nested = "[" * 100000 + "]" * 100000
    yield changed("deeply nested dataset.json", lambda r: (r / "dataset.json").write_text(nested))
    yield changed("dataset.json is a list", lambda r: (r / "dataset.json").write_text("[]"))
    yield "a file for a folder", ["train", data / "images" / "case00.nii.gz", "-o", folder / "runs" / "file"]
    yield "no folder", ["inspect", folder / "nothing"]


def bad_options(folder: Path, data: Path) -> Iterator[Case]:
    values = {
        "channels": ("4", "4,x", "", "0,4", "-4,8"), "slice-axis": ("7", "-2"), "seed": ("1" * 20, "-1", "x"),
        "threads": ("-1", "100000"), "workers": ("-2", "1000"), "image-size": ("1000000", "33", "0", "32,32,32", "nan"),
        "steps": ("0", "-5", "1e3"), "warmup": ("8", "400"), "batch-size": ("1", "-1", "1000000000"),
        "learning-rate": ("nan", "inf", "0", "-1"), "temperature": ("0", "nan"), "contrast-weight": ("-1", "nan"),
        "confidence": ("0", "1", "nan"), "ema-decay": ("1.5",), "labelled": ("0", "100"), "test": ("50", "-3"),
        "validation": ("50",), "patch-size": ("3", "64"), "method": ("magic",), "consistency": ("",), "loss": ("l2",),
        "device": ("gpu9", "cuda:99", ""), "split-file": ("nowhere.json",), "labels": ("0,1,1", "x"),
        "spacing": ("1e-6", "nan"),
        "num-classes": ("-1", "100000000"), "embedding-dim": ("0",), "queue-length": ("-1",), "rotation": ("nan",),
        "config": ("nowhere.toml",), "no-such-option": ("1",),
    }  # fmt: skip
    for name, bad in values.items():
        for value in bad:
            options = {key: v for key, v in TINY.items() if key.replace("_", "-") != name}
            extra = [] if name != "spacing" else ["--spatial-dims", "3"]
            arguments = ["train", data, "-o", folder / "runs" / "options", *flags(options), f"--{name}", value, *extra]
            yield f"--{name} {value!r}", arguments
    output = folder / ("x" * 300)
    yield "an output of 300 characters", ["train", data, "-o", output, *flags(TINY)]
    yield "an output below a file", ["train", data, "-o", data / "images" / "case00.nii.gz" / "run", *flags(TINY)]
    yield "no output", ["train", data]
    yield "no arguments", ["train"]


def bad_runs(folder: Path, data: Path, run: Path) -> Iterator[Case]:
    """A good run with one of its files replaced."""
    contents = {
        "empty": b"", "text": b"hello", "a list": b"[]", "a number": b"7", "null": b"null", "bytes": bytes(range(256)),
        "nested": b"[" * 100000, "other keys": json.dumps({"a": 1}).encode(),
    }  # fmt: skip
    for name in ("checkpoint.pt", "config.json", "split.json", "run.json"):
        for what, content in contents.items():
            copy = folder / "broken" / f"{name}_{what.replace(' ', '_')}"
            shutil.copytree(run, copy)
            (copy / "model.pt").unlink(missing_ok=True)
            (copy / name).write_bytes(content)
            yield f"{name}: {what}", ["train", "--resume", copy, "--steps", "8"]
    for what, content in contents.items():
        copy = folder / "broken" / f"model_{what.replace(' ', '_')}"
        shutil.copytree(run, copy)
        (copy / "model.pt").write_bytes(content)
        yield f"model.pt: {what}", ["evaluate", copy, data]
    for name in ("checkpoint.pt", "config.json", "split.json", "run.json", "metrics.jsonl"):
        for what, make in (("a folder", Path.mkdir), ("a pipe", os.mkfifo)):
            copy = folder / "broken" / f"{name}_{what.replace(' ', '_')}"
            shutil.copytree(run, copy)
            (copy / name).unlink()
            make(copy / name)
            yield f"{name}: {what}", ["train", "--resume", copy, "--steps", "8"]
    yield "a run in the folder", ["train", data, "-o", run, *flags({**TINY, "steps": 4})]
    yield "no run", ["evaluate", folder / "nothing", data]
    yield "no run to resume", ["train", "--resume", folder / "nothing"]
    yield "another part", ["evaluate", run, data, "--part", "everything"]
