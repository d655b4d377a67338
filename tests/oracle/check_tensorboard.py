"""Reads a run's TensorBoard files with TensorBoard's own reader and compares with metrics.jsonl.

    check_tensorboard.py RUN_DIR

Every step that metrics.jsonl holds must appear once under every tag, with the value rounded to f32,
and nothing else may appear. Where a restart repeated a step, both sides keep the later attempt: the
reader by the session-start marks in the event files, this script by the `attempt` of the record.
Validation losses are compared with events.jsonl. Exit code 0 when all agree, else 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

# Tags and the keys of a metrics record that they show.
TAGS = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/tokens": "tokens",
    "train/target_tokens": "target_tokens",
    "train/skipped": "skipped",
    "throughput/tokens_per_second": "tokens_per_second",
    "throughput/tgs": "tgs",
    "throughput/mfu": "mfu",
    "throughput/hfu": "hfu",
    "seconds/step": "step_seconds",
    "seconds/data_wait": "data_wait_seconds",
    "seconds/comm": "comm_seconds",
    "seconds/exposed_comm": "exposed_comm_seconds",
    "seconds/optimizer": "optimizer_seconds",
    "memory/peak_bytes": "peak_bytes",
}
# Keys that a machine may not know; elsewhere null stands for a number that is not finite.
OPTIONAL = {"mfu", "hfu"}


def steps(run: Path) -> dict[int, dict]:
    """The last attempt's record of every step."""
    records: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        known = records.get(record["step"])
        if known is None or record["attempt"] >= known["attempt"]:
            records[record["step"]] = record
    return records


def number(value: float | None) -> np.float32:
    return np.float32(np.nan if value is None else value)


def expected(run: Path) -> dict[str, dict[int, np.float32]]:
    """Tag to step to value."""
    wanted: dict[str, dict[int, np.float32]] = {}
    for step, record in steps(run).items():
        for tag, field in TAGS.items():
            if field not in OPTIONAL or record.get(field) is not None:
                wanted.setdefault(tag, {})[step] = number(record[field])
    events = run / "events.jsonl"
    for line in events.read_text().splitlines() if events.exists() else []:
        event = json.loads(line)
        if event["event"] == "validation":
            wanted.setdefault("validation/loss", {})[event["step"]] = number(event["loss"])
    return wanted


def found(run: Path) -> dict[str, list[tuple[int, np.float32]]]:
    """What TensorBoard shows; 0 asks for every point instead of a sample."""
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0})
    reader.Reload()
    return {
        tag: [(event.step, np.float32(event.value)) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def same(value: np.float32, wanted: np.float32 | None) -> bool:
    """Equal, where NaN equals NaN and nothing equals a step that was not wanted."""
    if wanted is None:
        return False
    return bool(value == wanted or (not np.isfinite(value) and np.isnan(wanted)))


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    run = Path(sys.argv[1])
    wanted, shown = expected(run), found(run)
    passed = True
    for tag in sorted(wanted.keys() | shown.keys()):
        points, want = shown.get(tag, []), wanted.get(tag, {})
        wrong = [step for step, value in points if not same(value, want.get(step))]
        missing = sorted(want.keys() - {step for step, _ in points})
        twice = len(points) - len({step for step, _ in points})
        good = not wrong and not missing and not twice
        passed &= good
        print(
            f"  {'ok  ' if good else 'FAIL'} {tag:30} {len(points)} points"
            + (f", wrong or unexpected at {wrong[:5]}" if wrong else "")
            + (f", missing at {missing[:5]}" if missing else "")
            + (f", {twice} repeated" if twice else "")
        )
    passed &= bool(wanted)
    print(json.dumps({"check": "tensorboard", "run": str(run), "passed": passed, "tags": len(shown)}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
