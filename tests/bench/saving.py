"""What a save costs the step loop, beside one copy of the same bytes (make bench-save).

A model with about 1 GB of fp32 master weights and moments trains and saves every few steps. The
step loop stands still while the state is staged, which is a copy into memory that was touched
before; the bar compares it with `memcpy` of as many bytes, per rank, by as many processes at once,
measured right before and after the run. How long the writing takes beside the steps, and what it
does to them, is printed.
"""

import argparse
import ctypes
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import outcome
import runs
import shards
from model import Model

MODEL = Model(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=6,
    num_heads=16,
    num_kv_heads=16,
)
SAVE_EVERY = 5
MOST_TIMES_MEMCPY = 1.3
COPIES = 5


def copy_seconds(size: int, start: "multiprocessing.Barrier", results) -> None:
    """Times copies between two buffers whose pages are there."""
    source, target = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    ctypes.memset(source, 1, size)
    ctypes.memset(target, 2, size)
    for _ in range(COPIES):
        start.wait()
        began = time.perf_counter()
        ctypes.memmove(target, source, size)
        results.put(time.perf_counter() - began)


def memcpy(size: int, ranks: int) -> list[float]:
    """Seconds of copies of `size` bytes by `ranks` processes at once."""
    start, results = multiprocessing.Barrier(ranks), multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=copy_seconds, args=(size, start, results))
        for _ in range(ranks)
    ]
    for worker in workers:
        worker.start()
    seconds = [results.get() for _ in range(ranks * COPIES)]
    for worker in workers:
        worker.join()
    return seconds


def measure(binary: Path, folder: Path, data: Path, ranks: int, threads: int, steps: int) -> dict:
    """Trains, and reads what the saves have cost."""
    home = folder / f"ranks-{ranks}"
    home.mkdir()
    settings = runs.Settings(
        seq_len=256, batch_tokens=256 * 2, steps=steps, threads=threads, dtype="bf16"
    )
    text = runs.config(MODEL, data, settings)
    saving = f"every_steps = {SAVE_EVERY}\nkeep = 1\n"
    path = home / "config.toml"
    path.write_text(text.replace("every_steps = 1000000000\n", saving))
    command = [str(binary), "launch", str(path), "--ranks", str(ranks)]
    bytes_per_rank = 12 * MODEL.parameters // ranks
    copies = memcpy(bytes_per_rank, ranks)
    runs.run_to_end(command, home / "output.txt")
    copies += memcpy(bytes_per_rank, ranks)
    events = runs.read_records(home / "run" / "events.jsonl")
    records = runs.read_records(home / "run" / "metrics.jsonl")
    staged = [event for event in events if event["event"] == "save_staged"][1:]
    durable = [event for event in events if event["event"] == "save_durable"][1:]
    beside, alone = split(records, durable)
    return {
        "ranks": ranks,
        "bytes_per_rank": staged[0]["bytes"],
        "staged_seconds": [event["seconds"] for event in staged],
        "memcpy_seconds": copies,
        "durable_seconds": [event["seconds"] for event in durable],
        "bytes": durable[0]["bytes"],
        "step_seconds_beside_a_save": beside,
        "step_seconds_alone": alone,
    }


def split(records: list[dict], durable: list[dict]) -> tuple[list[float], list[float]]:
    """Steps that ran while a save was being written, and the others; the first two are warm-up."""
    until = {event["step"]: event["seconds"] for event in durable}
    beside, alone, left = [], [], 0.0
    for record in records[2:]:
        seconds = record["step_seconds"]
        (beside if left > 0 else alone).append(seconds)
        left = until.get(record["step"], left - seconds)
    return beside, alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=str(runs.default_binary()))
    parser.add_argument("--steps", type=int, default=5 * SAVE_EVERY + 1)
    arguments = parser.parse_args()
    runs.end_with_signals()
    binary = runs.existing_binary(arguments.binary)
    bars, rows, figures = [], [], []
    with tempfile.TemporaryDirectory(prefix="oxitron-saving-") as scratch:
        folder = Path(scratch)
        data = shards.write(binary, folder / "data", MODEL.vocab_size, 200_000)
        for ranks, threads in ((1, 2), (2, 1)):
            found = measure(binary, folder, data, ranks, threads, arguments.steps)
            figures.append(found)
            staged = statistics.median(found["staged_seconds"])
            copy = statistics.median(found["memcpy_seconds"])
            durable = statistics.median(found["durable_seconds"])
            rows.append(
                (
                    ranks,
                    found["bytes_per_rank"] / 1e9,
                    staged,
                    copy,
                    durable,
                    found["bytes"] / 1e9 / durable,
                    statistics.median(found["step_seconds_alone"]),
                    statistics.median(found["step_seconds_beside_a_save"]),
                )
            )
            name = f"{ranks} ranks: the loop stands still / memcpy of the same bytes"
            bars.append(outcome.Bar(name, staged / copy, "<=", MOST_TIMES_MEMCPY))
    print(MODEL.words())
    outcome.print_table(
        (
            "ranks",
            "GB per rank",
            "staged s",
            "memcpy s",
            "durable s",
            "GB/s",
            "step s",
            "step s beside a save",
        ),
        rows,
    )
    return outcome.finish("saving", bars, {"runs": figures})


if __name__ == "__main__":
    sys.exit(main())
