"""The demo model on the processor and on the GPU: are the losses those of the same training?

    demo_losses.py [--smoke]

Oxitron trains the model of `make demo` in bf16 for 50 steps on the processor and on the GPU, from
the same weights on the same tokens; PyTorch trains it on the GPU from the same weights on the same
tokens in bf16 and in fp32. What rounding does to such a training is how far PyTorch's two runs are
apart: Oxitron's two runs may be twice as far apart, at the step where they are furthest. PyTorch's
bf16 is that of FSDP2: every weight is rounded from its fp32 master, as in Oxitron. (Autocast leaves
embeddings and norms in fp32; its runs are a third as far apart.)

Every step trains on all samples there are, each a document of its own, so that the order in which
Oxitron takes samples does not matter to PyTorch. The documents are walks through a random graph,
which a model learns. `--smoke` compares the processor with itself, on a smaller model.

Exit codes: 0 within the limits; 1 not; 2 nothing was compared.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from step_cases import BINARY, DETERMINISTIC, DETERMINISTIC_ENVIRONMENT, RESULTS, SHARED

sys.path.insert(1, str(SHARED / "bench"))

import outcome
import runs
import shards
from model import TINY, Model

# configs/models/demo.toml
DEMO = Model(8192, 256, 704, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=64)
PEER = SHARED / "peers" / "device_peer.py"
LR = 1e-3
TIMES = 2.0  # PyTorch's gap
LIMIT_SECONDS = 300.0
NEIGHBOURS = 4  # of a word in the graph


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run-gpu-bench.sh losses", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--binary", type=Path, default=BINARY, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--smoke", action="store_true", help="a small model, without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    args.model = TINY if args.smoke else DEMO
    args.seq_len, args.samples = (128, 4) if args.smoke else (1024, 8)
    args.device = "cpu" if args.smoke else "cuda"
    return args


def walks(model: Model, samples: int, seq_len: int) -> list[list[int]]:
    """Documents that end with the id of the end of text."""
    draw = random.Random(1)
    words = range(shards.FIRST_WORD, model.vocab_size)
    ways = {word: draw.choices(words, k=NEIGHBOURS) for word in words}
    documents = []
    for _ in range(samples):
        document = [draw.choice(words)]
        while len(document) < seq_len - 1:
            document.append(draw.choice(ways[document[-1]]))
        documents.append([*document, 0])
    return documents


class Comparison:
    """Weights and tokens, and who trains on them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.binary = args.binary.absolute()
        documents = walks(args.model, args.samples, args.seq_len)
        self.tokens = folder / "tokens.json"
        self.tokens.write_text(json.dumps(documents), encoding="utf-8")
        self.data = shards.write_documents(
            self.binary, folder / "data", args.model.vocab_size, documents
        )
        self.weights = folder / "weights"
        self.peer("weights", ["--folder", str(self.weights)])

    def peer(self, kind: str, options: Sequence[str]) -> dict:
        """What PyTorch says at its end."""
        command = [sys.executable, "-B", str(PEER), kind, *options]
        command += ["--model", json.dumps(self.args.model.sizes()), "--device", self.args.device]
        output = self.folder / "peer.txt"
        runs.run_to_end(command, output, limit_seconds=LIMIT_SECONDS)
        return json.loads(output.read_text(encoding="utf-8").splitlines()[-1])

    def pytorch(self, dtype: str) -> list[float]:
        """Its losses."""
        options = ["--folder", str(self.weights), "--tokens", str(self.tokens), "--dtype", dtype]
        options += ["--weights", "cast" if dtype == "bf16" else "fp32"]
        options += ["--steps", str(self.args.steps), "--lr", str(LR)]
        return self.peer("losses", options)["losses"]

    def oxitron(self, device: str) -> list[float]:
        """Ours."""
        args = self.args
        home = self.folder / f"run-{len(list(self.folder.glob('run-*')))}"
        home.mkdir()
        batch_tokens = args.samples * args.seq_len
        threads = len(os.sched_getaffinity(0))
        settings = runs.Settings(
            args.seq_len, batch_tokens, args.steps, threads, micro_batch=args.samples
        )
        path = home / "config.toml"
        path.write_text(runs.config(args.model, self.data, settings), encoding="utf-8")
        sets = DETERMINISTIC | {
            "run.device": device,
            "model.init_from": str(self.weights),
            "optimizer.lr": str(LR),
            "checkpoint.at_end": "false",
        }
        command = [str(self.binary), "train", str(path)]
        for key, value in sets.items():
            command += ["--set", f"{key}={value}"]
        environment = DETERMINISTIC_ENVIRONMENT
        runs.run_to_end(command, home / "output.txt", environment, limit_seconds=LIMIT_SECONDS)
        return [record["loss"] for record in runs.read_records(home / "run" / "metrics.jsonl")]


def gap(one: Sequence[float], other: Sequence[float]) -> float:
    """How far apart two runs are where they are furthest."""
    if len(one) != len(other) or not one:
        raise runs.RunFailed(f"{len(one)} steps against {len(other)}")
    return max(abs(a - b) for a, b in zip(one, other))


def compare(args: argparse.Namespace, folder: Path) -> int:
    there = subprocess.run(
        [args.binary, "doctor", "--device", args.device], capture_output=True, text=True
    )
    if there.returncode:
        print(f"{there.stdout}demo_losses: nothing was compared", file=sys.stderr)
        return 2
    comparison = Comparison(args, folder)
    losses = {
        "Oxitron, processor": comparison.oxitron("cpu"),
        f"Oxitron, {args.device}": [],
        "PyTorch, fp32": comparison.pytorch("fp32"),
        "PyTorch, bf16": comparison.pytorch("bf16"),
    }
    losses[f"Oxitron, {args.device}"] = comparison.oxitron(args.device)
    here, there, wide, narrow = losses.values()
    own = gap(wide, narrow)
    ceiling = TIMES * own
    bars = [
        {
            "name": f"{name}: losses apart",
            "ceiling": ceiling,
            "found": found,
            "pass": found <= ceiling,
        }
        for name, found in (
            (f"Oxitron on the processor and on {args.device}", gap(here, there)),
            (f"Oxitron on {args.device} and PyTorch in fp32", gap(there, wide)),
        )
    ]
    rows = [(name, each[0], each[len(each) // 2], each[-1]) for name, each in losses.items()]
    outcome.print_table(("loss of step", "1", str(args.steps // 2 + 1), str(args.steps)), rows)
    print(f"PyTorch in bf16 and in fp32: losses apart by {own:.2e} at most")
    table = [
        (
            bar["name"],
            f"<= {bar['ceiling']:.2e}",
            f"{bar['found']:.2e}",
            "yes" if bar["pass"] else "NO",
        )
        for bar in bars
    ]
    outcome.print_table(("bar", "limit", "found", "held"), table)
    whole = {
        "bench": "losses",
        "smoke": args.smoke,
        "machine": outcome.machine(),
        "pytorch": outcome.pytorch(),
        "pytorch_gap": own,
        "bars": bars,
        "losses": losses,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "losses.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(whole), flush=True)
    return 0 if all(bar["pass"] for bar in bars) else 1


def main() -> int:
    args = arguments()
    runs.end_with_signals()
    with tempfile.TemporaryDirectory(prefix="oxitron-losses-") as name:
        try:
            return compare(args, Path(name))
        except runs.RunFailed as error:
            print(f"demo_losses: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
