"""Plants faults into the CUDA sources by rule. One build holds all of them, and a number at run time switches one on.

A rule rewrites a condition, a value or a statement to ``PGLCL_MUTANT(number, original, mutated)``, which the emulator's
simt_device.h turns into a choice. Declarations, constant expressions and templates stay as they are, since no code runs
there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        number: switches it on; from 1.
        file: relative to csrc.
        function: the function that holds it, or the type in whose member it is.
        line: of the original file, from 1.
        rule: the name of the rule.
        original, mutated: the text before and after.
        again: how many faults of the same file, function, rule and text come before it.
        start, stop: the place of the expression or statement in the original file.
        kind: "expression" or "call".
    """

    number: int
    file: str
    function: str
    line: int
    rule: str
    original: str
    mutated: str
    again: int
    start: int
    stop: int
    kind: str

    @property
    def near(self) -> str:
        """The name of the function, with its file."""
        return f"{self.file} | {self.function}"

    @property
    def key(self) -> str:
        """A name of the fault that stays the same as long as its function and text do, wherever they move."""
        squeezed = " ".join(f"{self.original} => {self.mutated}".split())
        more = f" | again {self.again}" if self.again else ""
        return f"{self.near} | {self.rule} | {squeezed}{more}"


# A rule, a token, and its replacement. Spaces tell comparisons from template brackets, since the sources are formatted.
SWAPS: list[tuple[str, str, str]] = [
    ("bound", r" < ", " <= "),
    ("bound", r" <= ", " < "),
    ("bound", r" > ", " >= "),
    ("bound", r" >= ", " > "),
    ("identity", r" == ", " != "),
    ("identity", r" != ", " == "),
    ("condition", r" && ", " || "),
    ("condition", r" \|\| ", " && "),
    ("index", r" \+ ", " - "),
    ("index", r"(?<=[\w)\]]) - ", " + "),
    ("index", r"(?<=[\w)\]>]) \* ", " + "),
    ("index", r" / (?![/*])", " * "),
    ("index", r" % ", " / "),
    ("mask", r" & ", " | "),
    ("mask", r" \| ", " & "),
    ("mask", r" >> ", " << "),
    ("mask", r" << ", " >> "),
    ("identity", r"(?<![\w.])INFINITY\b", "0.0f"),
    ("condition", r"\btrue\b", "false"),
    ("condition", r"\bfalse\b", "true"),
    ("condition", r"(?<=[(\s])!(?=[\w(])", ""),
    ("argument", r"\.contiguous\(\)", ""),
    ("argument", r"\bcurrent_stream\(\)", "PglclStream()"),
]
NUMBER = re.compile(r"(?<![\w.\[<])\d+(?![\w.\]>])")


def mutate(text: str) -> Iterator[tuple[str, str]]:
    """(rule, mutated text) of an expression or a statement, one for each place where a rule applies."""
    for rule, pattern, replacement in SWAPS:
        for found in re.finditer(pattern, text):
            if found.group() in (" < ", " > ") and re.match(r"\w+(, \w+)*>", text[found.end() :]):
                continue
            yield rule, text[: found.start()] + replacement + text[found.end() :]
    for found in NUMBER.finditer(text):
        yield "constant", text[: found.start()] + str(int(found.group()) + 1) + text[found.end() :]
    for found in re.finditer(r"(?<=\w)\[([01])\]", text):  # of arrays in registers: the other of two
        other = 1 - int(found.group(1))
        yield "fragment", text[: found.start()] + f"[{other}]" + text[found.end() :]


# --- where a fault can be planted -----------------------------------------------------------------------------------

# What the emulated device does not compile: comments, and lines for nvcc alone.
LEFT_OUT = re.compile(r"//[^\n]*|^#if defined\(__CUDACC__\)$.*?^#(?:else|endif)", re.MULTILINE | re.DOTALL)


def compiled(text: str) -> str:
    """The text with spaces in place of what is not compiled, so that indices into it stay the same."""
    return LEFT_OUT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


SKIPPED_WORDS = (
    "constexpr", "static_assert", "template", "#", "using ", "struct ", "enum ", "class ", "namespace", "asm ", "case ",
    "default:", "__shared__", "PGLCL_STATIC_SHARED", "TORCH_CHECK", "TORCH_LIBRARY", "STABLE_", "m.impl", "public:",
    "private:", "SharedMemory ", "throw ",
)  # fmt: skip
STATEMENT = re.compile(
    r"(?P<indent>[ ]*)(?P<head>(?:if|while) \(|for \([^;]*; |return |(?:const )?[\w:]+(?:<[\w:<>, ]+>)? [*]?\w+ = |"
    r"[\w.\[\]\->]+ (?:[-+*/|&^]|<<|>>)?= |[\w.\[\]\->:<>]+\((?=[^)]|\)))"
)
DELETED = re.compile(
    r"^ *(?:sync_threads\(\)|sync_warp\(\)|wait_copies<\w+>\(\)|commit_copies\(\)|PGLCL_CHECK_LAUNCH\(\)|"
    r"PGLCL_ALLOW_SHARED\(.*\)|[\w.\->]+(?:\.|->)(?:template )?"
    r"(?:store|store_vector<\w+>|merge|add|load|write|store_side)\(.*\)|\+\+\w+|"
    r"[\w\[\].]+ [-+*/|&]?= [^;{]*|copy_\w+(?:<\w+>)?\(.*\));$"
)


def closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`; -1 if none does."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return -1


def without_brackets(text: str) -> str:
    """The text without the contents of brackets."""
    out, depth = "", 0
    for character in text:
        depth += character in "([<"
        if depth == 0:
            out += character
        depth -= character in ")]>" and depth > 0
    return out


def statements(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each statement or head of one: from a line's first word to its `;` or `{`.

    Functions that are evaluated at compile time, and macros with backslashes, are left out. So is the head of a loop
    after `#pragma unroll`: one more round would read after the end of an array of registers, which no emulator notices.
    """
    at, constant_until = 0, -1
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        start = offsets[i]
        line = lines[i]
        stripped = line.strip()
        if start < constant_until or not stripped or line.endswith("\\"):
            i += 1
            continue
        if "constexpr" in line and line.rstrip().endswith("{") and "if constexpr" not in line:
            constant_until = closing(text, text.index("{", start))
            i += 1
            continue
        last = i
        while last < len(lines) - 1 and not re.search(r"[;{}]\s*$", lines[last]) and last - i < 12:
            last += 1
        at = offsets[last] + len(lines[last])
        yield start, at
        i = last + 1


def regions(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) of the mutable parts of a statement: an expression, or the whole statement."""
    whole = text[start:end].rstrip()
    if any(word in whole for word in SKIPPED_WORDS) or "[&]" in whole or "[=]" in whole or '"' in whole:
        return
    found = STATEMENT.match(whole)
    if found is None:
        return
    head = found["head"]
    first = start + found.end()
    if head.startswith(("if (", "while (")):
        stop = closing(text, start + found.end() - 1)
        yield first, stop - 1, "expression"
        rest = text[stop:end]
        returned = re.match(r"\s*return ([^;{}]+);\s*$", rest)
        if returned:
            yield stop + returned.start(1), stop + returned.end(1), "expression"
    elif head.startswith("for ("):
        stop = text.index(";", first)
        if ":" not in whole.split(";")[0]:
            yield first, stop, "expression"
    elif head.startswith("return ") or (head.endswith(" = ") and head.count(" ") > 2):  # a declaration
        if "{" in whole or not whole.rstrip().endswith(";") or "&" in head:
            return
        stop = start + whole.rstrip().rindex(";")
        if "," not in without_brackets(text[first:stop]):
            yield first, stop, "expression"
    elif whole.rstrip().endswith(";") and "{" not in whole:
        stop = start + whole.rstrip().rindex(";")
        yield start + len(found["indent"]), stop, "call"


def spread(choices: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` of the choices, as far apart as possible."""
    if len(choices) <= count:
        return choices
    return [choices[(2 * i + 1) * len(choices) // (2 * count)] for i in range(count)]


# The line on which a function begins: with a word of CUDA, at the left edge, or as a member with a body. Also the line
# of a type, whose members may have values.
FUNCTION = re.compile(
    r"^(?:(?:  )?(?:PGLCL_(?:HOST_)?DEVICE|PGLCL_KERNEL|inline|explicit|static|constexpr)\b[^;=\n]*?\b(\w+)\("
    r"|(?!template\b|using\b|PGLCL)[A-Za-z][\w:<>,*& ]*? (\w+)\("
    r"|  (?!return\b|else\b|const\b)[A-Za-z][\w:<>,*&]* (\w+)\(.*\{$"
    r"|(?:struct|class) (\w+)\b.*\{$)",
    re.MULTILINE,
)


def sources() -> list[Path]:
    """The files in which faults are planted."""
    headers = ("cuda/launch.h", "cuda/kernels/device.h", "cuda/kernels/float16.h", "shared/*.h")
    return [path for pattern in ("cuda/*.cu", "cuda/kernels/*.cuh", *headers) for path in sorted(CSRC.glob(pattern))]


def plant(per_region: int = 1) -> list[Fault]:
    """The faults of csrc/cuda.

    Args:
        per_region: largest number of faults in one expression or statement, besides its removal.
    """
    faults: list[Fault] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for path in sources():
        text, name, at = compiled(path.read_text()), str(path.relative_to(CSRC)), 0
        functions = [(found.start(), found[found.lastindex or 0]) for found in FUNCTION.finditer(text)]
        for first, stop, kind in sorted(r for s in statements(text) for r in regions(text, *s)):
            original = text[first:stop]
            choices = spread([m for m in mutate(original) if m[1] != original], per_region)
            if kind == "call" and DELETED.match(" ".join(f"{original};".split())):
                choices.append(("removed", "0"))
            wait = re.fullmatch(r"wait_copies<(\d)>\(\)", original)
            if wait:
                choices.append(("count", f"wait_copies<{int(wait[1]) + 1}>()"))
            if first < at or not choices:
                continue
            at = stop
            function = next((f for start, f in reversed(functions) if start < first), "")
            for rule, mutated in choices:
                line = text.count("\n", 0, first) + 1
                same = (name, function, rule, original, mutated)
                again = seen[same]
                seen[same] += 1
                faults.append(
                    Fault(len(faults) + 1, name, function, line, rule, original, mutated, again, first, stop, kind)
                )
    return faults


def planted(text: str, faults: list[Fault]) -> str:
    """The text of a file with its faults, each of which a number at run time switches on."""
    out, at = "", 0
    for (first, stop, kind), group in groupby(faults, key=lambda f: (f.start, f.stop, f.kind)):
        code = f"({text[first:stop]})" if kind == "expression" else f"static_cast<void>({text[first:stop]})"
        for fault in group:
            other = f"({fault.mutated})" if kind == "expression" else f"static_cast<void>({fault.mutated})"
            code = f"PGLCL_MUTANT({fault.number}, {code}, {other})"
        out += text[at:first] + code
        at = stop
    return out + text[at:]
