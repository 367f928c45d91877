"""Turns the CUDA headers into C++ that g++ compiles. It takes their CUDA branch, not that of the emulator.

Three constructs of CUDA are not C++. Each becomes a call of cuda_shim.h or ptx.h, and nothing else changes:

- ``asm volatile("text" : outputs : inputs : clobbers)`` becomes a `Ptx` that interprets the text;
- ``kernel<<<grid, threads, bytes, stream>>>(arguments)`` becomes `launch`;
- ``__shared__ T name[count]`` becomes a reference to memory that is filled with NaN before each block.

Barriers of the kernels are numbered on the way, so that a run can leave out one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
BARRIER = re.compile(r"(?<![\w:])(?:sync_threads\(\)|sync_warp\(\)|wait_copies<\w+>\(\));")


@dataclass(frozen=True)
class Barrier:
    """A barrier, or a wait for copies, of a kernel: its number and its place."""

    number: int
    file: str
    line: int
    text: str


def closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`; strings are skipped."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == '"':
            at = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
        if depth == 0:
            return at
    raise ValueError(f"no closing parenthesis: {text[start : start + 60]!r}")


def split_top(text: str, separator: str) -> list[str]:
    """Splits at a separator that stands outside of parentheses, brackets, braces and strings."""
    parts, depth, at, first = [], 0, 0, 0
    while at < len(text):
        if text[at] == '"':
            at = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
        if depth == 0 and text[at] == separator:
            parts.append(text[first:at])
            first = at + 1
        at += 1
    return [*parts, text[first:]]


TOUCHES_MEMORY = ("cp.async", "ldmatrix", "stmatrix", "bar.", "st.", "ld.", "red.", "atom.")


def translate_asm(statement: str) -> str:
    """One asm statement as a chain of calls. Refuses a statement that touches memory but does not declare it."""
    inside = statement[statement.index("(") + 1 : statement.rindex(")")]
    template, *rest = split_top(inside, ":")
    outputs, inputs, clobbers, *_ = [*rest, "", "", ""]
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template))
    if any(text.lstrip().startswith(name) for name in TOUCHES_MEMORY) and '"memory"' not in clobbers:
        raise ValueError(f'asm touches memory without a "memory" clobber: {text}')
    calls = "".join(
        f".{kind}({constraint}, {value})"
        for kind, operands in (("output", outputs), ("input", inputs))
        for constraint, value in re.findall(r'("[^"]*")\s*(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))', operands)
    )
    return f"::witness::Ptx({template.strip()}){calls}.run()"


def translate(text: str) -> str:
    """The CUDA spellings of one file, as C++."""
    out, at = "", 0
    for found in re.finditer(r"\basm\b\s*(?:volatile\s*)?\(", text):
        if found.start() < at:
            continue
        end = closing(text, found.end() - 1)
        out += text[at : found.start()] + translate_asm(text[found.start() : end].replace("\\\n", "\n"))
        at = end
    text = out + text[at:]
    text = re.sub(
        r"extern __shared__[^;]*?\bunsigned char (\w+)\[\];", r"auto* \1 = ::witness::dynamic_shared();", text
    )
    text = re.sub(
        r"__shared__ ([\w:]+) ([\w#]+)\[(\w+)\];", r"auto& \2 = ::witness::static_shared<\1, \3>([] {});", text
    )
    return re.sub(
        r"(\w+)<<<(.*?), (\w+), (\w+), (\w+)>>>\((\w+)\)", r"::witness::launch(\2, \3, \4, [=] { \1(\6); })", text
    )


def number_barriers(path: Path, first: int) -> tuple[str, list[Barrier]]:
    """The text of a kernel's file with its barriers made conditional, numbered from `first`."""
    name, found = str(path.relative_to(CSRC)), []
    lines = path.read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.lstrip().startswith("//"):
            continue

        def conditional(match: re.Match[str], i: int = i) -> str:
            found.append(Barrier(first + len(found), name, i + 1, match.group()))
            return f"if (::witness::kept({found[-1].number})) {match.group()}"

        lines[i] = BARRIER.sub(conditional, line)
    return "".join(lines), found


def kernels() -> list[Path]:
    """The files of device code, without the one that describes the machine."""
    return sorted(path for path in CSRC.glob("cuda/kernels/*.cuh") if not path.name.startswith("device"))


def all_barriers() -> list[Barrier]:
    """Every barrier of every kernel."""
    barriers: list[Barrier] = []
    for path in kernels():
        barriers += number_barriers(path, len(barriers))[1]
    return barriers


def write_sources(folder: Path) -> None:
    """Writes the kernels' headers, translated, and those that they share with the CPU into `folder`."""
    count = 0
    for path in sorted([*CSRC.glob("shared/*.h"), *CSRC.glob("cuda/kernels/*")]):
        text = path.read_text()
        if path in kernels():
            text, barriers = number_barriers(path, count)
            count += len(barriers)
        text = translate(text).replace("defined(__CUDACC__)", "1")  # their CUDA branch
        target = folder / path.relative_to(CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
