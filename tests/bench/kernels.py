"""Every kernel beside the rate that this machine could reach (the first half of make bench).

    kernels.py [--threads N] [--ops NAME…] [--quick]

Builds and runs the benchmark of the kernels' crate (kernels/benches/kernels), which measures the
floors and each op in turns, and keeps its figures beside the binary, where breakdown.py finds the
floors. No bar is stated: how near to its floor an op could come differs from op to op.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import outcome
import runs

CARGO = ["cargo", "bench", "--profile", "release", "--locked", "--workspace", "--bench", "kernels"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--ops", nargs="+", default=[], help="those with these parts in their name")
    parser.add_argument("--quick", action="store_true", help="few rounds, small shapes")
    outcome.add_page_option(parser)
    args = parser.parse_args()
    args.whole = not (args.quick or args.ops or args.threads)
    return args


def kept() -> Path:
    """Where the figures of the last run are."""
    return runs.default_binary().with_name("bench-kernels.json")


def run(options: Sequence[str]) -> dict:
    """Runs the benchmark, shows what it prints, and returns what its last line holds."""
    command = [*CARGO, "--", *options]
    process = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    said = ""
    try:
        for line in process.stdout:
            if line.startswith("{"):
                said = line
            else:
                print(line, end="", flush=True)
        process.wait()
    finally:
        runs.end(process)
    if process.returncode or not said:
        raise runs.RunFailed(f"{' '.join(command)}: exit code {process.returncode}")
    return json.loads(said)


def tables(found: dict) -> list[str]:
    """The floors, and both dtypes of an op side by side."""
    floors = [(name, f["unit"], f["median"], f["best"]) for name, f in found["floors"].items()]
    by_shape: dict[tuple[str, str], dict[str, dict]] = {}
    for row in found["ops"]:
        by_shape.setdefault((row["op"], row["shape"]), {})[row["dtype"]] = row
    rows = []
    for (op, shape), dtypes in by_shape.items():
        *_, floor = next(iter(dtypes.values()))["floor"].split()
        cells = [cell for dtype in ("bf16", "fp32") for cell in shown(dtypes.get(dtype))]
        rows.append((op, shape, floor, *cells))
    columns = ("ms", "least", "rate", "of floor")
    figures = [f"{dtype} {column}" for dtype in ("bf16", "fp32") for column in columns]
    return [
        outcome.table(("floor", "", "median", "best"), floors),
        outcome.table(("op", "shape", "floor", *figures), rows),
    ]


def shown(row: dict | None) -> Sequence[str]:
    """Figures of an op in one dtype."""
    if row is None:
        return ("", "", "", "")
    times = (f"{row['ms']:.2f}", f"{row['least_ms']:.2f}")
    return (*times, f"{row['rate']:.1f}", f"{row['of_floor']:.0%}")


def main() -> int:
    args = arguments()
    runs.end_with_signals()
    options = ["--threads", str(args.threads)] if args.threads else []
    options += ["--ops", ",".join(args.ops)] if args.ops else []
    options += ["--quick"] * args.quick
    try:
        found = run(options)
    except runs.RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    kept().write_text(json.dumps(found | {"machine": outcome.machine()}))
    words = (
        f"{found['threads']} threads, instruction set `{found['level']}`; medians of up to 7 "
        "rounds, and the least time. Rates of products in GFLOP/s, of the others in GB/s."
    )
    page = outcome.Figures(words, tables(found)) if args.whole or args.write_page else None
    return outcome.finish("kernels", [], found, judged=not args.quick, page=page)


if __name__ == "__main__":
    sys.exit(main())
