"""Every CUDA kernel compiles, on a machine without a GPU, and stays within its limits.

    check.py [FILE.cu …]     without a file: all of kernels/src/cuda

NVRTC, the compiler that a run uses, turns each file into machine code for every architecture below,
with the options of options.txt and with the folder's own headers, and nothing else from disk. What
it reports of each kernel is held against limits.toml, against the registers and shared memory of a
multiprocessor, and shown in a table; one line of JSON; exit code 1 when anything is wrong, a mere
warning included.

Occupancy is what a kernel's registers and static shared memory allow at a block of 256 threads (or
its largest, if smaller). Shared memory that is asked for at the launch is not known here.
"""

import argparse
import concurrent.futures
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(1, str(HERE.parent / "bench"))

import outcome
from nvrtc import CannotCheck, Nvrtc, nvrtc_folder

KERNELS = ROOT / "kernels" / "src" / "cuda"
LIMITS = HERE / "limits.toml"

# Shared memory of a multiprocessor by architecture. All else below is the same for each.
SHARED_OF = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}
SHARED_RESERVED = 1024  # for the system, in every block
SHARED_UNIT = 128
MOST_STATIC_SHARED = 48 * 1024
WARP = 32
WARPS = 64
BLOCKS = 32
# Registers are handed to whole warps, by one of the four parts that a multiprocessor has.
PARTS = 4
REGISTERS_OF_PART = 16384
REGISTER_UNIT = 256
LARGEST_BLOCK = 1024
TYPICAL_BLOCK = 256

PROCESSES = 2


# ---- what the compiler reports -------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture. Sizes are in bytes: `shared` of a block, the
    others of a thread."""

    name: str
    architecture: str
    largest_block: int
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    barriers: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    def blocks(self, threads: int) -> int:
        """How many blocks of a size run on a multiprocessor at once."""
        warps = math.ceil(threads / WARP)
        shared = round_up(self.shared, SHARED_UNIT) + SHARED_RESERVED
        return min(
            BLOCKS,
            WARPS // warps,
            warps_that_fit(self.registers) // warps,
            SHARED_OF[self.architecture] // shared,
        )

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be there at a typical size of block."""
        threads = min(TYPICAL_BLOCK, self.largest_block)
        return self.blocks(threads) * math.ceil(threads / WARP) / WARPS


def round_up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit


def warps_that_fit(registers: int) -> int:
    """Warps that the registers of a multiprocessor suffice for, at so many a thread."""
    of_warp = round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    return REGISTERS_OF_PART // of_warp * PARTS


ENTRY = re.compile(r"^ptxas info +: Compiling entry function '([^']+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads$")
USED = re.compile(r"^ptxas info +: Used (\d+) registers")
AMOUNT = {
    "barriers": re.compile(r"used (\d+) barriers"),
    "shared": re.compile(r"(\d+) bytes smem"),
    "stack": re.compile(r"(\d+) bytes cumulative stack size"),
}


def read_report(log: str, blocks: Mapping[str, int]) -> list[Kernel]:
    """The kernels in a log of `--ptxas-options=-v`; `blocks` has the largest block of each.

    A kernel's own frame comes first; behind it come those of the functions it calls. Their spills
    count as its own: they are no less slow for being elsewhere. Their frames are in the cumulative
    size, where one is given.
    """
    found: dict[str, dict] = {}
    here: dict = {}
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            name, architecture = entry.groups()
            here = dict.fromkeys(("shared", "stack", "spill_stores", "spill_loads", "barriers"), 0)
            here |= {"name": name, "architecture": architecture}
            here["largest_block"] = blocks.get(name, LARGEST_BLOCK)
            found[name] = here
        elif here and (frame := FRAME.search(line)):
            stack, stores, loads = map(int, frame.groups())
            here["stack"] = max(here["stack"], stack)
            here["spill_stores"] += stores
            here["spill_loads"] += loads
        elif here and (used := USED.search(line)):
            here["registers"] = int(used[1])
            for what, pattern in AMOUNT.items():
                if amount := pattern.search(line):
                    here[what] = max(here[what], int(amount[1]))
    return [Kernel(**kernel) for kernel in found.values() if "registers" in kernel]


PTX_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\([^)]*\))?([^{;]*)\{")
PTX_BLOCK = re.compile(r"\.(?:max|req)ntid\s+(\d+(?:\s*,\s*\d+)*)")


def read_blocks(ptx: str) -> dict[str, int]:
    """The kernels of a PTX text, each with the most threads that its launch bounds allow."""
    found = {}
    for name, directives in PTX_ENTRY.findall(ptx):
        bound = PTX_BLOCK.search(directives)
        sides = [int(side) for side in bound[1].split(",")] if bound else [LARGEST_BLOCK]
        found[name] = math.prod(sides)
    return found


# ---- limits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """Bytes a thread."""

    stack: int
    spills: int


class Limits:
    """The content of limits.toml, checked."""

    def __init__(self, content: Mapping) -> None:
        if unknown := content.keys() - {"default", "kernel"}:
            raise CannotCheck(f"limits.toml: unknown: {', '.join(sorted(unknown))}")
        self.default = Limit(**sizes("default", content.get("default", {}), Limit(0, 0)))
        self.of = {}
        for name, table in content.get("kernel", {}).items():
            if not str(table.get("reason", "")).strip():
                raise CannotCheck(f"limits.toml: kernel.{name} gives no reason")
            rest = {key: value for key, value in table.items() if key != "reason"}
            self.of[name] = Limit(**sizes(f"kernel.{name}", rest, self.default))

    @classmethod
    def read(cls, path: Path = LIMITS) -> "Limits":
        # Not at the top: what does not read the file shall work with an older Python.
        try:
            import tomllib
        except ImportError:
            version = sys.version.split()[0]
            raise CannotCheck(f"Python 3.11 or newer is needed, this is {version}") from None
        try:
            return cls(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise CannotCheck(f"{path}: {error}") from None

    def faults(self, kernel: Kernel) -> list[str]:
        """What is wrong with a kernel, each in a sentence without its end."""
        limit = self.of.get(kernel.name, self.default)
        found = []
        if kernel.stack > limit.stack:
            found.append(f"a stack frame of {kernel.stack} bytes, {limit.stack} are allowed")
        if kernel.spills > limit.spills:
            found.append(
                f"{kernel.spill_stores} bytes of spill stores and {kernel.spill_loads} of loads, "
                f"{limit.spills} are allowed together"
            )
        if warps_that_fit(kernel.registers) < math.ceil(kernel.largest_block / WARP):
            found.append(
                f"{kernel.registers} registers are too many for its largest block, "
                f"{kernel.largest_block} threads: lower it by __launch_bounds__"
            )
        if kernel.shared > MOST_STATIC_SHARED:
            found.append(
                f"{kernel.shared} bytes of static shared memory, {MOST_STATIC_SHARED} are allowed"
            )
        return [f"{kernel.name} on {kernel.architecture}: {fault}" for fault in found]


def sizes(where: str, table: Mapping, default: Limit) -> dict[str, int]:
    """The sizes in a table of limits.toml, with those that it leaves out."""
    for key, value in table.items():
        if key not in vars(default):
            raise CannotCheck(f"limits.toml: {where}.{key} is unknown")
        if type(value) is not int or value < 0:
            raise CannotCheck(f"limits.toml: {where}.{key} must be a number of bytes")
    return vars(default) | dict(table)


# ---- the check -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A file to compile for one architecture; it is sent to another process."""

    nvrtc: Path
    name: str
    source: bytes
    headers: Mapping[str, bytes]
    options: Sequence[str]
    architecture: str


@dataclass(frozen=True)
class Compiled:
    """What came of a job."""

    name: str
    architecture: str
    error: str
    words: str  # errors and warnings as the compiler put them
    blocks: Mapping[str, int]  # of the kernels that the source has
    kernels: Sequence[Kernel]

    def faults(self) -> list[str]:
        """What is wrong with the file as a whole."""
        where = f"{self.name} for {self.architecture}"
        if self.error:
            return [f"{where} does not compile: {self.error}"]
        found = []
        if re.search(r"\bwarning\b[^:]*:", self.words):
            found.append(f"{where} has warnings")
        reported = {kernel.name for kernel in self.kernels}
        if silent := self.blocks.keys() - reported:
            found.append(f"{where}: no report of {', '.join(sorted(silent))}")
        if all(name.startswith("_Z") for name in self.blocks):
            found.append(f"{where} exports no kernel: see KERNEL in common.cuh")
        return found


def compile_job(job: Job) -> Compiled:
    options = [
        *job.options,
        f"--gpu-architecture={job.architecture}",
        "--ptxas-options=-v",
        # Otherwise a header that is not handed over could come from the current folder.
        "--no-source-include",
        "--no-cache",
    ]
    error, log, ptx = Nvrtc(job.nvrtc).compile(job.name, job.source, job.headers, options)
    blocks = read_blocks(ptx)
    words = [line for line in log.splitlines() if not re.match(r"ptxas (info +:| +\.)", line)]
    return Compiled(
        name=job.name,
        architecture=job.architecture,
        error=error,
        words="\n".join(words).strip(),
        blocks=blocks,
        kernels=read_report(log, blocks),
    )


def compile_all(nvrtc: Path, files: Sequence[Path]) -> list[Compiled]:
    """Compiles each file for every architecture, in the order of files."""
    headers = {path.name: path.read_bytes() for path in sorted(KERNELS.glob("*.cuh"))}
    lines = (KERNELS / "options.txt").read_text(encoding="utf-8").splitlines()
    options = [line for line in lines if line]
    jobs = [
        Job(nvrtc, path.name, path.read_bytes(), headers, options, architecture)
        for path in files
        for architecture in SHARED_OF
    ]
    processes = min(PROCESSES, len(os.sched_getaffinity(0)))
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        try:
            return list(pool.map(compile_job, jobs))
        except BrokenProcessPool:
            raise CannotCheck("NVRTC crashed: name one file after the other to find it") from None


def judge(compiled: Sequence[Compiled], limits: Limits, whole: bool) -> list[str]:
    """All that is wrong. Only where all kernels were compiled, the `whole`, can it be said that a
    name in limits.toml is out of date."""
    found = []
    homes: dict[str, set[str]] = {}
    for part in compiled:
        found += part.faults()
        for kernel in part.kernels:
            found += limits.faults(kernel)
        for name in part.blocks:
            homes.setdefault(name, set()).add(part.name)
    found += [
        f"{name} is in {' and in '.join(sorted(files))}"
        for name, files in homes.items()
        if len(files) > 1
    ]
    if whole and not any(part.error for part in compiled):
        gone = limits.of.keys() - homes.keys()
        found += [f"limits.toml names {name}, which no longer exists" for name in sorted(gone)]
    return found


def print_words(compiled: Sequence[Compiled]) -> None:
    """What the compiler said of each file, once where it is the same for each architecture."""
    said = set()
    for part in compiled:
        if part.words and (part.name, part.words) not in said:
            said.add((part.name, part.words))
            print(f"{part.name} for {part.architecture}:\n{part.words}\n", file=sys.stderr)


def print_kernels(kernels: Sequence[Kernel]) -> None:
    head = ["kernel", "largest block"]
    for architecture in SHARED_OF:
        head += [f"{architecture}: registers", "shared", "spills", "occupancy"]
    named: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        named.setdefault(kernel.name, {})[kernel.architecture] = kernel
    rows = []
    for name in sorted(named):
        row: list[object] = [name, next(iter(named[name].values())).largest_block]
        for architecture in SHARED_OF:
            if architecture in named[name]:
                kernel = named[name][architecture]
                share = f"{kernel.occupancy:.0%}"
                row += [kernel.registers, kernel.shared, kernel.spills, share]
            else:
                row += ["-"] * 4
        rows.append(row)
    outcome.print_table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all of kernels/src/cuda")
    files = parser.parse_args().files
    try:
        limits = Limits.read()
        chosen = files or sorted(KERNELS.glob("*.cu"))
        if not chosen:
            raise CannotCheck(f"{KERNELS} has no kernels")
        nvrtc = nvrtc_folder()
        version = Nvrtc(nvrtc).version()
        compiled = compile_all(nvrtc, chosen)
    except (CannotCheck, OSError) as error:
        print(f"cuda: {error}", file=sys.stderr)
        return 1
    faults = judge(compiled, limits, whole=not files)
    kernels = [kernel for part in compiled for kernel in part.kernels]
    print_words(compiled)
    print_kernels(kernels)
    for fault in faults:
        print(f"cuda: {fault}", file=sys.stderr)
    line = {
        "check": "cuda",
        "passed": not faults,
        "nvrtc": version,
        "files": len(chosen),
        "faults": faults,
        "kernels": [vars(kernel) | {"occupancy": kernel.occupancy} for kernel in kernels],
    }
    print(json.dumps(line))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
