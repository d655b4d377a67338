"""Runs of the built binary that are measured: their config, their start, their figures."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model import Model

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.02  # how late a step may be noticed
IDLE_SECONDS = 0.2  # how late the end may be, when nobody watches: the cores are not ours
LONGEST_RUN_SECONDS = 3600
GRACE_SECONDS = 15


class RunFailed(Exception):
    """A process that was to be measured ended badly; the message has the end of what it said."""


def default_binary() -> Path:
    """Where `make build` leaves the binary."""
    target = os.environ.get("CARGO_TARGET_DIR")
    return (ROOT / target if target else ROOT / "target") / "release" / "oxitron"


def existing_binary(path: str) -> Path:
    """An argument `--binary`, checked before anything is measured."""
    binary = Path(path).resolve()
    if not binary.is_file():
        sys.exit(f"{binary} is missing: make build, or name it with --binary")
    return binary


def in_scratch(bench: str, binary: str, measure: Callable[[Path, Path], int]) -> int:
    """Measures with a binary, which is looked for first, in a folder that is gone afterwards,
    whatever happens; the exit code."""
    found = existing_binary(binary)
    end_with_signals()
    with tempfile.TemporaryDirectory(prefix=f"oxitron-{bench}-") as name:
        try:
            return measure(found, Path(name))
        except RunFailed as error:
            print(error, file=sys.stderr)
            return 1


@dataclass(frozen=True)
class Settings:
    """What varies between measured runs of one model."""

    seq_len: int
    batch_tokens: int
    steps: int
    threads: int
    dtype: str = "bf16"
    grad_reduce_dtype: str = "fp32"
    overlap: bool = True
    micro_batch: int = 1
    trace_steps: tuple[int, int] | None = None


def config(model: Model, shards: Path, settings: Settings) -> str:
    """A run without validation, and with no checkpoint before its last step."""
    sizes = "\n".join(f"{key} = {value}" for key, value in model.sizes().items())
    trace = f"trace_steps = {list(settings.trace_steps)}" if settings.trace_steps else ""
    return f"""\
[run]
name = "bench"
dir = "run"
threads = {settings.threads}
{trace}

[model]
family = "llama"
{sizes}
tie_word_embeddings = false
dtype = "{settings.dtype}"

[parallel]
zero_stage = 1
grad_reduce_dtype = "{settings.grad_reduce_dtype}"
overlap = {str(settings.overlap).lower()}

[data]
[[data.source]]
name = "random"
path = "{shards}/*.parquet"

[validation]
fraction = 0.0

[optimizer]
lr = 1e-3
betas = [0.9, 0.95]
eps = 1e-8
weight_decay = 0.1
clip_norm = 1.0
schedule = "constant"

[checkpoint]
every_steps = 1000000000

[[stage]]
name = "bench"
seq_len = {settings.seq_len}
steps = {settings.steps}
batch_tokens = {settings.batch_tokens}
micro_batch = {settings.micro_batch}
"""


@dataclass
class Figures:
    """What a run has left: the records of `metrics.jsonl` behind the warm-up, the size of the model
    that ran, and the events of rank 0's trace, if it was to write one."""

    records: list[dict]
    parameters: int
    trace: list[dict] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(self.each(key))

    def each(self, key: str) -> list[float]:
        return [record[key] for record in self.records]


@dataclass
class Launcher:
    """`oxitron launch` in a folder of its own, which goes when the figures are read.

    `prefix` and `environment` place it elsewhere (in a network namespace, for instance); `hosts` is
    its host file.
    """

    binary: Path
    folder: Path
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: Path | None = None

    def __call__(
        self,
        model: Model,
        shards: Path,
        settings: Settings,
        ranks: int,
        warm_up: int,
        on_step: Callable[[int], None] | None = None,
    ) -> Figures:
        """Trains and reads the figures. `on_step(k)` is called soon after step k has ended."""
        home = self.folder / "run-under-way"
        home.mkdir()
        try:
            path = home / "config.toml"
            path.write_text(config(model, shards, settings))
            command = [*self.prefix, str(self.binary), "launch", str(path), "--ranks", str(ranks)]
            if self.hosts:
                command += ["--hosts", str(self.hosts)]
            metrics = home / "run" / "metrics.jsonl"
            watch = StepWatch(metrics, on_step) if on_step else None
            run_to_end(command, home / "output.txt", self.environment, watch)
            records = read_records(metrics)
            if len(records) != settings.steps:
                raise RunFailed(f"{metrics} has {len(records)} steps, not {settings.steps}")
            parameters = count_parameters(self.binary, home / "run")
            return Figures(records[warm_up:], parameters, read_trace(home / "run"))
        finally:
            shutil.rmtree(home)

    def plan(self, model: Model, shards: Path, settings: Settings, ranks: int) -> dict:
        """What `oxitron plan` says of a run."""
        path = self.folder / "planned.toml"
        path.write_text(config(model, shards, settings))
        command = [self.binary, "plan", path, "--ranks", str(ranks), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        path.unlink()
        if done.returncode:
            raise RunFailed(f"{self.binary} plan: exit code {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout)


class StepWatch:
    """Calls back for each line that a metrics file gains."""

    def __init__(self, path: Path, on_step: Callable[[int], None]) -> None:
        self.path, self.on_step, self.seen = path, on_step, 0

    def __call__(self) -> None:
        steps = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
        for step in range(self.seen, steps):
            self.on_step(step + 1)
        self.seen = steps


def run_to_end(
    command: Sequence[str],
    output: Path,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[], None] | None = None,
    limit_seconds: float = LONGEST_RUN_SECONDS,
) -> None:
    """Runs a command with both outputs in a file. Whatever happens here, it ends with us."""
    with open(output, "wb") as sink:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            wait(process, watch, limit_seconds)
        finally:
            end(process)
    if process.returncode:
        tail = output.read_text(errors="replace")[-3000:]
        raise RunFailed(f"{' '.join(command)}: exit code {process.returncode}\n{tail}")


def wait(
    process: subprocess.Popen, watch: Callable[[], None] | None, limit_seconds: float
) -> None:
    """Waits without looking, unless somebody wants to see the steps go by."""
    limit = time.monotonic() + limit_seconds
    while process.poll() is None:
        if time.monotonic() > limit:
            raise RunFailed(f"still running after {limit_seconds:.0f} s: {process.args}")
        if watch:
            watch()
        time.sleep(POLL_SECONDS if watch else IDLE_SECONDS)
    if watch:
        watch()


def end(process: subprocess.Popen) -> None:
    """Ends a process that may still run: the second signal tells the launcher not to save."""
    for _ in range(2):
        if process.poll() is None:
            process.terminate()
            time.sleep(0.2)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that hangs in a driver may outlive even that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def read_records(path: Path) -> list[dict]:
    """The records of a metrics file, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_trace(run: Path) -> list[dict]:
    """The events of rank 0's trace; none where the run wrote no trace."""
    path = run / "trace" / "rank-0000.json"
    return json.loads(path.read_text())["traceEvents"] if path.exists() else []


def count_parameters(binary: Path, run: Path) -> int:
    """The number of parameters in a run's checkpoint, as `oxitron inspect` counts them."""
    done = subprocess.run([binary, "inspect", run], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{binary} inspect: exit code {done.returncode}\n{done.stderr}")
    words = done.stdout.replace(",", " ").split()
    return int(words[words.index("parameters") - 1])


def end_with_signals() -> None:
    """Makes Ctrl-C and SIGTERM end this process like an error does: nothing stays behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
