"""kill -9 at a random moment of a training, then a resume. It must end with the weights of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import torch
from pglcl.files import PARTIAL, load_tensors

from tests.pglcl.folders import TINY, plain
from tests.torture.children import start_ranks
from tests.torture.tally import Tally

OPTIONS = {**TINY, "steps": 24, "warmup": 6, "checkpoint_every": 2}
ATTEMPTS = 3  # resumes of one run, all but the last killed too


def flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]


def model_of(run: Path) -> dict[str, torch.Tensor]:
    state = load_tensors(run / "model.pt")["network"]
    assert isinstance(state, dict)
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_and_resume(tally: Tally, folder: Path, count: int, ranks: int, draw: random.Random) -> None:
    """Adds `count` kills to the tally."""
    data = plain(folder / "data")
    reference, run = folder / "reference", folder / "run"
    start = time.monotonic()
    whole = [child.wait() for child in start_ranks(ranks, ["train", data, "-o", reference, *flags(OPTIONS)], folder)]
    length = time.monotonic() - start
    if any(ended.code for ended in whole):
        raise SystemExit(f"a run that is left alone fails:\n{whole[0].output}")
    wanted = model_of(reference)
    done = 0
    while done < count:
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(min(ATTEMPTS, count - done)):
            moment = draw.uniform(0, 1.05 * length)
            children = start_ranks(ranks, ["train", data, "-o", run, "--resume", *flags(OPTIONS)], folder)
            time.sleep(moment)
            # Of several ranks, sometimes only one is killed, and the others must notice.
            doomed = children if draw.random() < 0.5 else [draw.choice(children)]
            for child in doomed:
                child.kill()
            ends = [child.wait() for child in children]
            done += 1
            hung = [end for end in ends if end.seconds > 120]
            if hung:
                tally.fault(f"killed after {moment:.2f} s: another rank hung for {hung[0].seconds:.0f} s")
        if (run / "config.json").exists():
            arguments = ["train", "--resume", run]
        else:  # killed before the run began
            arguments = ["train", data, "-o", run, "--resume", *flags(OPTIONS)]
        ends = [child.wait() for child in start_ranks(ranks, arguments, folder)]
        if any(end.code for end in ends):
            tally.fault(f"resume after {done} kills ends with {[e.code for e in ends]}: {ends[0].output[-400:]}")
        elif not same(model_of(run), wanted):
            tally.fault(f"resume after {done} kills: other weights than the run left alone")
        elif list(run.rglob(f"{PARTIAL}*")):
            tally.fault(f"resume after {done} kills: a partial file is left")
        else:
            tally.good("resumed to the same bits")
    tally.counts["kills"] = done
