"""Runs the tests of this bundle, each in a process of its own, and says how each ended.

Started by run-gpu-tests.sh, which lets the executables find libtorch. A test that leaves the GPU in
a bad state harms no other this way, and one that hangs is ended after its time limit. What is known
so far is in results/tests.json after every test.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
LIST = "tests.txt"
KERNELS = "kernels-tests"
GOLDEN = "golden"  # folder of what PyTorch has computed

LAST_LINES = 40  # of a failed test's output
REASON_WIDTH = 100  # on the screen; the file has all of it
KILL_SECONDS = 10  # that a killed process may take to be gone

# Under the sanitizer a test takes many times as long.
TOOLS = ("memcheck", "racecheck")
TOOL_PATIENCE = 10
TOOL_FOUND = 86
# Nothing there is a kernel of ours, and some of it counts the memory that the allocator below hands
# out.
NOT_FOR_TOOLS = "cuda::"
# libtorch hands out parts of large blocks, in which an access out of bounds goes unseen.
FOR_TOOLS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class CannotRun(Exception):
    """No test can be run; the message has the remedy."""


@dataclass(frozen=True)
class Test:
    """One test, and the tool that it runs under, if any."""

    executable: str
    name: str
    tool: str | None = None

    @property
    def words(self) -> str:
        return " ".join(filter(None, (self.tool, self.executable, self.name)))


@dataclass(frozen=True)
class Ended:
    """How a test ended. `output` has its last lines where it failed."""

    outcome: str  # PASS, FAIL or SKIP
    reason: str
    seconds: float = 0.0
    output: Sequence[str] = ()


# ---- which tests there are -----------------------------------------------------------------------


def read_list(path: Path) -> list[tuple[str, str]]:
    """Executables and beginnings of names, as the list has them."""
    wanted = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) == 2:
            wanted.append((words[0], words[1]))
        elif words:
            raise CannotRun(f"{path.name}:{number}: an executable and a beginning are expected")
    return wanted


def names_in(executable: Path) -> list[str]:
    """The tests that an executable has."""
    command = [executable, "--list", "--format", "terse"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRun(f"{executable.name} cannot be run: {error}") from None
    if done.returncode:
        raise CannotRun(f"{executable.name} cannot be run: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    return [line.removesuffix(": test") for line in lines if line.endswith(": test")]


def select(wanted: Iterable[tuple[str, str]], names: Mapping[str, Sequence[str]]) -> list[Test]:
    """The tests wanted, each once, in the order of the list."""
    found: dict[Test, None] = {}
    for executable, beginning in wanted:
        matching = [name for name in names[executable] if name.startswith(beginning)]
        if not matching:
            raise CannotRun(f"{LIST}: no test of {executable} begins with {beginning}")
        found |= dict.fromkeys(Test(executable, name) for name in matching)
    return list(found)


def under_tools(tests: Iterable[Test]) -> list[Test]:
    """The tests of kernels, once for each tool."""
    ours = [
        test
        for test in tests
        if test.executable == KERNELS and not test.name.startswith(NOT_FOR_TOOLS)
    ]
    return [Test(test.executable, test.name, tool) for tool in TOOLS for test in ours]


# ---- one test ------------------------------------------------------------------------------------

SUMMARY = re.compile(r"^test result: ok\. (\d+) passed; 0 failed; (\d+) ignored;", re.MULTILINE)
SKIPPED = re.compile(r"\bskipped: (.*)")


def judge(code: int, output: str) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and why, from an exit status and what a test printed."""
    if code < 0:
        return "FAIL", f"ended by {signal_name(-code)}"
    if code == TOOL_FOUND:
        return "FAIL", "the sanitizer has found errors"
    if code:
        return "FAIL", f"exit code {code}"
    summary = SUMMARY.search(output)
    if not summary:
        return "FAIL", "exit code 0 without a result"
    passed, ignored = map(int, summary.groups())
    if passed + ignored != 1:
        return "FAIL", "there is no such test"
    if ignored:
        return "SKIP", "is marked to be ignored"
    if skipped := SKIPPED.search(output):
        return "SKIP", skipped[1].strip()
    return "PASS", ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Runner:
    """Starts tests, several at a time where asked, and ends them all when it is ended."""

    def __init__(self, folder: Path, device: str, limit_seconds: float) -> None:
        self.folder = folder
        self.limit_seconds = limit_seconds
        self.environment = {k: v for k, v in os.environ.items() if k != "OXITRON_TEST_DEVICE"}
        if device == "cuda":
            self.environment["OXITRON_TEST_DEVICE"] = "cuda"
        self.environment["OXITRON_GOLDEN"] = str(folder / GOLDEN)
        # Without it cuBLAS does not repeat itself; a test asks for that.
        self.environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.lock = threading.Lock()
        self.live: set[subprocess.Popen] = set()
        self.ending = False

    def command(self, test: Test) -> list[str]:
        executable = str(self.folder / "bin" / test.executable)
        command = [executable, "--exact", test.name, "--nocapture"]
        if test.tool:
            options = ["--tool", test.tool, "--error-exitcode", str(TOOL_FOUND)]
            command = [sanitizer() or "compute-sanitizer", *options, *command]
        return command

    def start(self, test: Test) -> subprocess.Popen:
        """Starts a test in a process group of its own, so that all of it can be ended."""
        with self.lock:
            if self.ending:
                raise InterruptedError("the run was ended")
            process = subprocess.Popen(
                self.command(test),
                env=self.environment | (FOR_TOOLS if test.tool else {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.live.add(process)
        return process

    def run(self, test: Test) -> Ended:
        begun = time.monotonic()
        limit = self.limit_seconds * (TOOL_PATIENCE if test.tool else 1)
        try:
            process = self.start(test)
        except OSError as error:
            return Ended("FAIL", f"cannot be started: {error}")
        try:
            output, _ = process.communicate(timeout=limit)
            outcome, reason = judge(process.returncode, output)
        except subprocess.TimeoutExpired:
            kill(process)
            output = what_is_left(process)
            outcome, reason = "FAIL", f"was not done after {limit:g} s"
            if process.poll() is None:
                reason += ", and cannot be ended"
        finally:
            with self.lock:
                self.live.discard(process)
        seconds = round(time.monotonic() - begun, 3)
        lines = output.splitlines()[-LAST_LINES:] if outcome == "FAIL" else ()
        return Ended(outcome, reason, seconds, lines)

    def run_all(self, tests: Sequence[Test], jobs: int) -> Iterator[tuple[Test, Ended]]:
        """Tests with how they ended, as they end."""
        pool = concurrent.futures.ThreadPoolExecutor(jobs)
        futures = {pool.submit(self.run, test): test for test in tests}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False)
            self.end()

    def end(self) -> None:
        with self.lock:
            self.ending = True
            for process in self.live:
                kill(process)


def kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def what_is_left(process: subprocess.Popen) -> str:
    """The output of a killed process. One that hangs in a driver may outlive even that."""
    try:
        return process.communicate(timeout=KILL_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        said = error.output or b""
        return said if isinstance(said, str) else said.decode(errors="replace")


# ---- the bundle and the machine ------------------------------------------------------------------


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_whole(folder: Path) -> None:
    """Refuses executables that came here damaged. A script or the list may have been changed."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CannotRun(f"{folder / MANIFEST} cannot be read: {error}") from None
    for file in files:
        path = folder / file["path"]
        if path.parent.name != "bin":
            continue
        if not path.is_file() or sha256(path) != file["sha256"]:
            raise CannotRun(f"{path} is not as it was made: copy the bundle again")


def doctor(folder: Path, device: str) -> str:
    """What `oxitron doctor` says of this machine; refuses one that lacks something."""
    command = [folder / "bin" / "oxitron", "doctor", "--device", device]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRun(f"oxitron doctor: {error}") from None
    print(done.stdout, flush=True)
    if done.returncode == 1 and device == "cuda":
        raise CannotRun(
            "no test was run, because the GPUs of this machine cannot be used: see what is missing "
            "above\n    (--cpu runs the tests on the processor and on emulated GPUs instead)"
        )
    if done.returncode:
        words = signal_name(-done.returncode) if done.returncode < 0 else done.returncode
        raise CannotRun(f"oxitron doctor does not run here ({words}): no test was run")
    return done.stdout


def sanitizer() -> str | None:
    """Where compute-sanitizer is: on the PATH, or where CUDA's toolkit puts it."""
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [f"{folder}/bin" for folder in toolkits if folder]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    return shutil.which("compute-sanitizer", path=path)


def check_tools(args: argparse.Namespace) -> None:
    """Refuses what this machine has no tool for."""
    if args.sanitize and args.cpu:
        raise CannotRun("--sanitize looks at kernels on a GPU, and --cpu runs none there")
    if args.sanitize and not sanitizer():
        raise CannotRun(
            "--sanitize: compute-sanitizer is neither on the PATH nor in $CUDA_HOME/bin or "
            "/usr/local/cuda/bin, so no test was run under it (it is part of the CUDA toolkit)"
        )
    compiler = os.environ.get("CXX", "c++")
    if args.cpu and not shutil.which(compiler):
        raise CannotRun(f"--cpu needs a C++ compiler to emulate GPUs: there is no {compiler}")


# ---- the whole -----------------------------------------------------------------------------------


class Results:
    """What is known so far: on the screen as it comes, and in a file that is always whole."""

    def __init__(self, path: Path, about: dict, count: int) -> None:
        self.path = path
        self.about = about
        self.count = count
        self.tests: list[dict] = []

    def add(self, test: Test, ended: Ended) -> None:
        self.tests.append(asdict(test) | asdict(ended))
        reason = f"  ({textwrap.shorten(ended.reason, REASON_WIDTH)})" if ended.reason else ""
        print(f"{ended.outcome}  {ended.seconds:7.2f} s  {test.words}{reason}", flush=True)
        for line in ended.output:
            print(f"    | {line}", flush=True)
        self.write()

    def counted(self, outcome: str) -> int:
        return sum(test["outcome"] == outcome for test in self.tests)

    def totals(self) -> dict:
        counts = {outcome: self.counted(outcome) for outcome in ("PASS", "FAIL", "SKIP")}
        return counts | {"not run": self.count - len(self.tests)}

    def write(self) -> None:
        whole = self.about | {"totals": self.totals(), "tests": self.tests}
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run-gpu-tests.sh",
        description="Runs the tests of this bundle on the first GPU, each in a process of its own.",
        epilog="Exit codes: 0 all passed or were skipped; 1 a test failed; 2 none was run.",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="on the processor and on emulated GPUs: needs no GPU"
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="tests of kernels under compute-sanitizer alone"
    )
    parser.add_argument("--filter", default="", help="only tests with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time (default: 1)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="of a test (default: 300)",
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="FOLDER", help="default: results/"
    )
    args = parser.parse_args()
    if args.jobs < 1 or args.time_limit <= 0:
        parser.error("--jobs and --time-limit are above 0")
    return args


def chosen(args: argparse.Namespace) -> list[Test]:
    """The tests that this run is to run."""
    wanted = read_list(HERE / LIST)
    names = {name: names_in(HERE / "bin" / name) for name in {name for name, _ in wanted}}
    tests = [test for test in select(wanted, names) if args.filter in test.name]
    if args.sanitize:
        tests = under_tools(tests)
    if not tests:
        raise CannotRun(f"no test has {args.filter!r} in its name")
    return tests


def prepare(args: argparse.Namespace) -> tuple[list[Test], Results]:
    device = "cpu" if args.cpu else "cuda"
    check_tools(args)
    check_whole(HERE)
    about = {
        "version": (HERE / "VERSION").read_text(encoding="utf-8").strip(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "doctor": doctor(HERE, device).splitlines(),
    }
    tests = chosen(args)
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        results = Results(args.results / "tests.json", about, len(tests))
        results.write()
    except OSError as error:
        raise CannotRun(f"{error}; name a folder that you own with --results") from None
    return tests, results


def main() -> int:
    args = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        tests, results = prepare(args)
    except CannotRun as error:
        print(f"run-gpu-tests: {error}", file=sys.stderr)
        return 2
    runner = Runner(HERE, results.about["device"], args.time_limit)
    begun = time.monotonic()
    with contextlib.closing(runner.run_all(tests, args.jobs)) as run:
        for test, ended in run:
            results.add(test, ended)
    seconds = time.monotonic() - begun
    totals = ", ".join(f"{count} {outcome}" for outcome, count in results.totals().items() if count)
    print(f"\n{len(tests)} tests in {seconds:.0f} s: {totals}; {results.path}")
    return 1 if results.counted("FAIL") else 0


if __name__ == "__main__":
    sys.exit(main())
