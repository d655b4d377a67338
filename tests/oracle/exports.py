"""Drives the built binary and loads what it exports in both releases of transformers.

    exports.py [--binary OXITRON] [--keep DIR]     run by the Python of setup.sh's environment

Three models: the committed folders hf-tiny-4 and hf-tiny-5, imported (`convert from-hf`), and a
training run (`tiny_run.py`). Each is exported (`convert to-hf`) to fp32, to fp32 in several files,
and to bf16. The binary is OXITRON, or release/oxitron in $CARGO_TARGET_DIR or target/.

Per export: its tensors are the model's, to the bit, rounded by PyTorch for bf16; check_export.py
holds under transformers 5.x and 4.x, with logits of the fp64 decoder of `reference_llama.py`, which
knows the sizes from elsewhere than the exported config.json; `oxitron generate` at temperature 0
says what the fp64 decoder finds likeliest. The run's event files pass check_tensorboard.py.
Prints a table and one line of JSON; exit code 0 when everything holds, else 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import models  # first: it sets one thread and offline mode
import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file
from models import Model

import golden_io
import reference_llama
import tiny_run
from runner import HERE, Runner

# Export name, arguments of `convert to-hf`, dtype. The small files hold a few tensors each.
FORMS = (
    ("fp32", ("--dtype", "fp32"), torch.float32),
    ("fp32, files", ("--dtype", "fp32", "--max-shard-size", "50KB"), torch.float32),
    ("bf16", ("--dtype", "bf16"), torch.bfloat16),
)
NEW_TOKENS = 16
END_OF_TEXT = 0  # its id, in all three models
# The binary computes in fp32. A winner that leads by less may lose by rounding: the comparison of
# texts ends before it, but not before as many tokens.
LEAD = 1e-3
FEWEST_TOKENS = 4


@dataclass
class Row:
    """One line of the table."""

    name: str
    by: str
    found: str = ""
    largest_difference: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Source:
    """A model in the binary's hands: what to export, and what must come out."""

    name: str
    checkpoint: Path
    model: Model
    weights: dict[str, torch.Tensor]  # fp32
    prompt: str


class Binary:
    """`oxitron(*arguments)`: its standard output; a failure ends the script."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            sys.exit(f"{path} is missing: make build, or name it with --binary")

    def __call__(self, *arguments: object) -> str:
        command = [str(self.path), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{' '.join(command)} left with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout


def default_binary() -> Path:
    target = os.environ.get("CARGO_TARGET_DIR", "target")
    return HERE.parent.parent / target / "release" / "oxitron"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def sources(oxitron: Binary, work: Path) -> list[Source]:
    """The two imports and the run."""
    found = []
    for name in ("hf-tiny-4", "hf-tiny-5"):
        folder, checkpoint = golden_io.GOLDEN / name, work / name
        oxitron("convert", "from-hf", folder, checkpoint)
        model = Model(**golden_io.read_json(golden_io.GOLDEN / f"{name}.json")["model"])
        found.append(Source(name, checkpoint, model, read_weights(folder), "The rest of the state"))
    run = tiny_run.train(oxitron, work)
    # A run's weights have no other reader: its fp32 export is what the others are held against.
    oxitron("convert", "to-hf", run, work / "weights", "--dtype", "fp32")
    weights = read_weights(work / "weights")
    found.append(Source("run", run, tiny_run.MODEL, weights, "the harbour lantern"))
    return found


def check_tensors(source: Source, folder: Path, dtype: torch.dtype, row: Row) -> None:
    exported = read_weights(folder)
    shapes = reference_llama.shapes(source.model)
    if exported.keys() != shapes.keys():
        row.problems.append(f"other tensors: {sorted(exported.keys() ^ shapes.keys())}")
        return
    for name, shape in shapes.items():
        wanted, value = source.weights[name].to(dtype), exported[name]
        if value.dtype != dtype or value.shape != shape or not torch.equal(value, wanted):
            row.problems.append(f"{name}: {value.dtype} {tuple(value.shape)}, or other values")


def check_files(folder: Path, several: bool, row: Row) -> None:
    """One file without an index, or several that the index describes."""
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    row.found = f"{len(files)} file{'s' * several}"
    if not several:
        if list(files) != ["model.safetensors"] or index.exists():
            row.problems.append(f"one file was wanted, found {sorted(files)}")
        return
    wanted = {name: file for file, tensors in files.items() for name in tensors}
    size = sum(value.nbytes for tensors in files.values() for value in tensors.values())
    written = golden_io.read_json(index)
    if len(files) < 2 or written["weight_map"] != wanted:
        row.problems.append(f"the index does not describe the {len(files)} files")
    if written["metadata"]["total_size"] != size:
        row.problems.append(f"the index says {written['metadata']} of {size} bytes")


@torch.no_grad()
def write_logits(model: Model, weights: dict[str, torch.Tensor], file: Path) -> None:
    """fp64 logits of one long document and of one row of short ones."""
    batch = models.join(
        models.pack("exports/long", 1, 96, model.vocab_size, 97, 97),
        models.pack("exports/packed", 1, 96, model.vocab_size, 1, 50),
    )
    rows = [
        reference_llama.logits(model, weights, tokens, positions).float().numpy()
        for tokens, positions in zip(batch.tokens, batch.positions)
    ]
    golden_io.write_tensors(
        file, {"tokens": batch.tokens, "positions": batch.positions, "logits": np.stack(rows)}
    )


@torch.no_grad()
def check_generate(
    oxitron: Binary, source: Source, weights: dict, folder: Path, row: Row
) -> None:
    """The likeliest continuation by the binary and by the fp64 decoder."""
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = words.encode(source.prompt, add_special_tokens=False).ids
    prompt = len(ids)
    while len(ids) < prompt + NEW_TOKENS:
        tokens, positions = np.array(ids), np.arange(len(ids))
        top = reference_llama.logits(source.model, weights, tokens, positions)[-1].topk(2)
        if float(top.values[0] - top.values[1]) < LEAD or int(top.indices[0]) == END_OF_TEXT:
            break
        ids.append(int(top.indices[0]))
    count = len(ids) - prompt
    wanted = words.decode(ids, skip_special_tokens=True)
    if count < FEWEST_TOKENS:
        row.problems.append(f"generate: a clear winner for {count} tokens only")
        return
    said = oxitron(
        "generate", folder, "--prompt", source.prompt, "--temperature", 0, "--max-tokens", count
    )
    row.found += f", {count} tokens generated"
    # An unfinished character at the end is not printed.
    if said.removesuffix("\n") != wanted.rstrip("\ufffd"):
        row.problems.append(f"generate: {said!r} instead of {wanted!r}")


def export(oxitron: Binary, source: Source, work: Path) -> tuple[list[Row], list[tuple]]:
    """Exports in every form; the binary's own rows, and (name, folder, logits) for transformers."""
    rows, loads = [], []
    for form, arguments, dtype in FORMS:
        row = Row(f"{source.name}, {form}", "oxitron")
        folder = work / row.name.replace(", ", "-")
        oxitron("convert", "to-hf", source.checkpoint, folder, *arguments)
        check_tensors(source, folder, dtype, row)
        check_files(folder, "--max-shard-size" in arguments, row)
        weights = {name: value.to(dtype).double() for name, value in source.weights.items()}
        logits = work / f"{folder.name}.logits.safetensors"
        write_logits(source.model, weights, logits)
        check_generate(oxitron, source, weights, folder, row)
        rows.append(row)
        loads.append((row.name, folder, logits))
    return rows, loads


def load(run: Runner, loads: list[tuple], old_release: bool) -> tuple[list[Row], str]:
    """All exports in one release of transformers, and its version."""
    pairs = [path for _, folder, logits in loads for path in (folder, logits)]
    done = run("check_export.py", "--json", *pairs, old_release=old_release)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(loads):
        sys.exit(f"check_export.py broke: {done.stderr[-4000:]}")
    version = lines[0]["versions"]["transformers"]
    rows = []
    for (name, _, _), line in zip(loads, lines):
        checks = line["checks"]
        row = Row(name, version, f"{len(checks)} checks", line["largest_difference"])
        for check, outcome in checks.items():
            if not outcome["passed"]:
                row.problems.append(f"{check}: {outcome['found']}")
        rows.append(row)
    return rows, version


def check_events(run: Runner, folder: Path) -> Row:
    done = run("check_tensorboard.py", folder)
    row = Row("run, event files", "tensorboard")
    try:
        line = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        row.problems.append(f"check_tensorboard.py broke: {done.stderr[-1000:]}")
        return row
    row.found = f"{line['files']} files, {line['values']} values"
    row.problems += line["faults"]
    if line["files"] < 2:
        row.problems.append("the restart left no event file of its own")
    return row


def show(rows: list[Row]) -> None:
    print(f"\n  {'export':24} {'by':12} {'largest difference':>18}")
    for row in rows:
        largest = "" if row.largest_difference is None else f"{row.largest_difference:.2e}"
        verdict = "FAIL" if row.problems else "ok"
        print(f"  {row.name:24} {row.by:12} {largest:>18}  {verdict:4} {row.found}")
        for problem in row.problems[:10]:
            print(f"      {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, default=default_binary())
    parser.add_argument("--keep", type=Path, help="keep the exports in this folder, which is new")
    options = parser.parse_args()
    oxitron, run = Binary(options.binary.resolve()), Runner()
    began = time.monotonic()
    rows, loads, largest = [], [], {}
    with tempfile.TemporaryDirectory(prefix="oracle-") as temporary:
        work = options.keep or Path(temporary)
        work.mkdir(exist_ok=True)
        for source in sources(oxitron, work):
            exported, to_load = export(oxitron, source, work)
            rows += exported
            loads += to_load
        rows.append(check_events(run, work / "run"))
        for old_release in (False, True):
            loaded, version = load(run, loads, old_release)
            rows += loaded
            found = [row.largest_difference for row in loaded]
            largest[version] = None if None in found else max(found)
    show(rows)
    failed = [f"{row.name} by {row.by}" for row in rows if row.problems]
    print(
        json.dumps(
            {
                "check": "exports",
                "passed": not failed,
                "failed": failed,
                "rows": len(rows),
                "largest_difference": largest,
                "seconds": round(time.monotonic() - began, 1),
                "versions": models.versions(),
            }
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
