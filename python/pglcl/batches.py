"""Training batches.

A batch depends on the seed, the rank and the step alone, and not on the process that prepares it. So a resumed run
gets the same batches, and so does a run with another number of workers.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandAffined,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.prepare import Prepared, places_of_foreground

PREFETCHED = 4  # batches that each process has ready


class StepBatches(Dataset[dict[str, Tensor]]):
    """Item `step` is the batch of that step.

    The batch is a dict. image (L, C, *S) float32 and label (L, *S) int64 are labelled images. After the warm-up of a
    semi-supervised run, weak and strong (U, C, *S) float32 are views of the same unlabelled images, which differ only
    in intensities. strong2 is a second strong view, if the base method has two.
    """

    def __init__(
        self,
        labelled: list[Prepared],
        unlabelled: list[Prepared],
        config: TrainConfig,
        rank: int = 0,
        *,
        semi: bool = True,
    ) -> None:
        self.labelled, self.unlabelled, self.config, self.rank = labelled, unlabelled, config, rank
        self.semi = semi and bool(unlabelled)
        self.slices = {
            id(pool): [(v, z) for v in range(len(pool)) for z in range(pool[v].image.shape[-1])]
            for pool in (labelled, unlabelled)
        }
        dims = config.spatial_dims
        angle = math.radians(config.rotation)
        axes = range(dims) if config.flips == "all" else ()
        flips = [RandFlipd(["image", "label"], prob=0.5, spatial_axis=d) for d in axes]
        self.geometric = Compose([
            RandAffined(
                ["image", "label"], prob=0.9, rotate_range=angle if dims == 2 else [angle] * 3,
                scale_range=[config.scaling] * dims, translate_range=[s * 0.06 for s in config.size],
                mode=["bilinear", "nearest"], padding_mode="border", spatial_size=config.size, cache_grid=True,
            ),
            *flips,
        ])  # fmt: skip
        # Labelled images and the student's view of unlabelled ones, whatever the method.
        self.intensities = Compose([
            RandScaleIntensity(0.4, prob=0.8), RandShiftIntensity(0.4, prob=0.8), RandAdjustContrast(0.6, (0.5, 2.0)),
            RandGaussianNoise(0.5, std=0.2),
            RandGaussianSmooth((0.3, 1.5), (0.3, 1.5), (0.3, 1.5), prob=0.3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        set_track_meta(False)
        config = self.config
        random = np.random.RandomState(np.random.SeedSequence([config.seed, step, self.rank]).generate_state(4))
        self.geometric.set_random_state(state=random)
        self.intensities.set_random_state(state=random)
        semi = self.semi and step >= config.warmup_steps
        count = config.batch_size // 2 if semi else config.batch_size
        images, labels = zip(*(self._labelled(random) for _ in range(count)))
        batch = {"image": torch.stack(images), "label": torch.stack(labels)}
        if semi:
            views = [self._unlabelled(random) for _ in range(config.batch_size - count)]
            for name, side in zip(("weak", "strong", "strong2"), zip(*views)):
                batch[name] = torch.stack(side)
        return batch

    def bytes_of_a_batch(self) -> int:
        """The largest size of a batch's tensors, in bytes."""
        pixels = math.prod(self.config.size) * self.config.batch_size
        # An unlabelled image comes in two or three views, a labelled one with its label.
        return pixels * ((1 + self.config.strong_images) * 4 * len(self.labelled[0].image) + 8)

    def _labelled(self, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
        item = self.geometric(self._pick(self.labelled, random, foreground=True))
        return torch.as_tensor(self.intensities(item["image"])), torch.as_tensor(item["label"])[0].round().long()

    def _unlabelled(self, random: np.random.RandomState) -> list[Tensor]:
        item = self._pick(self.unlabelled, random, foreground=False)
        weak = torch.as_tensor(self.geometric(item)["image"])
        strong = (torch.as_tensor(self.intensities(weak.clone())) for _ in range(self.config.strong_images))
        return [weak, *strong]

    def _pick(self, pool: list[Prepared], random: np.random.RandomState, *, foreground: bool) -> dict[str, Tensor]:
        """A random part of a random slice or volume.

        Half of the labelled parts are centred on a voxel that is not background, if the slice or volume has any.
        """
        if self.config.spatial_dims == 2:
            places = self.slices[id(pool)]
            v, z = places[random.randint(len(places))]
            image, label = pool[v].image[..., z], pool[v].label
            label = None if label is None else label[..., z]
        else:
            prepared = pool[random.randint(len(pool))]
            image, label = prepared.image, prepared.label
        shape, size = image.shape[1:], self.config.size
        first = [random.randint(n - s + 1) for n, s in zip(shape, size)]
        if foreground and label is not None and not self.config.whole_slices and random.rand() < 0.5:
            inside = places_of_foreground(label) if self.config.spatial_dims == 2 else prepared.foreground
            if len(inside):
                centre = np.unravel_index(int(inside[random.randint(len(inside))]), shape)
                first = [min(max(int(c) - s // 2, 0), n - s) for c, s, n in zip(centre, size, shape)]
        place = tuple(slice(f, f + s) for f, s in zip(first, size))
        image = image[(slice(None), *place)]
        label = torch.zeros(size) if label is None else label[place]
        return {"image": image.clone(), "label": label[None].float()}


def loader(batches: StepBatches, first: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """The batches from step `first` on, prepared by `workers` processes (0: by this one).

    Raises:
        UserError: a process that prepares batches was killed, or the shared memory that holds them is full.
    """
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": PREFETCHED, "persistent_workers": False, "multiprocessing_context": "fork"}
        options["collate_fn"] = _in_shared_memory
    steps = range(first, len(batches))
    batched = DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers, worker_init_fn=_begin_worker, **options
    )
    with _Processes() as processes:
        try:
            yield from processes.batches(batched)
            return
        except (RuntimeError, OSError, EOFError) as error:
            line = _explanation(error) if workers else ""
            if not line:
                raise
        # Raised out here, as the first error holds the processes: while DataLoader knows them, its handler raises that
        # error again whenever another child of this process ends.
        raise UserError(f"--workers {workers}: {line}; --resume continues from the last checkpoint")


class _Processes:
    """The processes that prepare batches. If one ends, the next batch is an error, and no other instruction is.

    DataLoader's handler of SIGCHLD raises an error wherever the main thread is: in a step, in a validation, while a
    file is written. So it is the handler only while a batch is waited for. It is called once before, for processes
    that ended since the last batch.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGCHLD)

    def __enter__(self) -> _Processes:
        return self

    def batches(self, batched: DataLoader[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        with _signals_left_to_the_training():
            source = iter(batched)
        # DataLoader installs its handler once, before the first batch, and other loaders of this process need it too.
        self.handler = signal.getsignal(signal.SIGCHLD)
        if not callable(self.handler) or threading.current_thread() is not threading.main_thread():
            yield from source
            return
        while True:
            signal.signal(signal.SIGCHLD, self.handler)
            self.handler(signal.SIGCHLD, None)
            batch = next(source, None)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if batch is None:
                return
            yield batch

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self.handler)


def _in_shared_memory(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moves a batch to shared memory. DataLoader would do it in a thread, where an error is lost and training hangs."""
    return {name: tensor.share_memory_() for name, tensor in batch.items()}


def _explanation(error: Exception) -> str:
    """A message that says how to mend an error of the processes that prepare batches; empty for a bug."""
    text = str(error)
    if "shared memory" in text or "No space left" in text:
        return (
            "shared memory (/dev/shm) is full. Use --workers 0, which needs none, or remove files from /dev/shm, or "
            "give the container more (docker run --shm-size=1g)"
        )
    # A process may end while it hands a batch over. An error from within a process says in which it was caught.
    while_handed_over = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and "Caught" not in text
    if while_handed_over or "DataLoader worker (pid" in text:
        reason = text.splitlines()[0] if text else type(error).__name__
        return (
            f"a process that prepares batches has ended ({reason}). If the memory was full, use --workers 0, which "
            "prepares batches in the training process"
        )
    return ""


# The signals that ask to stop. DataLoader ends its processes with SIGTERM, so they may block that signal only where
# sigwaitinfo tells who sent it. macOS has no sigwaitinfo.
ASKING = (signal.SIGINT, signal.SIGHUP, *((signal.SIGTERM,) if hasattr(signal, "sigwaitinfo") else ()))


@contextlib.contextmanager
def _signals_left_to_the_training() -> Iterator[None]:
    """Processes that start in the block do not end by signals that terminals and schedulers send to the whole group.

    The training first ends its step and writes a checkpoint, then ends these processes. If one of them ended earlier,
    the training would fail at once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    if signal.SIGTERM in ASKING:
        threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()


def _end_when_the_parent_asks() -> None:
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != os.getppid():
        pass
    os._exit(0)
