"""Oxitron and PyTorch side by side: the same model, the same work, the same machine and minutes.

    compare.py [--scaling] [--binary OXITRON] [--quick]     by the Python of setup.sh's environment

Two ranks of one thread train a LLaMA-style model of 55 million parameters in bf16 on random tokens,
one sample of 1024 tokens per rank and step: Oxitron, DistributedDataParallel, and FSDP2, in turns,
several rounds. Gradients are reduced in fp32 by all three. `--scaling` measures besides how much
Oxitron loses by two ranks of one thread against one rank of two, at 16,384 tokens a step.

Bars, tokens per second, on a processor with AMX: 2.5 times DDP, 3 times FSDP2; elsewhere 1.2 and 1.5
times. Two ranks reach 0.85 of one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent / "bench"))

import outcome
import runs
import shards
from model import LLAMA_55M
from outcome import Bar
from runs import Launcher, Settings

RANKS = 2
SEQ_LEN = 1024
SCALING_TOKENS = 16384  # a step: 8 micro-batches on each of two ranks
SMALL = replace(LLAMA_55M, vocab_size=1024, hidden_size=128, intermediate_size=352, num_layers=2)


@dataclass(frozen=True)
class Round:
    """What one run of one side has shown."""

    tokens_per_second: float  # median over its steps
    bytes_sent: float | None = None  # by each rank in each step, where they could be counted


@dataclass(frozen=True)
class Side:
    """One side of the comparison."""

    name: str
    sends: str  # what, and over what
    bytes_per_parameter: float  # each rank, each step, by formula
    run: Callable[[], Round]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=runs.default_binary(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turns")
    parser.add_argument("--steps", type=int, default=20, help="measured in each run")
    parser.add_argument("--warm-up", type=int, default=5, help="steps dropped from each run")
    parser.add_argument("--compile", action="store_true", help="the peers under torch.compile")
    parser.add_argument(
        "--reshard", action="store_true", help="FSDP2 frees weights after forward (ZeRO-3)"
    )
    parser.add_argument("--scaling", action="store_true", help="also one rank against two")
    parser.add_argument("--scaling-steps", type=int, default=6, help="measured in each of its runs")
    parser.add_argument("--without-peers", action="store_true", help="nothing but --scaling")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, few steps, bars not judged"
    )
    outcome.add_page_option(parser)
    args = parser.parse_args()
    less = args.quick or args.without_peers or outcome.fewer_than_usual(parser, args)
    args.whole = args.scaling and not (less or args.compile or args.reshard)
    if args.without_peers and not args.scaling:
        parser.error("--without-peers leaves nothing to measure but --scaling")
    if args.quick:
        args.rounds, args.steps, args.warm_up, args.scaling_steps = 1, 3, 2, 2
    return args


class Bench:
    """Data, model and binary, ready to run."""

    def __init__(self, args: argparse.Namespace, binary: Path, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.model = SMALL if args.quick else LLAMA_55M
        # Only as many scaling steps are dropped as it takes to touch all memory: a step is long.
        self.scaling_warm_up = 2
        steps = max(
            (args.warm_up + args.steps) * RANKS * SEQ_LEN,
            (self.scaling_warm_up + args.scaling_steps) * SCALING_TOKENS,
        )
        self.shards = shards.write(binary, folder / "data", self.model.vocab_size, steps)
        self.launch = Launcher(binary, folder)

    def train(self, ranks: int, threads: int, batch_tokens: int, steps: int, warm_up: int) -> Round:
        """A round of Oxitron."""
        settings = Settings(SEQ_LEN, batch_tokens, steps=warm_up + steps, threads=threads)
        figures = self.launch(self.model, self.shards, settings, ranks, warm_up)
        self.check_parameters(figures.parameters)
        return Round(figures.median("tokens_per_second"))

    def ours(self) -> Round:
        args = self.args
        return self.train(RANKS, 1, RANKS * SEQ_LEN, args.steps, args.warm_up)

    def peer(self, kind: str) -> Round:
        """A round of a peer."""
        options = ["--model", json.dumps(self.model.sizes()), "--seq-len", str(SEQ_LEN)]
        options += ["--steps", str(self.args.steps), "--warm-up", str(self.args.warm_up)]
        options += ["--compile"] * self.args.compile + ["--reshard"] * self.args.reshard
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(RANKS), str(HERE / "peer.py"), kind, *options]
        output = self.folder / "peer.txt"
        environment = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",  # or gloo would look the host name up
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        runs.run_to_end(command, output, environment)
        said = [line for line in output.read_text().splitlines() if line.startswith("{")]
        result = json.loads(said[-1])
        self.check_parameters(result["parameters"])
        seconds = statistics.median(result["step_seconds"])
        return Round(result["tokens_per_step"] / seconds, result["bytes_sent"])

    def check_parameters(self, found: int) -> None:
        if found != self.model.parameters:
            wanted = f"{self.model.parameters:,} parameters wanted"
            raise runs.RunFailed(f"{wanted}, {found:,} trained: no comparison")

    def sides(self) -> list[Side]:
        """Who is compared. A reduce-scatter or all-gather sends (S-1)/S of the whole, an
        all-reduce twice that."""
        share = (RANKS - 1) / RANKS
        variant = ", torch.compile" if self.args.compile else ""
        gathers = 2 if self.args.reshard else 1
        twice = " twice" if self.args.reshard else ""
        return [
            Side(
                "Oxitron, ZeRO-1",
                "fp32 gradients scattered, bf16 weights gathered; MPI, shared memory",
                share * (4 + 2),
                self.ours,
            ),
            Side(
                f"PyTorch DDP{variant}",
                "fp32 gradients all-reduced; gloo, loopback",
                share * 2 * 4,
                lambda: self.peer("ddp"),
            ),
            Side(
                f"PyTorch FSDP2{variant}",
                f"fp32 gradients scattered, bf16 weights gathered{twice}; gloo, loopback",
                share * (4 + 2 * gathers),
                lambda: self.peer("fsdp2"),
            ),
        ]

    def scaling_sides(self) -> list[Side]:
        """Two ranks of one thread, one rank of two."""

        def run(ranks: int, threads: int) -> Callable[[], Round]:
            steps, warm_up = self.args.scaling_steps, self.scaling_warm_up
            return lambda: self.train(ranks, threads, SCALING_TOKENS, steps, warm_up)

        sends = "fp32 gradients scattered, bf16 weights gathered"
        return [
            Side("2 ranks of 1 thread", sends, (RANKS - 1) / RANKS * (4 + 2), run(RANKS, 1)),
            Side("1 rank of 2 threads", "nothing", 0.0, run(1, 2)),
        ]


def in_turns(sides: list[Side], rounds: int) -> list[list[Round]]:
    """The rounds of each side. Each round begins with another side."""
    found: list[list[Round]] = [[] for _ in sides]
    for number in range(rounds):
        for place in range(len(sides)):
            index = (number + place) % len(sides)
            done = sides[index].run()
            found[index].append(done)
            shown = f"{sides[index].name:32} {done.tokens_per_second:8.0f} tokens/s"
            print(f"  round {number + 1}: {shown}", flush=True)
    return found


def speeds(rounds: list[Round]) -> list[float]:
    return [done.tokens_per_second for done in rounds]


def ratio(ours: list[Round], theirs: list[Round]) -> float:
    return outcome.ratio(speeds(ours), speeds(theirs))


def print_sides(sides: list[Side], found: list[list[Round]], parameters: int) -> str:
    """A row for each side; the first is compared with the others. Returns the table."""
    rows = []
    for side, rounds in zip(sides, found):
        each = speeds(rounds)
        counted = [done.bytes_sent for done in rounds if done.bytes_sent is not None]
        rows.append(
            (
                side.name,
                statistics.median(each),
                f"{min(each):,.0f} – {max(each):,.0f}",
                "" if side is sides[0] else f"{ratio(found[0], rounds):.2f}",
                f"{side.bytes_per_parameter * parameters / 1e6:.1f}",
                f"{statistics.median(counted) / 1e6:.1f}" if counted else "",
                side.sends,
            )
        )
    head = ("", "tokens/s", "rounds", "first row over it", "MB sent", "counted", "by rank and step")
    return outcome.print_table(head, rows)


def measure(args: argparse.Namespace, bench: Bench) -> int:
    """Everything in order; the exit code."""
    parameters = bench.model.parameters
    print(f"{bench.model.words()}\nbf16, samples of {SEQ_LEN} tokens", flush=True)
    bars: list[Bar] = []
    tables: list[str] = []
    figures: dict = {"parameters": parameters}
    if not args.without_peers:
        sides = bench.sides()
        print(f"{RANKS} ranks of 1 thread, {RANKS * SEQ_LEN} tokens a step", flush=True)
        ours, ddp, fsdp2 = found = in_turns(sides, args.rounds)
        tables.append(print_sides(sides, found, parameters))
        ddp_bar, fsdp2_bar = (2.5, 3.0) if outcome.has_amx() else (1.2, 1.5)
        bars += [Bar("Oxitron / DDP", ratio(ours, ddp), ">=", ddp_bar)]
        bars += [Bar("Oxitron / FSDP2", ratio(ours, fsdp2), ">=", fsdp2_bar)]
        figures["tokens_per_second"] = {s.name: speeds(r) for s, r in zip(sides, found)}
    if args.scaling:
        sides = bench.scaling_sides()
        print(f"{SCALING_TOKENS} tokens a step", flush=True)
        two, one = found = in_turns(sides, args.rounds)
        tables += [f"{SCALING_TOKENS:,} tokens a step:", print_sides(sides, found, parameters)]
        bars += [Bar("2 ranks / 1 rank", ratio(two, one), ">=", 0.85)]
        figures["scaling_tokens_per_second"] = {s.name: speeds(r) for s, r in zip(sides, found)}
    words = (
        f"{outcome.pytorch()}. Rounds: {args.rounds}, of {args.steps} steps after {args.warm_up}, "
        f"or of {args.scaling_steps} with {SCALING_TOKENS:,} tokens after {bench.scaling_warm_up}; "
        "medians, ratios within a round."
    )
    page = outcome.Figures(words, tables) if args.whole or args.write_page else None
    return outcome.finish("peers", bars, figures, judged=not args.quick, page=page)


def main() -> int:
    args = arguments()
    return runs.in_scratch("peers", args.binary, lambda *where: measure(args, Bench(args, *where)))


if __name__ == "__main__":
    sys.exit(main())
