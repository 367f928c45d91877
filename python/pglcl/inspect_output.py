"""The output of `pglcl inspect`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pglcl.progress import print_table


def print_summary(found: dict[str, Any], out: Console, *, verbose: bool = False) -> None:
    """Prints the summary of a data folder.

    Args:
        found: the result of :func:`pglcl.proposals.summary`.
        out: where to print.
        verbose: print a row for every case, too.
    """
    out.print(
        f"{found['data']}: layout {found['layout']}, {found['volumes']} volumes of {found['patients']} patients, "
        f"{found['labelled']} with labels, {found['unlabelled']} without"
    )
    spacing = found["spacing"]
    least, median, most = (_times(spacing[name]) for name in ("least", "median", "most"))
    spread = f"{median} {found['unit']}" + ("" if least == most else f" (from {least} to {most})")
    out.print(f"modality: {found['modality']}; spacing: {spread}")
    if found["labelled"]:
        rows = [
            [_values(c["values"]), c["name"], str(c["patients"]), str(c["voxels"]), f"{c['share']:.2%}"]
            for c in found["classes"]
        ]
        print_table(out, "Labels", ["value", "name", "patients", "voxels", "share"], rows)
    if verbose:
        columns = ["name", "voxels", f"spacing {found['unit']}", "axes", "type", "channels", "intensity", "labels"]
        print_table(out, "Volumes", columns, [_row(case) for case in found["cases"]])
    if found["proposals"]:
        print_table(
            out,
            "Options that suit these data",
            ["option", "reason"],
            [[f"{p['option']} {p['value']}", p["reason"]] for p in found["proposals"]],
        )
    for line in found["warnings"]:
        out.print(f"note: {line}")
    for line in found["problems"]:
        out.print(f"problem: {line}")
    out.print(f"{len(found['problems'])} problems found" if found["problems"] else "no problem found")


def _row(case: dict[str, Any]) -> list[str]:
    low, high = case["intensity"] or ("", "")
    values = [int(v) for v in case["label_voxels"]]
    return [
        case["name"],
        _times(case["shape"]),
        _times(case["spacing"]),
        case["orientation"],
        case["dtype"],
        str(case["channels"] or ""),
        f"{low:g} to {high:g}" if case["intensity"] else "unread",
        _values(values) if case["label"] else "none",
    ]


def _times(numbers: Any) -> str:
    return "x".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in numbers)


def _values(values: list[int], most: int = 8) -> str:
    """`0, 85, 170`; the first ones of many."""
    return ", ".join(map(str, values[:most])) + (f", ... ({len(values)})" if len(values) > most else "")
