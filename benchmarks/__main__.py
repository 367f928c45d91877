"""python -m benchmarks [loss|statistics ...] [--sizes 512,4096] [--device cpu|cuda]

Measures, prints the tables, and writes benchmarks/results/<question>.json with every sample and the table beside it.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import torch

from benchmarks import loss, statistics
from benchmarks.runner import machine, save

QUESTIONS = ("loss", "statistics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help="loss, statistics; all by default")
    parser.add_argument("--sizes", default="128,1024,4096,16384", help="anchors of the loss (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
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
    for question in arguments.questions or QUESTIONS:
        if question == "loss":
            sizes = [int(n) for n in arguments.sizes.split(",")]
            results, table = loss.run(sizes=sizes, device=arguments.device)
        else:
            results, table = statistics.run(device=arguments.device)
        save(question + suffix, command.strip(), results, table)
        print(f"\n{question}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
