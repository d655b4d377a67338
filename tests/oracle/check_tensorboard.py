"""Reads a run's TensorBoard files with TensorBoard's own reader and compares them with the record.

    check_tensorboard.py RUN_DIR

The record is metrics.jsonl and events.jsonl: ordered by attempt, a line of step k replaces what was
said of step k and later. TensorBoard must show exactly those steps, with every figure equal to
single precision, once through the event accumulator that its server uses, and the files must be
whole down to every checksum. Ends with one line of JSON; exits 1 when anything differs.
"""

import json
import math
import pathlib
import struct
import sys

from tensorboard.backend.event_processing import event_accumulator, event_file_loader

# TensorBoard tag -> key of a metrics record.
STEP_TAGS = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/tokens": "tokens",
    "train/target_tokens": "target_tokens",
    "train/skipped": "skipped",
    "throughput/tokens_per_second": "tokens_per_second",
    "throughput/tgs": "tgs",
    "throughput/mfu": "mfu",
    "throughput/mfu_full": "mfu_full",
    "throughput/hfu": "hfu",
    "seconds/step": "step_seconds",
    "seconds/data_wait": "data_wait_seconds",
    "seconds/comm": "comm_seconds",
    "seconds/exposed_comm": "exposed_comm_seconds",
    "seconds/optimizer": "optimizer_seconds",
    "memory/peak_bytes": "peak_bytes",
}
MAY_BE_ABSENT = {"mfu", "mfu_full", "hfu"}


def lines(path):
    """The objects of a file of JSON lines, ordered by attempt."""
    objects = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return sorted(objects, key=lambda each: each["attempt"])


def single(number):
    """The number as a float32; null stands for one that is not finite."""
    if number is None:
        return math.nan
    return struct.unpack("<f", struct.pack("<f", float(number)))[0]


def expected_scalars(run):
    """Tag -> {step: value} as the record tells it."""
    steps = {}
    for record in lines(run / "metrics.jsonl"):
        steps = {step: old for step, old in steps.items() if step < record["step"]}
        steps[record["step"]] = record
    expected = {}
    for tag, key in STEP_TAGS.items():
        values = {
            step: single(record[key])
            for step, record in steps.items()
            if not (key in MAY_BE_ABSENT and record[key] is None)
        }
        if values:
            expected[tag] = values
    validation = {}
    for event in lines(run / "events.jsonl"):
        kind = event["event"]
        if kind in ("resume", "rollback"):
            back = event["step"] if kind == "resume" else event["to_step"]
            validation = {step: old for step, old in validation.items() if step <= back}
        elif kind == "validation":
            validation = {step: old for step, old in validation.items() if step < event["step"]}
            validation[event["step"]] = single(event["loss"])
    if validation:
        expected["validation/loss"] = validation
    return expected


def same(found, wanted):
    return found == wanted or (not math.isfinite(found) and math.isnan(wanted))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = pathlib.Path(sys.argv[1])
    folder = run / "tensorboard"
    files = sorted(folder.glob("*tfevents*"))
    faults = [] if files else [f"{folder}: no event files"]

    # Every file by itself: whole records, right checksums, the version first.
    records = 0
    for path in files:
        events = list(event_file_loader.RawEventFileLoader(str(path)).Load())
        first = next(event_file_loader.EventFileLoader(str(path)).Load())
        if first.file_version != "brain.Event:2":
            faults.append(f"{path.name}: first record has file_version {first.file_version!r}")
        framed = sum(len(payload) + 16 for payload in events)
        if framed != path.stat().st_size:
            faults.append(f"{path.name}: {path.stat().st_size} bytes, {framed} in whole records")
        records += len(events)

    accumulator = event_accumulator.EventAccumulator(
        str(folder), size_guidance={event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    )
    accumulator.Reload()
    expected = expected_scalars(run)
    # Current readers turn scalars into tensors on the way in, older ones keep them.
    found = {tag: {e.step: e.value for e in accumulator.Scalars(tag)}
             for tag in accumulator.Tags()["scalars"]}
    found |= {tag: {e.step: e.tensor_proto.float_val[0] for e in accumulator.Tensors(tag)}
              for tag in accumulator.Tags()["tensors"]}
    compared = 0
    for tag in sorted(expected.keys() | found.keys()):
        wanted, got = expected.get(tag, {}), found.get(tag, {})
        if wanted.keys() != got.keys():
            odd = sorted(wanted.keys() ^ got.keys())[:5]
            faults.append(f"{tag}: {len(wanted)} steps in the record, {len(got)} in TensorBoard; "
                          f"not in both: {odd}")
            continue
        wrong = [step for step in wanted if not same(got[step], wanted[step])]
        compared += len(wanted)
        if wrong:
            step = wrong[0]
            faults.append(f"{tag}: {len(wrong)} values differ; at step {step} "
                          f"{wanted[step]} in the record, {got[step]} in TensorBoard")
    if compared == 0:
        faults.append("nothing was compared")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(files)} files, {records} records, {len(found)} tags, {compared} values compared")
    print(json.dumps({"check": "tensorboard", "passed": not faults, "files": len(files),
                      "records": records, "tags": len(found), "values": compared,
                      "faults": faults}))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
