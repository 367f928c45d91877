"""What the CUDA binary holds: registers, shared memory, spills, occupancy and the instructions that matter, per kernel.

    python -m benchmarks.cuda_report [--module path/to/_C.so] [--check] [--output file.md]

Reads the compiled module with cuobjdump (pip: nvidia-cuda-cuobjdump); no GPU is needed. With --check it fails when a
fast-path kernel spills registers or has a stack frame.
"""

from __future__ import annotations

import argparse
import glob
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# Kernels of the fast path; the plain ones may do as they like.
FAST = re.compile(r"_tiles|patch_statistics_|semantic_disparity_|disparity_bounds_|contrast_reduce")
INSTRUCTIONS = {"HMMA": r"\bHMMA\.", "FFMA": r"\bFFMA\b", "LDG.128": r"\bLDG\.E\.128", "LDGSTS": r"\bLDGSTS\."}

# Per multiprocessor: registers, shared memory in bytes, threads, blocks. CUDA programming guide, compute capabilities.
MULTIPROCESSOR = {80: (65536, 164 * 1024, 2048, 32), 90: (65536, 228 * 1024, 2048, 32)}
THREADS = {"contrast_reduce": 256}


@dataclass
class Kernel:
    name: str
    architecture: int
    registers: int
    stack: int
    local: int
    instructions: Counter = field(default_factory=Counter)

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0

    def shared_bytes(self, depth: int) -> int:
        """Dynamic shared memory of a tile kernel at this depth, two stages (tile_shared_bytes in the sources)."""
        if "_tiles" not in self.name:
            return 0
        size = 4 if "float" in self.name else 2
        columns = 32 if size == 4 else 64
        row = (depth + 15) // 16 * 16 + 16 // size

        def rounded(n: int) -> int:
            return (n + 15) // 16 * 16

        tiles = rounded(32 * row * size) + rounded(2 * columns * row * size)
        return tiles + rounded(32 * (columns + 4) * 4) + columns * 8 + 6 * columns * 4

    def occupancy(self, depth: int = 128) -> float:
        """Theoretical, as a share of the threads of a multiprocessor."""
        registers, shared, threads, blocks = MULTIPROCESSOR[self.architecture]
        per_block = next((t for name, t in THREADS.items() if name in self.name), 128)
        per_warp = (self.registers * 32 + 255) // 256 * 256  # registers are handed out 256 at a time
        limits = [registers // (per_warp * per_block // 32), threads // per_block, blocks]
        # 1 KiB of every block's shared memory is the system's.
        limits.append(shared // (self.shared_bytes(depth) + 1024))
        return min(limits) * per_block / threads


def find_cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    places = glob.glob(str(Path(sysconfig.get_path("purelib")) / "nvidia" / "*" / "bin" / "cuobjdump"))
    if found or places:
        return found or places[0]
    sys.exit("cuobjdump not found; install it with: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def short_name(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((?!pglcl::cuda::Math|int|bool).*$", "", name.replace("(pglcl::cuda::Math)0", "FFMA"))
    name = name.replace("(pglcl::cuda::Math)1", "tensor").replace("(int)", "")
    return re.sub(r"^void |pglcl::cuda::|pglcl::", "", name).strip()


def read_module(module: Path) -> list[Kernel]:
    tool = find_cuobjdump()
    usage = subprocess.run([tool, "--dump-resource-usage", str(module)], capture_output=True, text=True, check=True)
    kernels: dict[tuple[str, int], Kernel] = {}
    architecture, mangled = 0, ""
    names: dict[str, str] = {}
    for line in (usage.stdout + usage.stderr).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = int(match.group(1))
        elif match := re.search(r"Function (\S+?):", line):
            mangled = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", line):
            name = names.setdefault(mangled, short_name(mangled))
            kernels[mangled, architecture] = Kernel(name, architecture, *map(int, match.groups()))
    for architecture in sorted({a for _, a in kernels}):
        sass = subprocess.run(
            [tool, "-sass", "-arch", f"sm_{architecture}", str(module)], capture_output=True, text=True, check=True
        )
        for line in sass.stdout.splitlines():
            if match := re.search(r"Function : (\S+)", line):
                mangled = match.group(1)
            elif (mangled, architecture) in kernels:
                for label, pattern in INSTRUCTIONS.items():
                    kernels[mangled, architecture].instructions[label] += bool(re.search(pattern, line))
    return [k for k in kernels.values() if "<" in k.name]


def table(kernels: list[Kernel]) -> str:
    shown = [a for a in MULTIPROCESSOR if any(k.architecture == a for k in kernels)]
    by_name: dict[str, dict[int, Kernel]] = defaultdict(dict)
    for k in kernels:
        by_name[k.name][k.architecture] = k
    head = ["kernel"]
    for a in shown:
        head += [f"sm_{a} registers", "occupancy", *(f"{i}" for i in INSTRUCTIONS)]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for name in sorted(by_name):
        cells = [f"`{name}`"]
        for a in shown:
            k = by_name[name].get(a)
            if k is None:
                cells += [""] * (2 + len(INSTRUCTIONS))
                continue
            cells += [str(k.registers), f"{k.occupancy():.0%}", *(str(k.instructions[i]) for i in INSTRUCTIONS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", type=Path, help="the compiled module; that of the installed pglcl_ext by default")
    parser.add_argument("--check", action="store_true", help="fail on a spill or a stack frame in a fast-path kernel")
    parser.add_argument("--output", type=Path, help="write the Markdown table there")
    arguments = parser.parse_args()
    module = arguments.module
    if module is None:
        import pglcl_ext._C as compiled

        module = Path(compiled.__file__)
    kernels = read_module(module)
    if not kernels:
        sys.exit(f"{module} holds no CUDA kernels")
    text = table(kernels)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    bad = [k for k in kernels if FAST.search(k.name) and k.spills]
    architectures = ", ".join(f"sm_{a}" for a in sorted({k.architecture for k in kernels}))
    print(f"\n{len(kernels)} kernels for {architectures}; {len(bad)} fast-path kernels spill or have a stack frame")
    for k in bad:
        print(f"  sm_{k.architecture} {k.name}: {k.stack} bytes of stack, {k.local} local")
    if arguments.check and bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
