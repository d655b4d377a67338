"""What longer samples cost (make bench-lengths).

    lengths.py [--binary OXITRON] [--rounds N] [--quick]

One process on all cores trains a model of 55 million parameters on random tokens, one sample of
4,096 to 32,768 tokens a step, in documents of 4,096: every length attends to as many pairs per
token, so that speed should not depend on it, and memory should follow it in a straight line. The
lengths take turns, several rounds.

Bars: tokens per second of the longest at least 0.85 times those of the shortest, and the last
doubling of the length takes at most 2.05 times the memory of the one before.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import outcome
import runs
import shards
from model import LLAMA_55M, TINY
from outcome import Bar
from runs import Launcher, Settings

DOCUMENT = 4096
LENGTHS = (4096, 8192, 16384, 32768)
MEBIBYTE = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=runs.default_binary(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="of all lengths in turns")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, one round, bars not judged"
    )
    outcome.add_page_option(parser)
    args = parser.parse_args()
    args.whole = not (args.quick or outcome.fewer_than_usual(parser, args))
    args.rounds = 1 if args.quick else args.rounds
    return args


def settings(seq_len: int) -> Settings:
    """As many measured tokens at every length, after one step that is not."""
    steps = 1 + max(LENGTHS) // seq_len
    return Settings(seq_len, seq_len, steps, threads=len(os.sched_getaffinity(0)))


def measure(args: argparse.Namespace, binary: Path, folder: Path) -> int:
    """Everything in order; the exit code."""
    model = TINY if args.quick else LLAMA_55M
    data = shards.write(binary, folder / "data", model.vocab_size, 2 * max(LENGTHS), DOCUMENT)
    launch = Launcher(binary, folder)
    print(f"{model.words()}\n", flush=True)
    speeds: dict[int, list[float]] = {seq_len: [] for seq_len in LENGTHS}
    peaks: dict[int, int] = {}
    for number in range(args.rounds):
        for place in range(len(LENGTHS)):
            seq_len = LENGTHS[(number + place) % len(LENGTHS)]
            figures = launch(model, data, settings(seq_len), ranks=1, warm_up=1)
            tokens = figures.median("tokens_per_second")
            speeds[seq_len].append(tokens)
            # Saving at the end takes no part: the last record is written before.
            peaks[seq_len] = max(figures.each("peak_bytes"))
            print(f"  round {number + 1}: {seq_len:6,} {tokens:8,.0f} tokens/s", flush=True)
    first = LENGTHS[0]
    rows = []
    for seq_len in LENGTHS:
        planned = launch.plan(model, data, settings(seq_len), ranks=1)["stages"][0]
        bound = planned["activations_bytes"] + planned["inputs_bytes"]
        rows.append(
            (
                f"{seq_len:,}",
                statistics.median(speeds[seq_len]),
                f"{outcome.ratio(speeds[seq_len], speeds[first]):.2f}",
                peaks[seq_len] / MEBIBYTE,
                planned["total_bytes"] / MEBIBYTE,
                bound / seq_len,
            )
        )
    shortest = f"of {first:,}"
    head = ("seq_len", "tokens/s", shortest, "peak MiB", "planned MiB", "bytes per token, planned")
    table = outcome.print_table(head, rows)
    doubling = {longer: peaks[longer] - peaks[longer // 2] for longer in LENGTHS[1:]}
    longest = LENGTHS[-1]
    bars = [
        Bar(
            f"tokens/s, {longest:,} / {first:,}",
            outcome.ratio(speeds[longest], speeds[first]),
            ">=",
            0.85,
        ),
        Bar(
            f"memory added, {longest:,} / {longest // 2:,}",
            doubling[longest] / doubling[longest // 2],
            "<=",
            2.05,
        ),
    ]
    words = f"{args.rounds} rounds; medians, ratios within a round."
    page = outcome.Figures(words, [table]) if args.whole or args.write_page else None
    figures = {"tokens_per_second": speeds, "peak_bytes": peaks}
    return outcome.finish("lengths", bars, figures, judged=not args.quick, page=page)


def main() -> int:
    args = arguments()
    return runs.in_scratch("lengths", args.binary, lambda *where: measure(args, *where))


if __name__ == "__main__":
    sys.exit(main())
