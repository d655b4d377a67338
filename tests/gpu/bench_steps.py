"""Whole training steps of real models beside PyTorch, on one GPU, in one run.

    bench_steps.py [--quick] [--only NAME…] [--minutes M] [--smoke] [--plan]

Oxitron (`oxitron train` on random tokens), torch.compile and eager PyTorch take the same steps one
after the other, each in a process of its own with a limit of time: what runs out of memory is a row
of the table and not its end. The most valuable come first, and what the minutes do not suffice for
is said to be missing.

Bars on an H200: 1.3B at 4096 at 50% of the peak, attention counted in full, and at 1.1 times the
tokens per second of torch.compile; 7B at 4096 and 1.8B at 32768 train; a run that is deterministic
repeats itself to the bit.

Exit codes: 0 measured; 1 a bar is missed or a run of Oxitron failed; 2 nothing was measured.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import step_cases
from step_cases import (
    BINARY,
    CASES,
    COMPILED,
    OURS,
    PEERS,
    REPEATED,
    RESULTS,
    SHARED,
    Again,
    Case,
)
from step_rows import NOT_RUN, Row, bars, gigabytes, print_bars, print_rows

sys.path.insert(1, str(SHARED / "bench"))

import outcome
import runs
import shards
from model import TINY

DOCUMENT_TOKENS = 32768  # so that no sample holds the edge of one
LONGEST_SECONDS = 200.0  # that one run may take of what is left
STARTING_SECONDS = 15  # a run that is given less is not begun
PEER = SHARED / "peers" / "device_peer.py"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run-gpu-bench.sh steps", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--binary", type=Path, default=BINARY, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="four runs, few steps")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--without-peers", action="store_true", help="Oxitron alone")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default: 8)")
    parser.add_argument("--steps", type=int, default=8, help="measured in each run (default: 8)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those (default: 3)")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the GPU in bf16; known for common ones"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a small model on the processor: tries the script"
    )
    parser.add_argument("--plan", action="store_true", help="print planned memory, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    if args.steps < 1 or args.warm_up < 1 or args.minutes <= 0:
        parser.error("--steps, --warm-up and --minutes are above 0")
    if args.quick:
        args.steps = min(args.steps, 4)
    if args.smoke:
        args.steps, args.warm_up, args.peak_tflops = 2, 1, 1.0
    return args


def selected(args: argparse.Namespace) -> list[tuple[Case, str]]:
    """The runs that are asked for, in order."""
    order = step_cases.ORDER
    if args.smoke or args.quick:
        order = step_cases.SMOKE if args.smoke else step_cases.QUICK
    chosen = [
        (CASES[name], side)
        for name, side in order
        if not (args.only and name not in args.only) and not (args.without_peers and side in PEERS)
    ]
    return [(case.smoke(), side) for case, side in chosen] if args.smoke else chosen


class Failed(Exception):
    """A run has no figures; the message is short enough for the table."""


def reason(text: str) -> str:
    """Why a process failed, from the end of what it said, in a few words."""
    if re.search(r"out ?of ?memory|cudaErrorMemoryAllocation", text, re.IGNORECASE):
        return "out of memory"
    if text.startswith("still running"):
        return "not done in time"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
    return (told or lines or ["no reason is known"])[-1][:160]


class Bench:
    """Data and programs, ready to run."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.device = "cpu" if args.smoke else "cuda"
        self.ends = time.monotonic() + 60 * args.minutes
        self.binary = args.binary.absolute()
        self.data: Path | None = None
        # Of the first run whose utilisation is known: the peers' is told by the same.
        self.peak = args.peak_tflops and args.peak_tflops * 1e12

    def shards(self) -> Path:
        """Ids that every model knows; written once."""
        if self.data is None:
            vocab_size = TINY.vocab_size if self.args.smoke else 32000
            steps = self.args.warm_up + self.args.steps
            tokens = steps * max(case.tokens for case, _ in selected(self.args))
            document = DOCUMENT_TOKENS // (64 if self.args.smoke else 1)
            folder = self.folder / "data"
            self.data = shards.write(self.binary, folder, vocab_size, tokens, document)
        return self.data

    def config(self, case: Case, home: Path, settings: dict[str, str], data: Path) -> list[str]:
        """A config file in `home`, and what the command line says beside it."""
        steps = self.args.warm_up + self.args.steps
        threads = len(os.sched_getaffinity(0))
        basis = runs.Settings(
            case.seq_len, case.tokens, steps, threads, micro_batch=case.micro_batch
        )
        path = home / "config.toml"
        path.write_text(runs.config(case.model, data, basis), encoding="utf-8")
        sets = step_cases.COMMON | {"run.device": self.device} | case.settings | settings
        if self.args.peak_tflops:
            sets["run.peak_tflops"] = str(self.args.peak_tflops)
        pairs = [["--set", f"{key}={value}"] for key, value in sets.items()]
        return [str(path), *sum(pairs, [])]

    def run(self, name: str, command: Sequence[str], environment: dict[str, str]) -> str:
        """Runs a process within its part of what is left of the time; what it said."""
        output = self.folder / f"{name}.txt"
        left = self.ends - time.monotonic()
        if left < STARTING_SECONDS:
            raise Failed(NOT_RUN)
        try:
            runs.run_to_end(command, output, environment, limit_seconds=min(left, LONGEST_SECONDS))
        except (runs.RunFailed, OSError) as error:
            kept = self.args.results / "steps" / output.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            if output.exists():
                shutil.copy(output, kept)
            print(f"{error}", file=sys.stderr, flush=True)
            raise Failed(reason(str(error))) from None
        return output.read_text(encoding="utf-8", errors="replace")

    def planned(self, case: Case, home: Path) -> int | None:
        """Bytes that `oxitron plan` expects."""
        arguments = self.config(case, home, {}, home)
        command = [str(self.binary), "plan", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case.name}: {done.stderr.strip()}", file=sys.stderr, flush=True)
            return None
        return json.loads(done.stdout)["stages"][0]["device_bytes"]

    def train(self, case: Case, settings: dict[str, str], name: str) -> list[dict]:
        """Records of a run of Oxitron."""
        data = self.shards()
        home = self.folder / "run-under-way"
        home.mkdir()
        try:
            arguments = self.config(case, home, settings, data)
            command = [str(self.binary), "train", *arguments]
            self.run(name, command, step_cases.DETERMINISTIC_ENVIRONMENT if settings else {})
            return runs.read_records(home / "run" / "metrics.jsonl")
        finally:
            shutil.rmtree(home)

    def ours(self, row: Row, case: Case, settings: dict[str, str]) -> None:
        """A run of Oxitron."""
        home = self.folder / "planned"
        home.mkdir(exist_ok=True)
        row.planned_bytes = self.planned(case, home)
        name = f"{row.case} {row.side}".replace(" ", "-").replace(",", "")
        records = self.train(case, settings, name)
        wanted = self.args.warm_up + self.args.steps
        if len(records) != wanted:
            raise Failed(f"{len(records)} steps instead of {wanted}")
        row.losses = [record["loss"] for record in records]
        row.grad_norms = [record["grad_norm"] for record in records]
        check_losses(row.losses, case)
        measured = records[self.args.warm_up :]
        row.step_seconds = statistics.median(record["step_seconds"] for record in measured)
        row.tokens_per_second = case.tokens / row.step_seconds
        row.peak_bytes = max(record["peak_bytes"] for record in records)
        row.note = case.note
        counted = step_cases.flops(case, case.again)
        if any(record["mfu"] is None for record in measured):
            return
        row.mfu_causal, row.mfu_full, row.hfu = (
            statistics.median(record[key] for record in measured)
            for key in ("mfu", "mfu_full", "hfu")
        )
        last = measured[-1]
        self.peak = self.peak or counted.causal / (last["mfu"] * last["step_seconds"])
        for key, part in (
            ("mfu", counted.causal),
            ("mfu_full", counted.full),
            ("hfu", counted.hardware),
        ):
            share = part / last["step_seconds"] / self.peak
            if not math.isclose(last[key], share, rel_tol=1e-9):
                raise Failed(f"{key} is counted in another way here than by Oxitron")

    def peer(self, row: Row, case: Case) -> None:
        """A run of PyTorch; with less to keep where that is too much."""
        options = list(case.peer_options)
        try:
            result = self.peer_run(row, case, options)
        except Failed as failed:
            if str(failed) != "out of memory" or "--recompute" in options:
                raise
            options.append("--recompute")
            row.note = "blocks computed again"
            result = self.peer_run(row, case, options)
        if result["parameters"] != case.model.parameters:
            raise Failed(f"trained another model, of {result['parameters']:,} parameters")
        row.step_seconds = statistics.median(result["step_seconds"])
        row.tokens_per_second = case.tokens / row.step_seconds
        row.peak_bytes = result["peak_bytes"]
        row.losses = [result["first_loss"], result["last_loss"]]
        row.note = case.peer_note or row.note
        if self.peak:
            again = Again.ALL if "--recompute" in options else Again.NOTHING
            counted = step_cases.flops(case, again)
            parts = (counted.causal, counted.full, counted.hardware)
            available = row.step_seconds * self.peak
            row.mfu_causal, row.mfu_full, row.hfu = (part / available for part in parts)

    def peer_run(self, row: Row, case: Case, options: Sequence[str]) -> dict:
        args = self.args
        command = [sys.executable, "-B", str(PEER), "speed", "--device", self.device]
        command += ["--model", json.dumps(case.model.sizes()), "--seq-len", str(case.seq_len)]
        command += ["--micro-batch", str(case.micro_batch)]
        command += ["--accumulation", str(case.accumulation)]
        command += ["--steps", str(args.steps), "--warm-up", str(args.warm_up), *options]
        command += ["--compile"] * (row.side == COMPILED)
        said = self.run(f"{row.case} {row.side}".replace(" ", "-"), command, {})
        return json.loads([line for line in said.splitlines() if line.startswith("{")][-1])

    def measure(self, case: Case, side: str) -> Row:
        """A row of the table, whatever happens."""
        row = Row(case.name, side)
        began = time.monotonic()
        try:
            if side in PEERS:
                self.peer(row, case)
            else:
                self.ours(row, case, step_cases.DETERMINISTIC if side == REPEATED else {})
        except Failed as failed:
            row.outcome = str(failed)
        row.seconds = round(time.monotonic() - began, 1)
        return row


def check_losses(losses: Sequence[float | None], case: Case) -> None:
    """Random ids teach little: the loss falls, or stays near that of a guess."""
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        raise Failed("a loss is not finite")
    if losses[-1] > max(losses[0], math.log(case.model.vocab_size)) + 0.5:
        raise Failed(f"the loss went up from {losses[0]:.2f} to {losses[-1]:.2f}")


def tell(args: argparse.Namespace, bench: Bench, rows: list[Row], again: Row | None) -> dict:
    """Writes what is known so far, and returns it."""
    told = [bar.told(judged=not args.smoke) for bar in bars(rows, again)]
    whole = {
        "bench": "steps",
        "smoke": args.smoke,
        "machine": outcome.machine(),
        "pytorch": outcome.pytorch(),
        "peak_tflops": bench.peak and bench.peak / 1e12,
        "bars": told,
        "rows": [asdict(row) for row in rows],
    }
    path = args.results / "steps.json"
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
    return whole


def check_device(args: argparse.Namespace) -> str:
    """What `oxitron doctor` says; ends where there is no GPU to measure."""
    device = "cpu" if args.smoke else "cuda"
    command = [str(args.binary), "doctor", "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f"bench_steps: {error}")
    print(done.stdout, flush=True)
    if done.returncode:
        print(f"bench_steps: nothing was measured; see above {done.stderr}", file=sys.stderr)
        raise SystemExit(2)
    return done.stdout


def plan(args: argparse.Namespace, bench: Bench) -> int:
    """What every case is planned to take, and whether all of them fit into an H200."""
    rows, fit = [], True
    for case in {case.name: case for case, side in selected(args) if side == OURS}.values():
        count = bench.planned(case, bench.folder)
        fits = count is not None and count <= step_cases.H200_BYTES
        rows.append((case.name, gigabytes(count) or "refused", "yes" if fits else "NO", case.note))
        fit = fit and fits
    outcome.print_table(("step", "planned GB", "fits into an H200", ""), rows)
    return 0 if fit else 1


def measure(args: argparse.Namespace, folder: Path) -> int:
    bench = Bench(args, folder)
    if args.plan:
        return plan(args, bench)
    check_device(args)
    args.results.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    again = None
    for case, side in selected(args):
        row = bench.measure(case, side)
        if side == REPEATED and row.is_well:
            again = bench.measure(case, side)
        rows.append(row)
        speed = f"{row.tokens_per_second:,.0f} tokens/s" if row.is_well else row.outcome
        print(f"{row.case:16} {row.side:24} {speed} ({row.seconds:.0f} s)", flush=True)
        tell(args, bench, rows, again)
    print_rows(rows)
    whole = tell(args, bench, rows, again)
    print_bars(whole["bars"])
    print(json.dumps(whole), flush=True)
    if not any(row.is_well for row in rows):
        return 2
    missed = any(bar["pass"] is False for bar in whole["bars"])
    return 1 if missed or any(row.is_a_fault for row in rows) else 0


def main() -> int:
    args = arguments()
    runs.end_with_signals()
    with tempfile.TemporaryDirectory(prefix="oxitron-steps-") as name:
        return measure(args, Path(name))


if __name__ == "__main__":
    sys.exit(main())
