"""How a measurement is told: tables for people, one line of JSON, an exit code."""

import datetime
import json
import operator
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Bar:
    """A stated limit and what was found."""

    name: str
    found: float
    relation: str  # a key of COMPARE
    limit: float

    @property
    def held(self) -> bool:
        return COMPARE[self.relation](self.found, self.limit)


def machine() -> dict[str, str | int]:
    """The hardware and the day: a figure means little without them."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
    }


def processor() -> str:
    """Its name, and what it has for bf16."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            facts = dict(line.strip().split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.machine()
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([facts.get("model name", platform.machine()), *bf16])


def has_amx() -> bool:
    """Whether the processor multiplies tiles of bf16."""
    return "amx_bf16" in processor()


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 fast."""
    return "bf16" in processor()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Our speed over theirs, taken within a round, where both saw the same machine; the median."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table with aligned columns, fit for docs/src/benchmarks.md."""
    cells = [[shown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    print()
    for row in (cells[0], rule, *cells[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print(flush=True)


def shown(cell: object) -> str:
    """Large numbers whole, small ones with four digits."""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"


def finish(bench: str, bars: Sequence[Bar], figures: dict, judged: bool = True) -> int:
    """Prints bars and the last line; the exit code says whether all bars are held.

    Unless `judged`, the bars are shown only: the run was too small to mean anything.
    """
    rows = [
        (bar.name, bar.found, f"{bar.relation} {bar.limit:.4g}", "yes" if bar.held else "NO")
        for bar in bars
    ]
    print_table(("bar", "found", "limit", "held"), rows)
    passed = all(bar.held for bar in bars)
    line = {
        "bench": bench,
        "passed": passed if judged else None,
        "machine": machine(),
        "bars": [vars(bar) | {"held": bar.held} for bar in bars],
        **figures,
    }
    print(json.dumps(line))
    return 0 if passed or not judged else 1
