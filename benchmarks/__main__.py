"""python -m benchmarks [questions] [--sizes 512,4096] [--device cpu|cuda]

Measures, and prints the tables. Writes benchmarks/results/<processor>/<question>.json with every sample, the table and
the plot beside it, and the sections of README that come from them. With --sizes, results go to build/benchmarks, and
README stays as it is. Without questions, all are answered except four: `segmentation`, which trains networks for hours
and resumes interrupted runs; `memory`, which predicts large volumes; `limits`, which compares the kernels with the
machine; and `pairs`, with one positive a row.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import pages, plots
from benchmarks.pages import MEASURED, QUESTIONS, UNRECORDED
from benchmarks.runner import RESULTS, folder_of, headed, machine, name_of, save

WITH_SIZES = ("loss", "gaussian", "scaling", "peers", "limits", "pairs")
ON_CUDA = ("loss", "statistics", "gaussian")
Answer = tuple[list[dict[str, Any]], str, float | None]


def recorded(words: Sequence[str], folders: dict[str, str]) -> str:
    """The command as results hold it, with names in place of the folders of this machine.

    Args:
        words: the arguments.
        folders: the name of each folder.
    """
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        shown.append(f"{option}{equals}{folders.get(value, value)}")
    return ("python -m benchmarks " + shlex.join(shown)).strip()


def parsed() -> tuple[argparse.Namespace, tuple[int, ...]]:
    """The arguments, and the sizes among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=", ".join((*QUESTIONS, *UNRECORDED)))
    parser.add_argument("--sizes", default="", help=f"numbers of patches, e.g. 512,4096, for {', '.join(WITH_SIZES)}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--data", default="", help="segmentation: the folder with ACDC/, Task04_Hippocampus/ and Histology_nuclei/"
    )
    parser.add_argument("--runs", default="build/segmentation", help="segmentation: the runs (default: %(default)s)")
    parser.add_argument("--only", default="", help="segmentation: runs whose dataset/method/seed contains this")
    parser.add_argument("--jobs", type=int, default=1, help="segmentation: runs at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e6, help="segmentation: start no run after these")
    arguments = parser.parse_args()
    for question in arguments.questions:
        if question not in (*QUESTIONS, *UNRECORDED):
            parser.error(f"questions are {', '.join((*QUESTIONS, *UNRECORDED))}, got {question}")
    if "segmentation" in arguments.questions and not arguments.data:
        parser.error("segmentation needs --data")
    try:
        sizes = tuple(int(n) for n in arguments.sizes.split(",") if n)
    except ValueError:
        parser.error(f"--sizes takes numbers with commas between them, got {arguments.sizes}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks: no GPU is visible to torch")
    return arguments, sizes


def answer(question: str, arguments: argparse.Namespace, sizes: tuple[int, ...], info: dict[str, Any]) -> Answer:
    """Measures a question: its results, its table and the seconds that this took.

    There are no seconds for the segmentation, since a call may find every run finished.
    """
    start = time.monotonic()
    if question == "segmentation":
        from benchmarks import segmentation

        budget = {name: getattr(arguments, name) for name in ("only", "jobs", "threads", "minutes")}
        committed = pages.results("segmentation")
        return *segmentation.run(arguments.data, arguments.runs, **budget, committed=committed), None
    options: dict[str, Any] = {"threads": arguments.threads}
    options |= {"sizes": sizes} if question in WITH_SIZES else {}
    options |= {"device": arguments.device} if question in ON_CUDA else {}
    results, table = importlib.import_module(f"benchmarks.{question}").run(**options)
    return results, headed(info, table), time.monotonic() - start


def main() -> None:
    arguments, sizes = parsed()
    torch.set_num_threads(arguments.threads)
    folders = {folder: name for folder, name in ((arguments.data, "DATA"), (arguments.runs, "RUNS")) if folder}
    command = recorded(sys.argv[1:], folders)
    info = machine()
    info["gpu"] = info["gpu"] if arguments.device == "cuda" else None
    folder = Path("build/benchmarks") if sizes else folder_of(info)
    print(f"{name_of(info)}, {info['threads']} threads, torch {info['torch_running']}")
    for question in arguments.questions or (MEASURED if arguments.device == "cpu" else ON_CUDA):
        results, table, took = answer(question, arguments, sizes, info)
        name = question if arguments.device == "cpu" else f"{question}_{arguments.device}"
        if results:
            save(RESULTS if question == "segmentation" else folder, info, name, command, results, table, took)
        print(f"\n{question}\n\n{table or 'nothing has ended'}", flush=True)
        if question == "segmentation" and not sizes:
            plots.segmentation(Path(arguments.runs), Path(arguments.data))
        if results and name in ("peers", "scaling"):
            getattr(plots, name)(folder)
    if not sizes:
        pages.write()


if __name__ == "__main__":
    main()
