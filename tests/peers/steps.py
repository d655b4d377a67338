"""A training step of one process beside PyTorch's: the same model, the same work, the same minutes.

    steps.py [--binary OXITRON] [--shapes NAME…] [--quick]     by the Python of setup.sh's environment

One process on all cores trains a LLaMA-style model on random tokens: Oxitron, torch.compile over
bf16 autocast, and eager bf16 autocast; in fp32 eager PyTorch. Where samples hold several documents,
PyTorch attends inside them in the fastest of its ways, which is looked for first. All in turns,
several rounds, each round beginning with another side.

Bars, tokens per second, on a processor with AMX: 2.5 times torch.compile and 3 times eager at 1024,
2.3 times torch.compile at 4096, 3 times in documents of 512; elsewhere 1.2 times torch.compile. In
fp32 1.3 times eager.
"""

import argparse
import json
import os
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
from model import LLAMA_55M, TINY, Model
from outcome import Bar
from runs import Launcher, Settings

LARGER = Model(50257, 768, 2048, num_layers=12, num_heads=12, num_kv_heads=12)  # 162 million


@dataclass(frozen=True)
class Shape:
    """A step: the model, its samples, and who takes it."""

    name: str
    model: Model
    seq_len: int
    batch: int
    dtype: str = "bf16"
    document_tokens: int | None = None  # a sample is part of one document otherwise
    bars: tuple[tuple[str, float], ...] = ()  # side, and how many times as fast we are to be
    bars_without_amx: tuple[tuple[str, float], ...] = ()

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def words(self) -> str:
        documents = f" in documents of {self.document_tokens}" if self.document_tokens else ""
        samples = f"{self.batch} × {self.seq_len:,} tokens{documents}"
        parameters = f"{self.model.parameters / 1e6:.0f} M parameters"
        return f"{self.name}: {parameters}, {samples}, {self.dtype}"


COMPILED, EAGER = "torch.compile", "eager"
PLAIN = ((COMPILED, 1.2),)
FP32 = ((EAGER, 1.3),)
SHAPES = (
    Shape("1024", LLAMA_55M, 1024, 2, bars=((COMPILED, 2.5), (EAGER, 3.0)), bars_without_amx=PLAIN),
    Shape("4096", LLAMA_55M, 4096, 1, bars=((COMPILED, 2.3),), bars_without_amx=PLAIN),
    Shape(
        "8 × 512",
        LLAMA_55M,
        4096,
        1,
        document_tokens=512,
        bars=((COMPILED, 3.0),),
        bars_without_amx=PLAIN,
    ),
    Shape("64 × 64", LLAMA_55M, 4096, 1, document_tokens=64),
    Shape("larger", LARGER, 1024, 2),
    Shape("1024 fp32", LLAMA_55M, 1024, 2, dtype="fp32", bars=FP32, bars_without_amx=FP32),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=runs.default_binary(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turns")
    parser.add_argument("--steps", type=int, default=8, help="measured in each run")
    parser.add_argument("--warm-up", type=int, default=3, help="steps dropped from each run")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--without-peers", action="store_true", help="Oxitron alone")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, few steps, bars not judged"
    )
    outcome.add_page_option(parser)
    args = parser.parse_args()
    less = args.quick or args.without_peers or outcome.fewer_than_usual(parser, args)
    args.whole = not less and set(args.shapes) == set(names)
    if args.quick:
        args.rounds, args.steps, args.warm_up = 1, 2, 2
    return args


Run = Callable[[], float]
"""One run of a side: the median over its steps, in tokens per second."""


class Bench:
    """Data and binary, ready to run."""

    def __init__(self, args: argparse.Namespace, binary: Path, folder: Path) -> None:
        self.args, self.binary, self.folder = args, binary, folder
        self.launch = Launcher(binary, folder)
        self.threads = len(os.sched_getaffinity(0))
        self.written: dict[tuple[int, int | None], Path] = {}

    def shards(self, shape: Shape) -> Path:
        """Data for a shape, written once for all that can share them."""
        key = (shape.model.vocab_size, shape.document_tokens)
        if key not in self.written:
            steps = self.args.warm_up + self.args.steps
            tokens = steps * max(shape.tokens for shape in SHAPES)
            folder = self.folder / f"data-{len(self.written)}"
            written = shards.write(self.binary, folder, key[0], tokens, key[1])
            self.written[key] = written
        return self.written[key]

    def ours(self, shape: Shape) -> float:
        """A run of Oxitron."""
        args = self.args
        settings = Settings(
            shape.seq_len,
            shape.tokens,
            steps=args.warm_up + args.steps,
            threads=self.threads,
            dtype=shape.dtype,
            micro_batch=shape.batch,
        )
        figures = self.launch(shape.model, self.shards(shape), settings, 1, args.warm_up)
        self.check_parameters(shape, figures.parameters)
        return figures.median("tokens_per_second")

    def peer(self, shape: Shape, compiled: bool, way: str, few: bool = False) -> float:
        """A run of PyTorch."""
        args = self.args
        options = ["--model", json.dumps(shape.model.sizes()), "--seq-len", str(shape.seq_len)]
        options += ["--batch", str(shape.batch), "--dtype", shape.dtype]
        options += ["--threads", str(self.threads), "--warm-up", str(args.warm_up)]
        options += ["--steps", str(2 if few else args.steps)]
        if shape.document_tokens:
            options += ["--document-tokens", str(shape.document_tokens), "--attention", way]
        options += ["--compile"] * compiled
        output = self.folder / "peer.txt"
        command = [sys.executable, str(HERE / "peer.py"), "alone", *options]
        runs.run_to_end(command, output, {"PYTHONDONTWRITEBYTECODE": "1"})
        said = [line for line in output.read_text().splitlines() if line.startswith("{")]
        result = json.loads(said[-1])
        self.check_parameters(shape, result["parameters"])
        return result["tokens_per_step"] / statistics.median(result["step_seconds"])

    def check_parameters(self, shape: Shape, found: int) -> None:
        if found != shape.model.parameters:
            wanted = f"{shape.model.parameters:,} parameters wanted"
            raise runs.RunFailed(f"{wanted}, {found:,} trained: no comparison")

    def fastest_way(self, shape: Shape) -> str:
        """How PyTorch attends inside documents fastest here."""
        if not shape.document_tokens:
            return "whole"
        speeds: dict[str, float] = {}
        for way in ("mask", "split", "flex"):
            try:
                speeds[way] = self.peer(shape, True, way, few=True)
                print(f"  {way:6} {speeds[way]:8,.0f} tokens/s", flush=True)
            except runs.RunFailed as error:
                reason = str(error).strip().splitlines()[-1]
                print(f"  {way:6} does not train: {reason}", flush=True)
        if not speeds:
            raise runs.RunFailed(f"{shape.name}: no way of PyTorch trains it")
        return max(speeds, key=speeds.__getitem__)

    def sides(self, shape: Shape) -> dict[str, Run]:
        """Who takes the step."""
        sides: dict[str, Run] = {"Oxitron": lambda: self.ours(shape)}
        if not self.args.without_peers:
            way = self.fastest_way(shape)
            named = f" ({way})" if shape.document_tokens else ""
            if shape.dtype == "bf16":
                sides[COMPILED + named] = lambda: self.peer(shape, True, way)
            sides[EAGER + named] = lambda: self.peer(shape, False, way)
        return sides


def in_turns(sides: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """The runs of each side. Each round begins with another side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            found[name].append(sides[name]())
            print(f"  round {number + 1}: {name:24} {found[name][-1]:8,.0f} tokens/s", flush=True)
    return found


def measure(args: argparse.Namespace, bench: Bench) -> int:
    """Everything in order; the exit code."""
    bars: list[Bar] = []
    figures: dict[str, dict[str, list[float]]] = {}
    rows = []
    for shape in SHAPES:
        if shape.name not in args.shapes:
            continue
        if args.quick:
            seq_len = shape.seq_len // 8
            document = shape.document_tokens and shape.document_tokens // 8
            shape = replace(shape, model=TINY, seq_len=seq_len, document_tokens=document)
        print(shape.words(), flush=True)
        found = figures[shape.name] = in_turns(bench.sides(shape), args.rounds)
        ours = found["Oxitron"]
        for name, speeds in found.items():
            rows.append(
                (
                    shape.words() if speeds is ours else "",
                    name,
                    statistics.median(speeds),
                    max(speeds),
                    "" if speeds is ours else f"{outcome.ratio(ours, speeds):.2f}",
                )
            )
            for side, limit in shape.bars if outcome.has_amx() else shape.bars_without_amx:
                if name.startswith(side):
                    what = f"{shape.name}: Oxitron / {name}"
                    bars.append(Bar(what, outcome.ratio(ours, speeds), ">=", limit))
    head = ("step", "", "tokens/s", "fastest run", "Oxitron over it")
    table = outcome.print_table(head, rows)
    words = (
        f"{outcome.pytorch()}. Rounds: {args.rounds}, of {args.steps} steps after "
        f"{args.warm_up}; medians, ratios within a round."
    )
    page = outcome.Figures(words, [table]) if args.whole or args.write_page else None
    tokens_per_second = {"tokens_per_second": figures}
    return outcome.finish("steps", bars, tokens_per_second, judged=not args.quick, page=page)


def main() -> int:
    args = arguments()
    return runs.in_scratch("steps", args.binary, lambda *where: measure(args, Bench(args, *where)))


if __name__ == "__main__":
    sys.exit(main())
