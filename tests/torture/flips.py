"""Flips one bit of a file. The file must then be refused, or give the same result as before."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pglcl.errors import UserError
from pglcl.volumes import read_volume

from tests.pglcl.folders import TINY, plain, volume, write
from tests.torture.children import Ended, run_pglcl, run_stopped_after
from tests.torture.kills import flags, model_of, same
from tests.torture.tally import Tally

RUN_FILES = ("checkpoint.pt", "config.json", "split.json", "run.json", "environment.json", "metrics.jsonl")


@contextlib.contextmanager
def flipped(path: Path, draw: random.Random) -> Iterator[str]:
    """Flips a random bit of the file in the block; yields a text that names it."""
    content = path.read_bytes()
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield f"{path.name}: bit {bit} of byte {place} of {len(content)}"
    finally:
        path.write_bytes(content)


def flip_volumes(tally: Tally, folder: Path, count: int, draw: random.Random) -> None:
    """Compressed volumes, which carry a checksum."""
    image = volume(3)[0]
    for ending in (".nii.gz", ".png"):
        if ending == ".png":
            from PIL import Image

            path = folder / f"scan{ending}"
            Image.fromarray(np.clip(image.max(axis=2), 0, 255).astype(np.uint8)).save(path)
        else:
            path = write(folder / f"scan{ending}", image)
        whole = read_volume((path,))
        for _ in range(count):
            with flipped(path, draw) as what:
                try:
                    read = read_volume((path,))
                except UserError:
                    tally.good("refused")
                    continue
                except BaseException as error:
                    tally.fault(f"{what}: {error!r}")
                    continue
            if np.array_equal(read.data, whole.data) and np.allclose(read.spacing, whole.spacing):
                tally.good("read as it was")
            else:
                tally.fault(f"{what}: read with other voxels or another spacing")


def flip_run_files(tally: Tally, folder: Path, count: int, draw: random.Random) -> None:
    """The files of a run that was stopped half-way: its resume refuses, or ends with the same weights."""
    data = plain(folder / "data")
    half, run = folder / "half", folder / "run"
    options = flags({**TINY, "steps": 8, "checkpoint_every": 4})
    _expect(run_pglcl(["train", data, "-o", run, *options], folder / "log"))
    wanted = model_of(run)
    _expect(run_stopped_after(4, ["train", data, "-o", half, *options], folder / "log"), code=130)
    resume = ["train", "--resume", run]
    for _ in range(count):
        shutil.rmtree(run)
        shutil.copytree(half, run)
        name = draw.choice([name for name in RUN_FILES if (run / name).stat().st_size])
        with flipped(run / name, draw) as what:
            ended = run_pglcl(resume, folder / "log")
            if ended.refused:
                tally.good("refused")
            elif ended.code == 0 and same(model_of(run), wanted):
                tally.good("the same weights")
            else:
                tally.fault(f"{what}: exit code {ended.code}; {ended.output[-300:]}")


def flip_models(tally: Tally, folder: Path, count: int, draw: random.Random) -> None:
    """model.pt and the JSON files beside it: predict refuses, or writes the same mask."""
    data, run = plain(folder / "data"), folder / "run"
    _expect(run_pglcl(["train", data, "-o", run, *flags({**TINY, "steps": 4})], folder / "log"))
    scan = data / "images" / "case00.nii.gz"
    output = folder / "masks"
    command = ["predict", run, scan, "-o", output, "--overwrite"]
    _expect(run_pglcl(command, folder / "log"))
    mask = output / "case00.nii.gz"
    wanted = read_volume((mask,)).data
    for _ in range(count):
        mask.unlink(missing_ok=True)
        with flipped(run / "model.pt", draw) as what:
            ended = run_pglcl(command, folder / "log")
        if ended.refused:
            tally.good("refused")
        elif ended.code == 0 and np.array_equal(read_volume((mask,)).data, wanted):
            tally.good("the same mask")
        else:
            tally.fault(f"{what}: exit code {ended.code}; {ended.output[-300:]}")


def _expect(ended: Ended, code: int = 0) -> None:
    if ended.code != code:
        raise SystemExit(f"a sound run fails with {ended.code}:\n{ended.output}")
