"""The pictures of README and docs, from the JSON that the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

from benchmarks.runner import RESULTS, median

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "pglcl_ext": ("#D55E00", "o"),
    "pytorch-metric-learning": ("#0072B2", "s"),
    "plain SupCon": ("#009E73", "^"),
    "eager reference": ("#CC79A7", "D"),
    "torch.mm alone": ("#777777", "x"),
}


def peers() -> Path:
    """Time and memory against the number of patches, D = 128, float32."""
    content = json.loads((RESULTS / "peers.json").read_text())
    cases = [c for c in content["results"] if c["D"] == 128 and c["dtype"] == "float32"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, (colour, marker) in STYLES.items():
        own = sorted((c for c in cases if c["peer"] == name), key=lambda c: c["N"])
        done = [c for c in own if "problem" not in c]
        width = 2.5 if name == "pglcl_ext" else 1.3
        options = {"color": colour, "marker": marker, "markersize": 5, "linewidth": width, "label": name}
        axes[0].plot([c["N"] for c in done], [1e3 * median(c["seconds"]["forward+backward"]) for c in done], **options)
        grown = [c for c in done if c["bytes"] > 2**20]
        axes[1].plot([c["N"] for c in grown], [c["bytes"] / 2**20 for c in grown], **options)
        for case in own:
            if "problem" in case and done:
                last = done[-1]
                where = (last["N"], 1e3 * median(last["seconds"]["forward+backward"]))
                axes[0].annotate(
                    case["problem"], where, fontsize=7, color=colour, xytext=(4, 4), textcoords="offset points"
                )
    for axis, title in zip(axes, ("forward + backward [ms]", "memory beyond the inputs [MiB]")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("patches N (D = 128, float32)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    info = content["machine"]
    figure.text(
        0.01, 0.005, f"{info['processor']}, {info['threads']} threads, torch {info['torch_running']}", fontsize=7
    )
    figure.tight_layout()
    path = RESULTS / "peers.png"
    figure.savefig(path.with_suffix(".partial"), format="png", dpi=130)
    path.with_suffix(".partial").replace(path)
    plt.close(figure)
    return path


def scaling() -> Path:
    content = json.loads((RESULTS / "scaling.json").read_text())
    cases = [c for c in content["results"] if c["question"] == "N"]
    figure, axis = plt.subplots(figsize=(5, 3.6))
    sizes = [c["N"] for c in cases]
    times = [1e3 * median(c["seconds"]) for c in cases]
    axis.loglog(sizes, times, marker="o", color="#D55E00", label="measured")
    axis.loglog(sizes, [times[-1] * (n / sizes[-1]) ** 2 for n in sizes], "--", color="#777777", label="slope 2")
    axis.set_xlabel("patches N (D = 128, float32)")
    axis.set_title("forward + backward [ms]", fontsize=11)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = RESULTS / "scaling.png"
    figure.savefig(path.with_suffix(".partial"), format="png", dpi=130)
    path.with_suffix(".partial").replace(path)
    plt.close(figure)
    return path
