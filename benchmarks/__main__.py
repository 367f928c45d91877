"""python -m benchmarks [questions] [--sizes 512,4096] [--device cpu|cuda]

Measures, prints the tables, and writes benchmarks/results/<question>.json with every sample, the table and the plot
beside it. Without questions all but `segmentation` are answered, which trains networks for hours and resumes what was
interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import torch

from benchmarks.runner import machine, save

QUESTIONS = ("loss", "statistics", "gaussian", "scaling", "peers", "segmentation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=", ".join(QUESTIONS))
    parser.add_argument("--sizes", default="", help="patches, e.g. 512,4096, for loss and peers")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--data", default="", help="segmentation: the folder with ACDC/ and Task04_Hippocampus/")
    parser.add_argument("--runs", default="build/segmentation", help="segmentation: the runs (default: %(default)s)")
    parser.add_argument("--only", default="", help="segmentation: runs whose dataset/method/seed contains this")
    parser.add_argument("--jobs", type=int, default=1, help="segmentation: runs at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e6, help="segmentation: start no run after these")
    arguments = parser.parse_args()
    for question in arguments.questions:
        if question not in QUESTIONS:
            parser.error(f"questions are {', '.join(QUESTIONS)}, got {question}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks: no GPU is visible to torch")
    torch.set_num_threads(arguments.threads)
    command = "python -m benchmarks " + shlex.join(sys.argv[1:])
    suffix = "" if arguments.device == "cpu" else "_cuda"
    info = machine()
    print(
        f"{info['processor']}, {info['threads']} threads, {info['cpu_instruction_set']}, torch {info['torch_running']}"
    )
    on_device = [q for q in QUESTIONS[:-1] if arguments.device == "cpu" or q in ("loss", "statistics", "gaussian")]
    for question in arguments.questions or on_device:
        if question == "segmentation":
            if not arguments.data:
                parser.error("segmentation needs --data")
            from benchmarks import segmentation

            segmentation.main(
                arguments.data,
                arguments.runs,
                arguments.only,
                arguments.jobs,
                arguments.threads,
                arguments.minutes,
                command.strip(),
            )
            continue
        results, table = answer(question, arguments)
        save(question + suffix, command.strip(), results, table)
        if not suffix and question in ("peers", "scaling"):
            from benchmarks import plots

            getattr(plots, question)()
        print(f"\n{question}\n\n{table}", flush=True)


def answer(question: str, arguments: argparse.Namespace) -> tuple[list[dict], str]:
    sizes = [int(n) for n in arguments.sizes.split(",") if n]
    device, threads = arguments.device, arguments.threads
    if question == "loss":
        from benchmarks import loss

        return loss.run(sizes=sizes or [128, 1024, 4096, 16384], device=device)
    if question == "statistics":
        from benchmarks import statistics

        return statistics.run(device=device)
    if question == "gaussian":
        from benchmarks import gaussian

        return gaussian.run(device=device)
    if question == "scaling":
        from benchmarks import scaling

        return scaling.run(threads=threads)
    from benchmarks import peers

    results, table = peers.run(
        sizes=sizes or [128, 512, 2048, 8192, 65536], depths=[128], dtypes=["float32"], threads=threads
    )
    more, other = peers.run(
        sizes=sizes or [512, 4096], depths=[64, 256], dtypes=["float32"], threads=threads, repetitions=3
    )
    low, lowest = peers.run(
        sizes=sizes or [512, 4096], depths=[128], dtypes=["bfloat16"], threads=threads, repetitions=3
    )
    return results + more + low, "\n\n".join([table, other, lowest])


if __name__ == "__main__":
    main()
