"""How much of a step's communication disappears behind its backward pass.

    overlap.py [--binary OXITRON] [--quick]        as root

Two ranks of one thread on two hosts (network namespaces) train the same model with
`parallel.overlap` on and off. On an unlimited cable it measures compute and counts the bytes of a
step; then it sets the cable to the rate at which the communication of a step takes 80% of its
backward pass, the hardest case that overlap can still hide, and measures on and off in turns; and
it compares them once more on the unlimited cable, where overlap can only cost.

Bars: at the set rate, what stays visible with overlap is no more than the structural floor and a
tenth of the communication, and a step is at least 1.35 times as fast as without; on the unlimited
cable it is at most 2% slower; what goes over the wire is within 3% of the formula.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import outcome
import runs
import shards
from hosts import Hosts
from model import Model
from outcome import Bar
from runs import Figures, Launcher, Settings

RANKS = 2
SHARE_OF_BACKWARD = 0.8  # communication without overlap, at the rate that is looked for
CLOSE_ENOUGH = 0.05  # of that share
CORRECTIONS = 2
PROBE_STEPS = 3
GRADIENT_BYTES = 4  # per parameter on the wire, fp32
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
COLUMNS = ("step_seconds", "comm_seconds", "exposed_comm_seconds", "optimizer_seconds")

FULL = Model(4096, 512, 1408, num_layers=24, num_heads=8, num_kv_heads=2)
SMALL = replace(FULL, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=4)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=runs.default_binary(), help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", choices=WEIGHT_BYTES, help="default: bf16 where it is fast")
    parser.add_argument("--warm-up", type=int, default=1, help="steps dropped from each run")
    parser.add_argument("--pairs", type=int, default=4, help="on the limited cable")
    parser.add_argument("--steps", type=int, default=5, help="measured in each of their runs")
    parser.add_argument("--short-pairs", type=int, default=20, help="on the unlimited cable")
    parser.add_argument("--short-steps", type=int, default=2, help="measured in each of their runs")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, few steps, bars not judged"
    )
    args = parser.parse_args()
    if args.quick:
        args.warm_up, args.pairs, args.steps = 2, 1, 3
        args.short_pairs, args.short_steps = 2, 3
    return args


def backward_seconds(figures: Figures) -> float:
    """The backward pass of a step, from the trace: the layers run backwards, and nothing else."""
    spans = [event for event in figures.trace if event.get("cat") == "backward"]
    layers = {event["name"] for event in spans}
    if not layers:
        raise runs.RunFailed("the trace has no backward spans")
    # Each layer once a step: one micro-batch.
    return sum(
        statistics.median(event["dur"] for event in spans if event["name"] == name) * 1e-6
        for name in layers
    )


def step_bytes(model: Model, dtype: str) -> float:
    """What each host sends in a step: gradients are reduce-scattered, weights are all-gathered."""
    bytes_each = GRADIENT_BYTES + WEIGHT_BYTES[dtype]
    return (RANKS - 1) / RANKS * model.parameters * bytes_each


@dataclass
class Pair:
    """One run with overlap and one without, in the same minutes."""

    on: Figures
    off: Figures

    def ratio(self) -> float:
        """Step with overlap, in steps without."""
        return self.on.median("step_seconds") / self.off.median("step_seconds")


@dataclass
class Wire:
    """Bytes that the two hosts have sent by the end of each step."""

    hosts: Hosts

    def __post_init__(self) -> None:
        self.by_step: dict[int, list[int]] = {}

    def __call__(self, step: int) -> None:
        self.by_step[step] = self.hosts.bytes_sent()

    def per_step(self, warm_up: int) -> float:
        """Bytes of a step, per host. Start-up and checkpoint are not between the two readings."""
        first, last = warm_up, max(self.by_step)
        sent = [b - a for a, b in zip(self.by_step[first], self.by_step[last])]
        return statistics.mean(sent) / (last - first)


class Bench:
    """The two hosts, the data and the model, ready to run."""

    def __init__(self, args: argparse.Namespace, binary: Path, folder: Path, hosts: Hosts) -> None:
        self.hosts = hosts
        self.warm_up = args.warm_up
        self.model = SMALL if args.quick else FULL
        self.dtype = args.dtype or ("bf16" if outcome.has_fast_bf16() else "fp32")
        self.settings = Settings(
            seq_len=args.seq_len,
            batch_tokens=RANKS * args.seq_len,
            steps=0,
            threads=1,
            dtype=self.dtype,
        )
        longest = args.warm_up + max(args.steps, args.short_steps)
        tokens = self.settings.batch_tokens * longest
        self.shards = shards.write(binary, folder / "data", self.model.vocab_size, tokens)
        self.launch = Launcher(
            binary, folder, hosts.prefix, hosts.environment, hosts=hosts.host_file
        )

    def run(self, overlap: bool, steps: int, wire: Wire | None = None) -> Figures:
        """Trains for `steps` steps behind the warm-up; all of them are traced when `wire` counts."""
        settings = replace(self.settings, overlap=overlap, steps=self.warm_up + steps)
        if wire:
            settings = replace(settings, trace_steps=(self.warm_up + 1, settings.steps))
        return self.launch(self.model, self.shards, settings, RANKS, self.warm_up, wire)

    def plan(self) -> dict:
        """What the binary plans for these runs."""
        settings = replace(self.settings, steps=1)
        return self.launch.plan(self.model, self.shards, settings, RANKS)

    def pairs(self, count: int, steps: int) -> list[Pair]:
        """Runs in turns. Every other pair begins with overlap off: neither is always first."""
        done = []
        for number in range(count):
            order = (True, False) if number % 2 == 0 else (False, True)
            by_mode = {overlap: self.run(overlap, steps) for overlap in order}
            done.append(Pair(by_mode[True], by_mode[False]))
            times = [f.median("step_seconds") for f in (done[-1].on, done[-1].off)]
            say(f"  pair {number + 1} of {count}: on {times[0]:.3f} s, off {times[1]:.3f} s a step")
        return done

    def find_rate(self, backward: float, sent: float, unlimited_comm: float) -> float:
        """Sets the cable so that communication takes its share of backward; bits per second."""
        wanted = SHARE_OF_BACKWARD * backward
        if unlimited_comm > wanted:
            sys.exit(
                f"without a limit communication takes {unlimited_comm:.3f} s of a step, more than "
                f"{SHARE_OF_BACKWARD:.0%} of its backward pass ({wanted:.3f} s): no rate is low "
                "enough to be the cable's; take a longer --seq-len"
            )
        rate = sent * 8 / wanted
        for attempt in range(CORRECTIONS + 1):
            self.hosts.limit(rate)
            found = self.run(overlap=False, steps=PROBE_STEPS).median("comm_seconds")
            say(f"  at {gigabits(rate)}: {found:.3f} s of communication, {wanted:.3f} wanted")
            if abs(found / wanted - 1) <= CLOSE_ENOUGH or attempt == CORRECTIONS:
                break
            rate *= found / wanted
        return rate


def gigabits(bits_per_second: float) -> str:
    return f"{bits_per_second / 1e9:.3f} Gbit/s"


def say(words: str) -> None:
    print(words, flush=True)


def middle(pairs: list[Pair], mode: str, key: str) -> float:
    """Median over pairs of the medians over steps."""
    return statistics.median(getattr(pair, mode).median(key) for pair in pairs)


def columns(pairs: list[Pair], mode: str) -> list[float]:
    return [middle(pairs, mode, key) for key in COLUMNS]


def measure(bench: Bench, args: argparse.Namespace) -> int:
    """Everything in order; the exit code."""
    model = bench.model
    say(f"{model.words()}\n{RANKS} ranks of 1 thread, {bench.dtype}, {args.seq_len} tokens each")

    say("the unlimited cable, overlap off")
    wire = Wire(bench.hosts)
    alone = bench.run(overlap=False, steps=args.steps, wire=wire)
    if alone.parameters != model.parameters:
        raise runs.RunFailed(f"{model.parameters:,} parameters wanted, {alone.parameters:,} found")
    backward, sent = backward_seconds(alone), wire.per_step(args.warm_up)
    say(f"  backward {backward:.3f} s, {sent / 1e6:.1f} MB sent by each host and step")

    say("the rate")
    # The quickest step: the others have waited for a host that was late, too.
    rate = bench.find_rate(backward, sent, min(alone.each("comm_seconds")))
    say(f"overlap on and off at {gigabits(rate)}")
    limited = bench.pairs(args.pairs, args.steps)
    bench.hosts.unlimit()
    say("overlap on and off, unlimited")
    unlimited = bench.pairs(args.short_pairs, args.short_steps)

    comm = middle(limited, "off", "comm_seconds")
    floor_bytes = bench.plan()["floor_bytes"]
    floor = floor_bytes / (sent / comm)
    exposed = middle(limited, "on", "exposed_comm_seconds")
    speed_up = statistics.median(1 / pair.ratio() for pair in limited)
    cost = statistics.median(pair.ratio() for pair in unlimited)
    formula = step_bytes(model, bench.dtype)
    rows = [
        (cable, mode, *columns(pairs, mode))
        for cable, pairs in ((gigabits(rate), limited), ("unlimited", unlimited))
        for mode in ("off", "on")
    ]
    outcome.print_table(("cable", "overlap", "step s", "comm s", "exposed s", "optimizer s"), rows)
    say(
        f"backward: {backward:.3f} s; communication without overlap: "
        f"{comm / backward:.0%} of it, {SHARE_OF_BACKWARD:.0%} wanted"
    )
    say(f"sent by each host and step: {sent / 1e6:.2f} MB, {formula / 1e6:.2f} MB by formula")
    say(f"structural floor: {floor_bytes / 1e6:.2f} MB, {floor:.3f} s at the rate reached")
    bars = [
        Bar("exposed with overlap, s", exposed, "<=", floor + 0.1 * comm),
        Bar("step off / on, limited", speed_up, ">=", 1.35),
        Bar("step on / off, unlimited", cost, "<=", 1.02),
        Bar("wire against formula", abs(sent / formula - 1), "<=", 0.03),
    ]
    figures = {
        "parameters": model.parameters,
        "dtype": bench.dtype,
        "seq_len": args.seq_len,
        "backward_seconds": backward,
        "communication_share": comm / backward,
        "bytes_per_step": sent,
        "formula_bytes": formula,
        "floor_seconds": floor,
        "rate_bits_per_second": rate,
        "limited": {mode: dict(zip(COLUMNS, columns(limited, mode))) for mode in ("off", "on")},
        "unlimited": {mode: dict(zip(COLUMNS, columns(unlimited, mode))) for mode in ("off", "on")},
        "unlimited_ratios": [pair.ratio() for pair in unlimited],
    }
    return outcome.finish("overlap", bars, figures, judged=not args.quick)


def main() -> int:
    args = arguments()
    binary = runs.existing_binary(args.binary)
    runs.end_with_signals()
    with tempfile.TemporaryDirectory(prefix="oxitron-overlap-") as name:
        folder = Path(name)
        try:
            with Hosts(folder) as hosts:
                return measure(Bench(args, binary, folder, hosts), args)
        except (runs.RunFailed, OSError) as error:
            print(error, file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
