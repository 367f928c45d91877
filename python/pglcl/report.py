"""One HTML file that shows what a run learned: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl.bases import one_hot
from pglcl.cases import distance_unit
from pglcl.errors import UserError
from pglcl.evaluate import (
    METRICS,
    Evaluation,
    Row,
    Subject,
    may_renew,
    read_scores,
    score_cases,
    score_files,
    subject_of,
)
from pglcl.files import read_json, write_text
from pglcl.layouts import Case, open_folder
from pglcl.model import TrainedModel, load_model
from pglcl.outputs import check_outputs
from pglcl.predict import Predictor, entropy_map, network_output, probabilities
from pglcl.prepare import Prepared, prepare
from pglcl.record import read_metrics
from pglcl.volumes import read_label, read_volume
from pglcl_ext import patch_embeddings, patch_statistics, semantic_disparity

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

# Told apart by most who see colours differently (Okabe and Ito).
COLOURS = ["#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442"]
GENERATOR = "<meta name=generator content=pglcl>"
FIGURE_VOLUMES = 6  # test volumes that embeddings are taken from

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .4rem; margin-bottom: .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
p.note { color: GrayText; margin: .25rem 0 .5rem; }
.key span { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .9em; height: .9em;
  border-radius: 2px; margin-right: .3em; vertical-align: -.1em; }
p.warning { border-left: 4px solid #D55E00; padding: .3rem .8rem; background: var(--soft); }
details summary { cursor: pointer; }
"""


def write_report(
    run: Path,
    data: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    *,
    overwrite: bool = False,
    quiet: bool = True,
) -> Path:
    """The report of a run, on its test volumes; scores them first where that was not done."""
    path = output or run / "report.html"
    mine = output is None and _is_report(path)
    predictor = Predictor([load_model(run, device)])
    model = predictor.models[0]
    config = read_json(run / "config.json")
    root = data or Path(config["data"])
    folder = open_folder(root)
    subject, cases = subject_of(run, predictor, folder)
    inputs = [file for case in cases for file in (*case.images, case.label) if file is not None]
    check_outputs([path], inputs=inputs, overwrite=overwrite, renewed=lambda path: mine)
    found = _scores(run, predictor, subject, cases, distance_unit(folder), quiet=quiet)
    unit = found.unit
    scores: dict[str, Any] = {"summary": found.summary, "scores": [vars(s) for s in found.scores]}
    viewed = [View(model, case) for case in _worst_median_best(cases, scores)]
    title = f"{run.name}: {config['method']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=note>{html.escape(_subtitle(config, run, folder.root.name))}</p>",
        *([] if subject.finished else [_warning(f"This run is unfinished: step {subject.step} of {subject.steps}.")]),
        "<h2>Scores on the test volumes</h2>",
        f"<p class=note>{html.escape(subject.title())}</p>",
        _score_table(scores["summary"], unit),
        "<h2>Training</h2>",
        _image(curves(read_metrics(run)), "Losses and validation Dice by step"),
        "<h2>Worst, median and best test volume</h2>",
        _legend(model),
        "<p class=note>The slice with most foreground of each: image, truth, prediction, and the entropy of the "
        "prediction in nats.</p>",
        *(
            _images(view.overlay(name), f"{name}: {view.case.name}")
            for name, view in zip(("worst", "median", "best"), viewed)
        ),
        "<h2>Entropy, disparity, and the patches that are chosen by it</h2>",
        "<p class=note>Average entropy of the patches; disparity of all patches from one anchor (white). Solid: "
        "positives, same class and similar entropy. Dashed: negatives, another class.</p>",
        _images(viewed[1].disparity(), "Patch entropies and disparities"),
        "<h2>Embeddings of patches</h2>",
        "<p class=note>First two principal components of the projected patches of test volumes, coloured by their true "
        "class.</p>",
        _image(embedding_plot(model, cases[:FIGURE_VOLUMES]), "Embeddings coloured by class"),
        "<h2>Configuration</h2>",
        _details(config, read_json(run / "environment.json")),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"{GENERATOR}"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_text(path, page)
    return path


def _is_report(path: Path) -> bool:
    """Whether an earlier report is there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return GENERATOR in file.read(1000)
    except OSError:
        return False


def _scores(
    run: Path, predictor: Predictor, subject: Subject, cases: Sequence[Case], unit: str, *, quiet: bool
) -> Evaluation:
    """Those that the run keeps, where they belong to what is shown; new ones otherwise."""
    files = score_files(run, subject.part)
    kept = read_scores(files[-1])
    if kept is not None and not subject.differences(kept.subject):
        return kept
    found = score_cases(predictor, subject, cases, unit, quiet=quiet)
    with contextlib.suppress(UserError):  # scores of other data, or another's files, stay as they are
        check_outputs(files, renewed=may_renew(files, subject))
        return found.save(files)
    return found


def _subtitle(config: dict[str, Any], run: Path, data: str) -> str:
    split = read_json(run / "split.json")
    counts = ", ".join(f"{len(split[part])} {part}" for part in ("labelled", "unlabelled", "validation", "test"))
    base = "" if config["method"] == "supervised" else f", base {config['consistency']}"
    contrast = f", {config['loss']} loss on {config['patches']} patches" if config["method"] == "patchcl" else ""
    return f"{data}: {counts} patients{base}{contrast}, {config['steps']} steps, seed {config['seed']}"


def _warning(text: str) -> str:
    return f"<p class=warning role=alert>{html.escape(text)}</p>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _score_table(rows: list[Row], unit: str) -> str:
    names = {"dice": "Dice", "hd95": f"HD95 [{unit}]", "asd": f"ASD [{unit}]"}
    head = "".join(f"<th>{names[m]}<th>95 %" for m in METRICS)
    body = ""
    for row in rows:
        cells = ""
        for metric in METRICS:
            digits = 3 if metric == "dice" else 2
            low, high = row[f"{metric}_interval"]
            cells += f"<td>{_number(row[metric], digits)} ± {_number(row[f'{metric}_std'], digits)}"
            cells += f"<td>{_number(low, digits)} to {_number(high, digits)}"
        body += f"<tr><td>{html.escape(row['class'])}{cells}<td>{row['absent']}<td>{row['missed']}"
    note = (
        "mean ± deviation over patients, bootstrap interval of the mean; absent: not in the truth, no score; missed: "
    )
    note += "there, not predicted, scored as the worst"
    return (
        f"<div class=scroll><table><tr><th>class{head}<th>absent<th>missed{body}</table></div><p class=note>{note}</p>"
    )


def _legend(model: TrainedModel) -> str:
    items = [
        f"<span><i style='background:{COLOURS[k % len(COLOURS)]}'></i>{html.escape(_class_name(model, k))}</span>"
        for k in range(1, model.num_classes)
    ]
    return f"<p class=key>{''.join(items)}</p>"


def _class_name(model: TrainedModel, k: int) -> str:
    return model.class_names.get(k, f"class {k}")


def _details(config: dict[str, Any], environment: dict[str, Any]) -> str:
    def rows(values: dict[str, Any]) -> str:
        return "".join(f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in values.items())

    return (
        f"<details><summary>Options</summary><div class=scroll><table>{rows(config)}</table></div></details>"
        "<details><summary>Versions and machine</summary><div class=scroll>"
        f"<table>{rows(environment)}</table></div></details>"
    )


def _tag(figure: Any, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{encoded}'>"


def _image(figure: Any, text: str) -> str:
    return f"<p>{_tag(figure, text)}</p>"


def _images(figures: list[Any], text: str) -> str:
    """Side by side where there is room."""
    return f"<div class=row>{''.join(_tag(figure, text) for figure in figures)}</div>"


def _panel(title: str) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(3.2, 3.2))
    axis.axis("off")
    axis.set_title(title, fontsize=10)
    return figure, axis


def curves(metrics: list[dict[str, Any]]) -> Any:
    names = [n for n in ("segmentation", "contrast", "validation_dice") if any(n in row for row in metrics)]
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 2.8), squeeze=False)
    for axis, name in zip(axes[0], names):
        points = [(row["step"], row[name]) for row in metrics if name in row]
        steps, values = zip(*points)
        many = len(values) > 40
        axis.plot(steps, values, color="#0072B2", alpha=0.3 if many else 1, marker=None if many else "o", markersize=3)
        if many:
            width = max(1, len(values) // 25)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :], smooth, color="#0072B2")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _worst_median_best(cases: list[Case], scores: dict[str, Any]) -> list[Case]:
    by_case: dict[str, list[float]] = {}
    for score in scores["scores"]:
        if score["dice"] is not None and not math.isnan(score["dice"]):
            by_case.setdefault(score["case"], []).append(score["dice"])
    ranked = sorted((c for c in cases if c.name in by_case), key=lambda c: float(np.mean(by_case[c.name]))) or cases
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


class View:
    """A test volume, its prediction, and the slice of it that is shown."""

    def __init__(self, model: TrainedModel, case: Case) -> None:
        self.model, self.case = model, case
        self.prepared: Prepared = prepare(case, model.config, model.slice_axis, model.intensity)
        self.p = probabilities(model.network, self.prepared, model.config, model.slice_axis)
        assert case.label is not None
        self.truth = torch.from_numpy(read_label(case.label, case.images[0], model.labels))
        self.axis = 2 if model.slice_axis is None else model.slice_axis
        area = (self.truth > 0).movedim(self.axis, 0).flatten(1).sum(dim=1)
        self.slice = int(area.argmax())

    def _plane(self, x: Tensor) -> np.ndarray:
        """As radiologists look at it: first axis to the right, second up. A picture as it is."""
        plane = x.select(self.axis, self.slice).numpy()
        return plane.T[::-1] if self.prepared.source.unit == "mm" else plane

    def overlay(self, name: str) -> list[Any]:
        image = self._plane(torch.from_numpy(read_volume(self.case.images).data[0]))
        low, high = np.percentile(image, [1, 99])
        dice = _mean_dice(self.p.argmax(dim=0), self.truth, self.model.num_classes)
        most = math.log(self.model.num_classes)
        labels = {"truth": self.truth, f"prediction, Dice {dice:.3f}": self.p.argmax(dim=0)}
        figures = []
        for title in (f"{name}: {self.case.name}", *labels, "entropy [nats]"):
            figure, axis = _panel(title)
            figures.append(figure)
            if title == "entropy [nats]":
                shown = axis.imshow(self._plane(entropy_map(self.p)), cmap="magma", vmin=0, vmax=most)
                figure.colorbar(shown, ax=axis, fraction=0.046)
                continue
            axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            plane = self._plane(labels[title]) if title in labels else np.zeros_like(image)
            for k in range(1, self.model.num_classes):
                if (plane == k).any():
                    colour = matplotlib.colors.to_rgba(COLOURS[k % len(COLOURS)])
                    axis.imshow(np.where((plane == k)[..., None], np.array([*colour[:3], 0.45]), 0.0))
                    axis.contour(plane == k, levels=[0.5], colors=[colour], linewidths=0.8)
        return figures

    def disparity(self) -> list[Any]:
        """At the resolution of the network, where patches are."""
        model, config = self.model, self.model.config
        logits = network_output(model.network, self.prepared.image, config)
        image = self.prepared.image
        z = min(self.slice, image.shape[-1] - 1)
        # Without what was padded.
        inside = [n for axis, n in enumerate(self.prepared.geometry.resized) if axis != self.axis]
        p = logits[:, : inside[0], : inside[1], z].softmax(dim=0)[None]
        patch = config.patch_size if config.spatial_dims == 2 else max(4, config.patch_size // 2)
        statistics = patch_statistics(p, patch, probabilities=True)
        entropy = statistics.entropy[0]
        share = statistics.confidence[0]  # (K, gy, gx)
        present = share.clone()
        present[0] = torch.where(share[1:].amax(dim=0) > 0.1, 0, share[0])  # a patch counts for what is not background
        label = present.argmax(dim=0).flatten()
        delta = semantic_disparity(entropy.flatten())
        candidates = (label > 0).nonzero().squeeze(1)
        anchor = int(candidates[entropy.flatten()[candidates].argmax()]) if len(candidates) else int(entropy.argmax())
        scale = math.log(model.num_classes)
        upper, lower = config.max_positive_disparity * scale, config.min_negative_disparity * scale
        same, row = label == label[anchor], delta[anchor]
        positive = same & (row <= upper)
        positive[anchor] = False
        negative = ~same & (row >= lower)

        background = image[0, : inside[0], : inside[1], z].numpy()
        rows, columns = entropy.shape
        extent = (-0.5, columns * patch - 0.5, rows * patch - 0.5, -0.5)
        boxed = [j for j in range(rows * columns) if j == anchor or positive[j] or (negative[j] and label[j] > 0)]
        # Around the boxes, which are small where patches are.
        window = []
        for places, count in (([j % columns for j in boxed], columns), ([j // columns for j in boxed], rows)):
            margin = 2 + (max(places) - min(places)) // 4
            window.append((max(0, min(places) - margin) * patch, min(count, max(places) + margin + 1) * patch))
        figures = []
        for values, title, boxes in (
            (None, "image", True),
            (entropy, "average entropy [nats]", False),
            (row.view(rows, columns), "disparity from the anchor [nats]", True),
        ):
            figure, axis = _panel(title)
            figures.append(figure)
            axis.imshow(background, cmap="gray")
            if values is not None:
                shown = axis.imshow(values.numpy(), cmap="viridis", alpha=0.65, extent=extent)
                figure.colorbar(shown, ax=axis, fraction=0.046)
            axis.set_xlim(window[0][0] - 0.5, window[0][1] - 0.5)
            axis.set_ylim(window[1][1] - 0.5, window[1][0] - 0.5)
            for j in boxed if boxes else ():
                y, x = divmod(j, columns)
                colour = "white" if j == anchor else COLOURS[int(label[j]) % len(COLOURS)]
                style = "-" if j == anchor or positive[j] else "--"
                box = Rectangle((x * patch, y * patch), patch - 1, patch - 1, fill=False, edgecolor=colour)
                box.set(linestyle=style, linewidth=2.5 if j == anchor else 1.0)
                axis.add_patch(box)
        return figures


def _mean_dice(p: Tensor, t: Tensor, num_classes: int) -> float:
    values = []
    for k in range(1, num_classes):
        a, b = p == k, t == k
        if b.any():
            values.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(values)) if values else math.nan


@torch.no_grad()
def embedding_plot(model: TrainedModel, cases: list[Case]) -> Any:
    config, network = model.config, model.network
    device = next(network.parameters()).device
    embeddings, labels = [], []
    for case in cases:
        prepared = prepare(case, config, model.slice_axis, model.intensity, model.labels)
        assert prepared.label is not None
        if config.spatial_dims == 2:
            images, target = prepared.image.movedim(-1, 0), prepared.label.movedim(-1, 0)
        else:
            first = [(n - s) // 2 for n, s in zip(prepared.label.shape, config.size)]
            place = tuple(slice(f, f + s) for f, s in zip(first, config.size))
            images, target = prepared.image[(slice(None), *place)][None], prepared.label[place][None]
        _, features = network.with_features(images.to(device))
        pool = F.avg_pool2d if config.spatial_dims == 2 else F.avg_pool3d
        weights = pool(one_hot(target, model.num_classes), network.feature_stride).to(device)
        batch = patch_embeddings(features, weights, config.patch_size // network.feature_stride, coverage=0.2).compact()
        embeddings.append(network.projection(batch.embeddings).cpu())
        labels.append(batch.labels.cpu())
    z, y = torch.cat(embeddings), torch.cat(labels)
    figure, axis = plt.subplots(figsize=(6, 4.5))
    if len(z) > 2:
        centred = z - z.mean(dim=0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        flat = centred @ directions[:2].T
        for k in range(model.num_classes):
            own = flat[y == k]
            shown = own[:: max(1, len(own) // 400)]
            axis.scatter(
                shown[:, 0], shown[:, 1], s=9, color=COLOURS[k % len(COLOURS)], label=_class_name(model, k), alpha=0.7
            )
        axis.legend(fontsize=8, frameon=False)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return figure
