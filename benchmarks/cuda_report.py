"""A report on each kernel of the CUDA binary: registers, shared memory, spills, occupancy, important instructions.

    python -m benchmarks.cuda_report [--module path/to/_C.so] [--check] [--output file.md] [--counts file.json]

Reads the compiled module with cuobjdump (pip: nvidia-cuda-cuobjdump); no GPU is needed. With --check it fails when a
kernel spills registers or has a stack frame, or when a counted loop takes more instructions than its limit.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {"HMMA": r"\bHMMA\.", "FFMA": r"\bFFMA\b", "LDG.128": r"\bLDG\.E\.128", "LDGSTS": r"\bLDGSTS\."}

# Per multiprocessor: registers, shared memory in bytes, threads, blocks. CUDA programming guide, compute capabilities.
MULTIPROCESSOR = {80: (65536, 164 * 1024, 2048, 32), 90: (65536, 228 * 1024, 2048, 32)}
THREADS = {"contrast_reduce": 256}

# Counts in the SASS: a pattern of kernels, the count, and its limit.
PAIRS = "instructions a pair"  # of the loop over tiles at a depth of 128, copies and products included
EIGHTS = "instructions for 8 FFMA"  # of the loop over the depth
LOGITS = "instructions a logit"  # of the loop over the pixels of a patch
PATCH = "other instructions a patch"  # of a warp, before and after that loop, for four classes
CLASSES = "instructions a class of a pixel"  # of the two loops over classes; one patch holds the pixel
PIXEL = "other instructions a pixel"  # with four classes
ENTRIES = "instructions a pair of one channel"  # of the loop over rows
TERMS = "instructions a term of a gradient"  # of the loop over the other side
LIMITS: list[tuple[str, str, float]] = [
    (r"contrast_forward_mma<B?Float16, 128, rule>", PAIRS, 60),
    (r"contrast_backward_mma<B?Float16, 128, \w+, rule>", PAIRS, 100),
    (r"contrast_forward_mma<float, 128, rule>", PAIRS, 95),
    (r"contrast_backward_mma<float, 128, \w+, rule>", PAIRS, 170),
    (r"contrast_forward_tiles<float, FFMA, 128, rule>", EIGHTS, 11),
    (r"contrast_backward_tiles<float, FFMA, 128, rule>", EIGHTS, 13),
    (r"gaussian_contrast_rows<float, float, 8>", EIGHTS, 30),
    (r"patch_statistics_(forward|coefficients)<float, 4, 4>", LOGITS, 60),
    (r"patch_statistics_(forward|coefficients)<float, 4, 4>", PATCH, 620),
    (r"patch_statistics_backward<float, apart>", CLASSES, 170),
    (r"patch_statistics_backward<float, apart>", PIXEL, 630),
    (r"semantic_disparity_forward<float>", ENTRIES, 22),
    (r"semantic_disparity_backward<float>", TERMS, 27),
]
ROWS, DEPTH, BLOCK = 64, 128, 128  # of an mma kernel: rows of a block, depth counted for, threads


def size_of(name: str) -> int:
    """Bytes of an element of the embeddings."""
    return 4 if "float" in name else 2


def columns_of_tile(name: str) -> int:
    """Columns of a tile of an mma kernel: kMmaColumns in the sources, where rows of 128 in 16 bits are held forward."""
    if " 128," not in name:
        return 16
    return 64 if "forward" in name and size_of(name) == 2 else 32


@dataclass
class Instruction:
    address: int
    operation: str  # e.g. HMMA.16816.F32
    target: int | None = None  # of a branch
    predicated: bool = False


def read_instruction(line: str) -> Instruction | None:
    """An instruction of `cuobjdump -sass`; None for other lines."""
    match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?([A-Z][A-Z0-9_.]*)([^;]*);", line)
    if not match:
        return None
    address, predicate, operation, operands = match.groups()
    # A branch may have a second predicate: BRA P0, 0x10.
    predicated = predicate is not None or bool(re.search(r"P\d", operands))
    # BRA.U asks one predicate for the whole warp, from sm_100 on. A call with a predicate leaves a loop, and does not
    # come back.
    jumps = operation in ("BRA", "BRA.U") or (operation.startswith("CALL.REL") and predicated)
    target = re.search(r"0x([0-9a-f]+)\s*$", operands) if jumps else None
    return Instruction(int(address, 16), operation, int(target[1], 16) if target else None, predicated)


def loops(sass: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop; the last is the branch back. Inner loops come before outer ones."""
    place = {x.address: i for i, x in enumerate(sass)}
    found = [(place[x.target], i) for i, x in enumerate(sass) if x.target is not None and x.target < x.address]
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def usual_length(sass: list[Instruction], first: int, last: int) -> int:
    """The number of instructions from `first` to `last` in the usual case.

    Of two alternatives the shorter one counts, since the longer ones are for tiles on the diagonal and for rows that
    are not finite. Instructions that may be skipped count.
    """
    place = {x.address: i for i, x in enumerate(sass)}
    length, i = 0, first
    while i <= last:
        x = sass[i]
        length += 1
        other = place.get(x.target) if x.target is not None and x.predicated else None
        if other is not None and i < other <= last:
            end = sass[other - 1]  # the first alternative ends with a jump over the second one
            over = place.get(end.target) if end.target is not None and not end.predicated else None
            if over is not None and other < over <= last + 1:
                length += min(usual_length(sass, i + 1, other - 1), usual_length(sass, other, over - 1))
                i = over
                continue
        i += 1
    return length


def fewest(sass: list[Instruction], first: int, last: int, needed: Sequence[str] = ()) -> int:
    """The fewest instructions on a way from `first` to `last`, or to an exit, that meets the `needed` ones in order.

    Such a way goes around a loop at most once, and calls nothing: divisions have calls for unusual numbers.
    """
    place = {x.address: i for i, x in enumerate(sass)}
    found = []
    ways: dict[int, dict[int, int]] = {first: {0: 0}}  # by instruction and by how many needed ones were met: the length
    for i in range(first, last + 1):
        x = sass[i]
        if x.operation.startswith("RET") or (x.operation.startswith("CALL") and x.target is None):
            continue
        after = [i + 1] if x.target is None or x.predicated else []
        after += [place[x.target]] if x.target is not None else []
        for met, length in ways.get(i, {}).items():
            now = met + (met < len(needed) and x.operation.startswith(needed[met]))
            if i == last or (x.operation == "EXIT" and not x.predicated):
                found += [length + 1] if now == len(needed) else []
                continue
            for j in after:
                if j > i:
                    at = ways.setdefault(j, {})
                    at[now] = min(length + 1, at.get(now, length + 1))
    if not found:
        raise ValueError(f"no way from {sass[first].address:#x} to {sass[last].address:#x} meets {', '.join(needed)}")
    return min(found)


def holds(sass: list[Instruction], first: int, last: int, operation: str) -> int:
    return sum(x.operation.startswith(operation) for x in sass[first : last + 1])


def instructions_per_pair(kernel: Kernel) -> float:
    """Instructions of one thread for one pair of rows, in the loop over tiles."""
    sass, columns = kernel.sass, columns_of_tile(kernel.name)
    all_loops = loops(sass)
    first, last = max((x for x in all_loops if holds(sass, *x, "HMMA")), key=lambda x: x[1] - x[0])
    length = float(usual_length(sass, first, last))
    copies = columns * DEPTH * size_of(kernel.name) // 16 / BLOCK  # 16 bytes each
    for inner in all_loops:
        if first < inner[0] and inner[1] < last and (body := holds(sass, *inner, "LDGSTS")):
            length += (copies / body - 1) * (inner[1] - inner[0] + 1)
            break  # a pipeline of one stage copies at another place
    return length / (ROWS * columns / BLOCK)


def innermost_loops(sass: list[Instruction]) -> list[tuple[int, int]]:
    all_loops = loops(sass)
    return [x for x in all_loops if not any(x[0] <= y[0] and y[1] < x[1] for y in all_loops)]


def instructions_per_eight(kernel: Kernel) -> float:
    """Instructions for 8 FFMA in the innermost loop that has the most of them."""
    sass = kernel.sass
    first, last = max(innermost_loops(sass), key=lambda x: holds(sass, *x, "FFMA"))
    return (last - first + 1) / (holds(sass, first, last, "FFMA") / 8)


def instructions_per_logit(kernel: Kernel) -> float:
    """Instructions for a logit in the loop that reads four classes of four pixels at once."""
    first, last = loop_over_pixels(kernel.sass)
    return usual_length(kernel.sass, first, last) / (4 * holds(kernel.sass, first, last, "LDG.E.128"))


def loop_over_pixels(sass: list[Instruction]) -> tuple[int, int]:
    return min((x for x in loops(sass) if holds(sass, *x, "LDG.E.128")), key=lambda x: x[1] - x[0])


LOAD, STORE, SHUFFLE, EXPONENTIAL, RECIPROCAL = ["LDG"], ["STG"], ["SHFL"], ["MUFU.EX2"], ["MUFU.RCP"]


def other_instructions_per_patch(kernel: Kernel) -> float:
    """Instructions of a warp that has a patch, without its loop over pixels."""
    sass = kernel.sass
    first, last = loop_over_pixels(sass)
    # Each class has two sums over the warp and stores two numbers. Forward, the sum of the entropies comes last.
    if "forward" in kernel.name:
        needed = (SHUFFLE * 10 + STORE * 2) * 4 + SHUFFLE * 5 + STORE
    else:
        needed = (SHUFFLE * 10 + LOAD + STORE * 2) * 4
    return fewest(sass, 0, first) - 1 + fewest(sass, last + 1, len(sass) - 1, needed)


def loops_over_classes(sass: list[Instruction]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a pixel's gradient, for logits: the loop that sums over the classes, and the one that stores.

    For a class they load four numbers: the logit, and three of its patch.
    """
    found = [x for x in innermost_loops(sass) if (e := holds(sass, *x, "MUFU.EX2")) and holds(sass, *x, "LDG") == 4 * e]
    (sums,) = (x for x in found if not holds(sass, *x, "STG"))
    (stores,) = (x for x in found if holds(sass, *x, "STG"))
    return sums, stores


def instructions_per_class(kernel: Kernel) -> float:
    """Each loop may take several classes at once."""
    found = ((*loop, holds(kernel.sass, *loop, "MUFU.EX2")) for loop in loops_over_classes(kernel.sass))
    return sum(usual_length(kernel.sass, first, last) / classes for first, last, classes in found)


def other_instructions_per_pixel(kernel: Kernel) -> float:
    sass, (sums, stores) = kernel.sass, loops_over_classes(kernel.sass)
    scan = LOAD + (LOAD + EXPONENTIAL) * 3 + RECIPROCAL  # of the classes, for the entropy
    before = fewest(sass, 0, sums[0], scan + LOAD) - 1  # the last one loads a gradient of the patch
    return before + fewest(sass, sums[1] + 1, stores[0]) - 1 + fewest(sass, stores[1] + 1, len(sass) - 1)


def instructions_per_entry(kernel: Kernel) -> float:
    """Instructions for a pair in the innermost loop that stores most: a load of the row and a store for each pair."""
    sass = kernel.sass
    with_loads = (x for x in innermost_loops(sass) if holds(sass, *x, "LDG"))
    first, last = max(with_loads, key=lambda x: holds(sass, *x, "STG"))
    return (last - first + 1) / holds(sass, first, last, "STG")


def instructions_per_term(kernel: Kernel) -> float:
    """Instructions for a term in the innermost loop that has the most loads, two for each term."""
    sass = kernel.sass
    first, last = max(innermost_loops(sass), key=lambda x: holds(sass, *x, "LDG"))
    return (last - first + 1) / (holds(sass, first, last, "LDG") / 2)


@dataclass
class Kernel:
    name: str
    architecture: int
    registers: int
    stack: int
    local: int
    instructions: Counter = field(default_factory=Counter)
    sass: list[Instruction] = field(default_factory=list)

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0

    def shared_bytes(self, depth: int) -> int:
        """Dynamic shared memory at this depth, for tiles in two stages (tile_shared_bytes in the sources)."""
        if "_mma" in self.name:
            columns, deepest = columns_of_tile(self.name), 128 if " 128," in self.name else 256
            rows = 0 if columns == 64 else ROWS  # rows that are held pass through a stage
            size = size_of(self.name)
            return (rows + 2 * columns) * (deepest + 16 // size) * size + 2 * 40 * columns + 64 + 32
        if "_finish_gradients" in self.name:
            return 4 * 512 * 8 + 32
        if "_tiles" not in self.name:
            return 0
        depth, stages = (128, 1) if "deep" in self.name else (depth, 2)
        size = size_of(self.name)
        rows, columns = 64 if depth <= 128 else 32, 32 if size == 4 else 64
        row = (depth + 15) // 16 * 16 + 16 // size

        def rounded(n: int) -> int:
            return (n + 15) // 16 * 16

        tiles = rounded(rows * row * size) + rounded(stages * columns * row * size)
        return tiles + rounded(rows * (columns + 4) * 4) + 40 * columns + 64 + 32 + 16

    def counted(self) -> list[tuple[str, float, float]]:
        """(name, number, limit) of each count of LIMITS in this kernel."""
        found = []
        for name, what, most in LIMITS:
            if not re.fullmatch(name, self.name):
                continue
            try:
                found.append((what, COUNT[what](self), most))
            except (ValueError, ZeroDivisionError) as error:
                raise ValueError(f"sm_{self.architecture} {self.name}, {what}: {error}") from error
        return found

    def occupancy(self, depth: int = 128) -> float:
        """The theoretical occupancy, as a share of the threads of a multiprocessor."""
        registers, shared, threads, blocks = MULTIPROCESSOR[self.architecture]
        per_block = next((t for name, t in THREADS.items() if name in self.name), 128)
        per_warp = (self.registers * 32 + 255) // 256 * 256  # registers are handed out 256 at a time
        limits = [registers // (per_warp * per_block // 32), threads // per_block, blocks]
        # The system takes 1 KiB of every block's shared memory.
        limits.append(shared // (self.shared_bytes(depth) + 1024))
        return min(limits) * per_block / threads


COUNT: dict[str, Callable[[Kernel], float]] = {
    PAIRS: instructions_per_pair,
    EIGHTS: instructions_per_eight,
    LOGITS: instructions_per_logit,
    PATCH: other_instructions_per_patch,
    CLASSES: instructions_per_class,
    PIXEL: other_instructions_per_pixel,
    ENTRIES: instructions_per_entry,
    TERMS: instructions_per_term,
}


def find_cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    places = glob.glob(str(Path(sysconfig.get_path("purelib")) / "nvidia" / "*" / "bin" / "cuobjdump"))
    if found or places:
        return found or places[0]
    sys.exit("cuobjdump not found; install it with: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


ENUMERATORS = {"Math": ("FFMA", "TF32"), "Owner": ("anchors", "keys", "both")}


def short_name(mangled: str) -> str:
    """A name such as contrast_backward_mma<BFloat16, 128, both, rule>.

    The last word tells whether masks or several channels decide which pairs count. Of the statistics it tells whether
    patches overlap. The word deep marks kernels of tiles that process their rows in chunks.
    """
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    for kind, values in ENUMERATORS.items():
        for number, value in enumerate(values):
            name = name.replace(f"(pglcl::cuda::{kind}){number}", value)
    name = re.sub(r"\(.*$", "", name.replace("(int)", ""))
    name = re.sub(r"(_tiles<.*), false>", r"\1>", re.sub(r"(_tiles<.*, )(\w+), true>", r"\1\2, deep>", name))
    for value, patches in (("false", "apart"), ("true", "overlapping")):
        name = re.sub(rf"(_statistics_backward<.*), {value}>", rf"\1, {patches}>", name)
    for value, rule in (("false", "rule"), ("true", "general")):
        name = name.replace(f", {value}>", f", {rule}>").replace(f", {value}, deep>", f", {rule}, deep>")
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
                if instruction := read_instruction(line):
                    kernels[mangled, architecture].sass.append(instruction)
                for label, pattern in INSTRUCTIONS.items():
                    kernels[mangled, architecture].instructions[label] += bool(re.search(pattern, line))
    return [kernel for (mangled, _), kernel in kernels.items() if "pglcl" in mangled]


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
    parser.add_argument("--check", action="store_true", help="fail on a spill, a stack frame or a count over its limit")
    parser.add_argument("--output", type=Path, help="write the Markdown table there")
    parser.add_argument("--counts", type=Path, help="write what benchmarks.roofline reads there")
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
    if arguments.counts:
        of = min(k.architecture for k in kernels if k.architecture >= 80)
        counts = {
            k.name: {what: round(count, 1) for what, count, _ in k.counted()} | {"registers": k.registers}
            for k in sorted(kernels, key=lambda k: k.name)
            if k.architecture == of and k.counted()
        }
        arguments.counts.write_text(json.dumps({"architecture": of, "kernels": counts}, indent=1) + "\n")
    bad = [k for k in kernels if k.spills]
    architectures = ", ".join(f"sm_{a}" for a in sorted({k.architecture for k in kernels}))
    print(f"\n{len(kernels)} kernels for {architectures}; {len(bad)} spill or have a stack frame")
    for k in bad:
        print(f"  sm_{k.architecture} {k.name}: {k.stack} bytes of stack, {k.local} local")
    over = False
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        for what, count, most in k.counted() if k.architecture >= 80 else []:
            print(
                f"sm_{k.architecture} {k.name}: {count:.1f} {what}, at most {most:g}{'' if count <= most else ': OVER'}"
            )
            over = over or count > most
    if arguments.check and (bad or over):
        sys.exit(1)


if __name__ == "__main__":
    main()
