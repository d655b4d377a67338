"""The rows and bars of bench_steps.py, and how they are shown."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import step_cases
from step_cases import COMPILED, OURS, PEERS, REPEATED, SHARED

sys.path.insert(1, str(SHARED / "bench"))

import outcome

NOT_RUN = "not run: the time was up"


@dataclass
class Row:
    """What one side came to in one case. What could not be found out is None."""

    case: str
    side: str
    outcome: str = "ok"  # or why there are no figures
    note: str = ""
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    mfu_full: float | None = None
    mfu_causal: float | None = None
    hfu: float | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0  # that the whole process took

    @property
    def is_well(self) -> bool:
        return self.outcome == "ok"

    @property
    def was_run(self) -> bool:
        return self.outcome != NOT_RUN

    @property
    def is_a_fault(self) -> bool:
        """Whether Oxitron failed. That PyTorch does is worth knowing, and no more."""
        return self.side not in PEERS and self.was_run and not self.is_well


@dataclass
class Bar:
    """A stated limit and what was found; None where it was not measured."""

    name: str
    floor: float
    found: float | None

    def told(self, judged: bool) -> dict:
        held = None if self.found is None or not judged else self.found >= self.floor
        return {"name": self.name, "floor": self.floor, "found": self.found, "pass": held}


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def print_rows(rows: Sequence[Row]) -> None:
    """The table of all runs."""
    head = ("step", "", "tokens/s", "ms", "MFU full", "MFU causal", "HFU", "peak GB", "planned")
    table = []
    for row in rows:
        figures = ["", ""]
        if row.is_well and row.tokens_per_second and row.step_seconds:
            figures = [f"{row.tokens_per_second:,.0f}", f"{1000 * row.step_seconds:,.1f}"]
        shares = [percent(share) for share in (row.mfu_full, row.mfu_causal, row.hfu)]
        memory = [gigabytes(row.peak_bytes), gigabytes(row.planned_bytes)]
        told = row.note if row.is_well else row.outcome
        table.append([row.case, row.side, *figures, *shares, *memory, told])
    outcome.print_table((*head, ""), table)


def bars(rows: Sequence[Row], again: Row | None) -> list[Bar]:
    """What was to be reached."""
    found = {(row.case, row.side): row for row in rows}

    def row(case: str, side: str) -> Row | None:
        known = found.get((case, side))
        return known if known and known.was_run else None

    def trains(case: str) -> float | None:
        known = row(case, OURS)
        return None if known is None else float(known.is_well)

    ours, compiled = row(step_cases.MAIN, OURS), row(step_cases.MAIN, COMPILED)
    speeds = [known and known.tokens_per_second for known in (ours, compiled)]
    ratio = speeds[0] / speeds[1] if all(speeds) else None
    first = row(step_cases.MAIN, REPEATED)
    same = None
    if first and again and first.is_well and again.is_well:
        keys = [(known.losses, known.grad_norms) for known in (first, again)]
        same = float(keys[0] == keys[1])
    return [
        Bar("1.3B at 4096: MFU, full attention", 0.5, ours and ours.mfu_full),
        Bar("1.3B at 4096: tokens/s over torch.compile", 1.1, ratio),
        Bar("7B at 4096 trains", 1.0, trains(step_cases.LARGEST)),
        Bar("1.8B at 32768 trains", 1.0, trains(step_cases.LONGEST)),
        Bar("1.3B at 4096: the same bits twice, if deterministic", 1.0, same),
    ]


def print_bars(bars: Sequence[dict]) -> None:
    """The table of bars, as [`Bar.told`] has them."""
    words = {True: "yes", False: "NO", None: "not judged"}
    table = [
        (
            bar["name"],
            bar["floor"],
            "" if bar["found"] is None else f"{bar['found']:.4g}",
            words[bar["pass"]],
        )
        for bar in bars
    ]
    outcome.print_table(("bar", "floor", "found", "held"), table)
