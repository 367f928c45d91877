"""Draws the pictures of README and docs from the results of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.runner import LIMIT_BYTES, median, name_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "pglcl_ext": ("#D55E00", "o"),
    "pytorch-metric-learning": ("#0072B2", "s"),
    "plain SupCon": ("#009E73", "^"),
    "eager reference": ("#CC79A7", "D"),
    "torch.mm alone": ("#777777", "x"),
}


def axes_of_patches(axis: Any, title: str, sizes: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("patches N (D = 128, float32)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path, info: dict[str, Any]) -> None:
    where = f"{name_of(info)}, {info['threads']} threads, torch {info['torch_running']}"
    figure.text(0.01, 0.01, where, fontsize=7, color="#555555")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".partial"), format="png", dpi=130)
    path.with_suffix(".partial").replace(path)
    plt.close(figure)


def peers(folder: Path) -> None:
    """Time and memory against the number of patches, D = 128, float32, both passes."""
    content = json.loads((folder / "peers.json").read_text(encoding="utf-8"))
    wanted = {"D": 128, "dtype": "float32", "passes": "forward+backward"}
    cases = [c for c in content["results"] if all(c[k] == v for k, v in wanted.items())]
    sizes = sorted({c["N"] for c in cases})
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for name, (colour, marker) in STYLES.items():
        own = sorted((c for c in cases if c["contender"] == name), key=lambda c: c["N"])
        done = [c for c in own if "problem" not in c]
        width = 2.5 if name == "pglcl_ext" else 1.3
        options = {"color": colour, "marker": marker, "markersize": 5, "linewidth": width, "label": name}
        time.plot([c["N"] for c in done], [1e3 * median(c["seconds"]) for c in done], **options)
        memory.plot([c["N"] for c in done], [c["bytes"] / 2**20 for c in done], **options)
        for case in own:
            if case.get("problem") == "out of memory" and done:  # it needed more than the limit
                last = done[-1]
                ends = [last["bytes"] / 2**20, LIMIT_BYTES / 2**20]
                memory.plot([last["N"], case["N"]], ends, ":", color=colour, linewidth=1.0)
                memory.plot([case["N"]], [ends[1]], "x", color=colour, markersize=8)
    limit = LIMIT_BYTES / 2**20
    memory.axhline(limit, color="#555555", linewidth=0.8)
    text = f"out of {LIMIT_BYTES / 2**30:.0f} GiB"
    memory.annotate(text, (sizes[0], limit), xytext=(0, -10), textcoords="offset points", fontsize=8, color="#555555")
    axes_of_patches(time, "forward + backward [ms]", sizes)
    axes_of_patches(memory, "memory beyond the inputs [MiB]", sizes)
    time.legend(fontsize=8, frameon=False)
    save(figure, folder / "peers.png", content["machine"])


def outlines(path: Path, case: Any, runs: dict[str, Path]) -> None:
    """Draws the slice of a labelled case with the most foreground: the truth, and the mask of each titled run."""
    import torch
    from pglcl.figures import colour
    from pglcl.model import load_model
    from pglcl.predict import Predictor
    from pglcl.volumes import read_label, read_volume

    models = {title: load_model(run, "cpu") for title, run in runs.items()}
    first = next(iter(models.values()))
    truth = torch.from_numpy(read_label(case.label, case.images[0], first.labels))
    z = int((truth > 0).flatten(0, 1).sum(0).argmax())
    image = torch.from_numpy(read_volume(case.images).data)[..., z].float()
    picture = (image / image.max()).clamp(0, 1).permute(1, 2, 0)
    shown = {"truth": truth, **{title: Predictor([model])(case)[0].mask() for title, model in models.items()}}
    size = (3.0 * len(shown), 3.0 * picture.shape[0] / picture.shape[1] + 0.4)
    figure, axes = plt.subplots(1, len(shown), figsize=size)
    for axis, (title, mask) in zip(axes, shown.items(), strict=True):
        axis.imshow(picture, cmap="gray", interpolation="nearest")  # one channel is grey, three are colours
        for k in range(1, first.num_classes):
            axis.contour((mask[..., z] == k).float(), [0.5], colors=[colour(k)], linewidths=1.2)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".partial"), format="png", dpi=110)
    path.with_suffix(".partial").replace(path)
    plt.close(figure)


def segmentation(runs: Path, data: Path, dataset: str = "histology", seed: int = 0) -> bool:
    """Draws one test image of a data set beside its runs: the truth, and the mask of each method of the comparison.

    It is the image with the median Dice of the base. Returns False while a run of the comparison has not ended.
    """
    from pglcl.cases import cases_of
    from pglcl.layouts import open_folder

    from benchmarks.segmentation import DATASETS, Run, recorded

    asked = DATASETS[dataset]
    rows = [Run(dataset, method, seed) for method in ("supervised", asked.base, f"{asked.base} + patchcl")]
    records = [recorded(run, runs) for run in rows]
    scores = [record["patients"]["dice"] for record in records if record is not None]
    if len(scores) < len(rows):
        return False
    by_base = sorted(scores[1].items(), key=lambda item: item[1])
    patient = by_base[len(by_base) // 2][0]
    case = cases_of(open_folder(data / asked.folder), [patient], with_label=True)[0]
    titles = [f"{run.method}, Dice {100 * found[patient]:.0f}" for run, found in zip(rows, scores, strict=True)]
    outlines(runs / f"{dataset}.png", case, {title: run.folder(runs) for title, run in zip(titles, rows, strict=True)})
    return True


def scaling(folder: Path) -> None:
    """Draws time and memory of the loss against the number of patches, each beside the slope that it should have."""
    content = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
    cases = [c for c in content["results"] if c["question"] == "N" and c["passes"] == "forward+backward"]
    sizes = [c["N"] for c in cases]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    curves = (
        ("forward + backward [ms]", [1e3 * median(c["seconds"]) for c in cases], 2),
        ("memory beyond the inputs [MiB]", [c["bytes"] / 2**20 for c in cases], 1),
    )
    for axis, (title, values, power) in zip(axes, curves, strict=True):
        axis.plot(sizes, values, marker="o", color="#D55E00", label="measured")
        line = [values[-1] * (n / sizes[-1]) ** power for n in sizes]
        axis.plot(sizes, line, "--", color="#777777", label=f"slope {power}")
        axes_of_patches(axis, title, sizes)
        axis.legend(frameon=False, fontsize=8)
    save(figure, folder / "scaling.png", content["machine"])
