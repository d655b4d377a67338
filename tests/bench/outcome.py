"""How a measurement is told: tables for people, one line of JSON, an exit code, and a page.

The page is docs/src/benchmarks.md. A bench that measured everything replaces what stands there
between its two marks, so that no figure is copied by hand:

    <!-- figures of steps: begin -->
    <!-- figures of steps: end -->
"""

import argparse
import datetime
import importlib.metadata
import json
import operator
import os
import platform
import shlex
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "src" / "benchmarks.md"

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


@dataclass(frozen=True)
class Figures:
    """What a bench puts on the page: how it measured, in a sentence, and its tables."""

    words: str
    tables: Sequence[str]


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
    facts = cpu_facts()
    flags = facts.get("flags", "").split()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([facts.get("model name", platform.machine()), *bf16])


def cpu_facts() -> dict[str, str]:
    """What Linux tells of the last processor; nothing elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            facts = dict(line.strip().split(":", 1) for line in lines if ":" in line)
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, value in facts.items()}


def machine_words() -> str:
    """The machine and the day, for the page."""
    about = machine()
    words = [f"{about['processor']}, {about['cores']} cores"]
    if "hypervisor" in cpu_facts().get("flags", "").split():
        words.append("a virtual machine")
    return ", ".join([*words, str(about["date"])])


def pytorch() -> str:
    """The release of PyTorch that this Python has."""
    try:
        return f"PyTorch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        return "Without PyTorch"


def has_amx() -> bool:
    """Whether the processor multiplies tiles of bf16."""
    return "amx_bf16" in processor()


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 fast."""
    return "bf16" in processor()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Our speed over theirs, taken within a round, where both saw the same machine; the median."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Prints a table, and returns it for the page."""
    text = table(head, rows)
    print(f"\n{text}\n", flush=True)
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown with aligned columns."""
    cells = [[shown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in (cells[0], rule, *cells[1:])
    )


def shown(cell: object) -> str:
    """Large numbers whole, small ones with four digits."""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"


def finish(
    bench: str,
    bars: Sequence[Bar],
    figures: dict,
    judged: bool = True,
    page: Figures | None = None,
) -> int:
    """Prints bars and the last line; the exit code says whether all bars are held.

    Unless `judged`, the bars are shown only: the run was too small to mean anything. What there is
    for the `page` goes there, with the bars.
    """
    tables = list(page.tables) if page else []
    if bars:
        rows = [
            (bar.name, bar.found, f"{bar.relation} {bar.limit:.4g}", "yes" if bar.held else "NO")
            for bar in bars
        ]
        tables.append(print_table(("bar", "found", "limit", "held"), rows))
    passed = all(bar.held for bar in bars)
    line = {
        "bench": bench,
        "passed": passed if judged else None,
        "machine": machine(),
        "bars": [vars(bar) | {"held": bar.held} for bar in bars],
        **figures,
    }
    told = page is None or put_on_page(bench, page.words, tables)
    print(json.dumps(line))
    return 0 if told and (passed or not judged) else 1


def add_page_option(parser: argparse.ArgumentParser) -> None:
    """Lets a run that is not the whole bench write its figures all the same."""
    parser.add_argument(
        "--write-page",
        action="store_true",
        help="put the figures on docs/src/benchmarks.md even if this is not the whole bench",
    )


def fewer_than_usual(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Whether the command line asks for fewer rounds or steps than the bench takes by itself."""
    counts = [name for name in ("rounds", "steps") if name in args]
    return any(getattr(args, name) < parser.get_default(name) for name in counts)


def command() -> str:
    """This process's command line as one would type it in the repository."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join([str(name), *sys.argv[1:]])


def put_on_page(bench: str, words: str, tables: Sequence[str], page: Path = PAGE) -> bool:
    """Replaces the figures of a bench, and says whether it could: a page that cannot be written
    must not cost the figures. Nobody sees one that is half written."""
    told = f"{machine_words()}: `{command()}`. {words}"
    told = textwrap.fill(told, 100, break_long_words=False, break_on_hyphens=False)
    figures = "\n\n".join([told, *tables])
    fresh = page.with_name(page.name + ".new")
    try:
        text = with_figures(page.read_text(encoding="utf-8"), bench, figures)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(page)
    except (OSError, ValueError) as error:
        print(f"{page} stays as it is: {error}", file=sys.stderr)
        return False
    print(f"{page} has the new figures", flush=True)
    return True


def with_figures(text: str, bench: str, figures: str) -> str:
    """A page with new figures between the marks of a bench."""
    begin, end = (f"<!-- figures of {bench}: {edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"the page must have one `{begin}` and one `{end}` behind it")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{figures.strip()}\n\n{end}{tail}"
