"""Where a training step spends its time, op by op (the second half of make bench).

    breakdown.py [--seq-len N] [--batch N] [--dtype bf16|fp32] [--binary OXITRON] [--quick]

One process on all cores trains a model of 55 million parameters on random tokens and traces a few
steps; the one of median length is taken apart. What an op computes or moves follows from the
model's sizes, so that its rate can be held against the floors that kernels.py has measured.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import kernels
import outcome
import runs
import shards
from model import LLAMA_55M, Model
from runs import Launcher, Settings

WARM_UP = 3
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
RESIDUAL_BYTES = 4  # the residual stream is fp32
READ, TRIAD, UPDATE = "read", "triad", "update"  # names of kernels/benches/kernels/floors.rs
# What happens in a step beside the operations of its layers, by the category of its spans.
BESIDE_LAYERS = {"data": "data", "norm": "gradient norm", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Work:
    """What all calls of an op in a step come to: operations or bytes, and what limits them."""

    amount: float
    floor: str


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=runs.default_binary(), help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2, help="samples of a step")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, help="default: bf16 where it is fast")
    parser.add_argument("--steps", type=int, default=5, help="traced, of which one is shown")
    parser.add_argument("--quick", action="store_true", help="one step, after one of warm-up")
    outcome.add_page_option(parser)
    args = parser.parse_args()
    less = args.quick or outcome.fewer_than_usual(parser, args)
    args.whole = not less and (args.seq_len, args.batch, args.dtype) == (1024, 2, None)
    return args


def work(model: Model, batch: int, seq_len: int, dtype: str) -> dict[str, Work]:
    """By the names that `spent` gives. A product of [n, i] and [i, o] is 2·n·i·o operations;
    whatever memory limits reads or writes each operand once."""
    tokens, layers, width = batch * seq_len, model.num_layers, ELEMENT_BYTES[dtype]
    hidden, inner, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    products = f"{dtype} products"
    linear = {
        "qkv": (hidden, query + 2 * key),
        "middle": (query, hidden),
        "gate and up": (hidden, 2 * inner),
        "output": (inner, hidden),
    }
    found = {
        f"{op}, {slot}": Work(2 * layers * tokens * i * o, products)
        for op in ("linear", "linear dgrad", "linear wgrad")
        for slot, (i, o) in linear.items()
    }
    # Two products for each pair of a query and a key before it, five backwards.
    pairs = batch * seq_len * (seq_len + 1) / 2
    attention = layers * 2 * pairs * query
    found["attention"] = Work(2 * attention, products)
    found["attention backward"] = Work(5 * attention, products)
    found["head"] = Work(6 * tokens * hidden * vocab, products)

    def moved(columns: int, bytes_each: int, floor: str) -> Work:
        return Work(tokens * columns * bytes_each, floor)

    norms, stream = (2 * layers + 1) * hidden, RESIDUAL_BYTES
    found["rms_norm"] = moved(norms, stream + width, TRIAD)
    found["rms_norm backward"] = moved(norms, 3 * stream + 2 * width, UPDATE)
    found["rope backward"] = moved(layers * (query + key), 2 * width, UPDATE)
    found["embedding"] = moved(hidden, stream + width, TRIAD)
    found["embedding backward"] = moved(hidden, stream + 8, UPDATE)
    # AdamW reads gradient, master and moments, writes the last three and the weights; then the
    # gradient is cleared.
    found["gradient norm"] = Work(4 * model.parameters, READ)
    found["optimizer"] = Work((32 + width) * model.parameters, UPDATE)
    return found


@dataclass
class Spent:
    """Time of an op in a step."""

    calls: int = 0
    seconds: float = 0.0

    def add(self, event: dict) -> None:
        self.calls += 1
        self.seconds += event["dur"] * 1e-6


def median_step(trace: list[dict]) -> tuple[float, list[dict]]:
    """Seconds of the traced step of median length, and the spans in it."""
    steps = sorted((e for e in trace if e.get("cat") == "step"), key=lambda step: step["dur"])
    if not steps:
        raise runs.RunFailed("the trace has no steps")
    step = steps[len(steps) // 2]
    begin, end = step["ts"], step["ts"] + step["dur"]
    inside = [e for e in trace if e["ph"] == "X" and begin <= e["ts"] < end]
    return step["dur"] * 1e-6, inside


def spent(spans: list[dict]) -> dict[str, Spent]:
    """Calls and time by op; products apart by what they write."""
    found: dict[str, Spent] = {}
    for event in spans:
        name = BESIDE_LAYERS.get(event["cat"])
        if event["cat"] == "operation":
            name = event["name"]
            if name.startswith("linear"):
                name += f", {event['args']['slot']}"
        if name:
            found.setdefault(name, Spent()).add(event)
    return found


def row(name: str, of: Spent, step: float, done: Work | None, floors: Mapping[str, float]) -> dict:
    """What is known of an op."""
    known = {
        "op": name,
        "calls": of.calls,
        "ms": of.seconds * 1e3,
        "share": of.seconds / step,
    }
    if done:
        rate = 1e-9 * done.amount / of.seconds
        known["work"] = done.amount * 1e-9
        known["rate"] = rate
        known["floor"] = done.floor
        known["of_floor"] = rate / floors[done.floor]
    return known


def cells(known: dict) -> tuple[str, ...]:
    """An op in the table."""
    shown = [known["op"], str(known["calls"] or ""), f"{known['ms']:.1f}", f"{known['share']:.1%}"]
    if "rate" not in known:
        return (*shown, "", "", "", "")
    product = known["floor"].endswith("products")
    work = f"{known['work']:.3g} {'GFLOP' if product else 'GB'}"
    rate = f"{known['rate']:.1f} {'GFLOP/s' if product else 'GB/s'}"
    return (*shown, work, rate, known["floor"], f"{known['of_floor']:.0%}")


def rows(trace: list[dict], done: dict[str, Work], floors: Mapping[str, float]) -> list[dict]:
    """The ops of a step, longest first, the rest, and the step."""
    step, spans = median_step(trace)
    by_op = sorted(spent(spans).items(), key=lambda item: -item[1].seconds)
    found = [row(name, of, step, done.get(name), floors) for name, of in by_op]
    rest = Spent(0, step - sum(of.seconds for _, of in by_op))
    found.append(row("not in any op", rest, step, None, floors))
    products = [each for each in done.values() if each.floor.endswith("products")]
    computed = Work(sum(each.amount for each in products), products[0].floor)
    found.append(row("step", Spent(0, step), step, computed, floors))
    return found


def floors_of_this_machine(threads: int) -> dict[str, float]:
    """What kernels.py has measured."""
    path = kernels.kept()
    if not path.exists():
        sys.exit(f"{path} is missing: run tests/bench/kernels.py first (make bench does)")
    measured = json.loads(path.read_text())
    if measured["threads"] != threads:
        found = f"{path} was measured on {measured['threads']} threads"
        sys.exit(f"{found}, a step runs on {threads}: run tests/bench/kernels.py again")
    return {name: floor["median"] for name, floor in measured["floors"].items()}


def measure(args: argparse.Namespace, binary: Path, folder: Path) -> int:
    """Everything in order; the exit code."""
    model, threads = LLAMA_55M, len(os.sched_getaffinity(0))
    floors = floors_of_this_machine(threads)
    dtype = args.dtype or ("bf16" if outcome.has_fast_bf16() else "fp32")
    warm_up, traced = (1, 1) if args.quick else (WARM_UP, args.steps)
    settings = Settings(
        args.seq_len,
        args.batch * args.seq_len,
        steps=warm_up + traced,
        threads=threads,
        dtype=dtype,
        micro_batch=args.batch,
        trace_steps=(warm_up + 1, warm_up + traced),
    )
    print(f"{model.words()}\n{args.batch} × {args.seq_len:,} tokens, {dtype}", flush=True)
    tokens = settings.steps * settings.batch_tokens
    data = shards.write(binary, folder / "data", model.vocab_size, tokens)
    figures = Launcher(binary, folder)(model, data, settings, 1, warm_up)
    if figures.parameters != model.parameters:
        wanted = f"{model.parameters:,} parameters wanted"
        raise runs.RunFailed(f"{wanted}, {figures.parameters:,} trained")
    found = rows(figures.trace, work(model, args.batch, args.seq_len, dtype), floors)
    head = ("op", "calls", "ms", "share", "work", "rate", "floor", "of it")
    table = outcome.print_table(head, [cells(known) for known in found])
    words = (
        f"The step of median length among {traced} after {warm_up}: {args.batch} × "
        f"{args.seq_len:,} tokens, {dtype}, {model.parameters / 1e6:.0f} M parameters, "
        f"{threads} threads."
    )
    page = outcome.Figures(words, [table]) if args.whole or args.write_page else None
    settings_of_run = {"seq_len": args.seq_len, "batch": args.batch, "dtype": dtype}
    json_figures = settings_of_run | {"threads": threads, "floors": floors, "ops": found}
    return outcome.finish("breakdown", [], json_figures, judged=not args.quick, page=page)


def main() -> int:
    args = arguments()
    return runs.in_scratch("breakdown", args.binary, lambda *where: measure(args, *where))


if __name__ == "__main__":
    sys.exit(main())
