"""Makes the folder that tests and measures Oxitron on a GPU machine (make gpu-bundle).

    make_bundle.py     target/gpu-bundle, and target/gpu-bundle.tar.gz beside it

That machine needs a PyTorch and nothing else. So the executables are built without MPI, stripped,
and refused where they need a library that such a machine may lack; the folder stays small enough to
be sent around. Ends with a table and one line of JSON.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(1, str(HERE.parent / "bench"))

import outcome
import run_tests

MOST_BYTES = 60_000_000
# Everything is compiled where everything else is, but a binary without MPI must not take the place
# of the one that other commands run.
COMPILED = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute()
CARGO_FOLDERS = {
    "CARGO_BUILD_BUILD_DIR": str(COMPILED),
    "CARGO_TARGET_DIR": str(COMPILED / "without-mpi"),
}
BUNDLE = ROOT / "target" / "gpu-bundle"
# What a run there has left stays when the bundle is made again.
RESULTS = "results"
SCRIPTS = ("run-gpu-tests.sh", "run-gpu-bench.sh", "run_tests.py", "torch.sh")
MEASURING = ("bench_steps.py", "demo_losses.py")
FILES = (*SCRIPTS, *MEASURING, "step_cases.py", "step_rows.py", "tests.txt", "README.md")
# What scripts and tests need of the folders beside this one, by name or pattern: how to run and to
# tell, the other side of the comparison, what PyTorch has computed.
NEEDED = {
    "bench": ("model.py", "outcome.py", "runs.py", "shards.py"),
    "peers": ("attention.py", "device_peer.py", "hf_weights.py", "llama.py", "peer.py"),
    run_tests.GOLDEN: ("logits.*", "train20.*"),
}

# One choice of packages for all, so that their dependencies are compiled once.
PACKAGES = ["-p", "oxitron", "-p", "oxitron-kernels", "-p", "oxitron-trainer"]
COMMON = ["--locked", "--no-default-features", "--message-format=json-render-diagnostics"]
EMULATOR = ["--features", "oxitron-kernels/emulator"]
# What cargo is asked for; the executables among it, and their names in the bundle.
BUILDS = [
    (["build", "--release", "--bin", "oxitron", "-p", "oxitron"], {"oxitron": "oxitron"}),
    (
        ["test", "--release", "--no-run", "--lib", *PACKAGES],
        {"oxitron_kernels": run_tests.KERNELS, "oxitron_trainer": "trainer-tests"},
    ),
    (
        ["bench", "--profile", "release", "--no-run", "--bench", "gpu", *PACKAGES, *EMULATOR],
        {"gpu": "gpu-bench"},
    ),
]

# libtorch's own, and what every Linux with a PyTorch has.
LIBRARIES_THERE = re.compile(
    r"lib(c10|torch|torch_cpu|gomp|stdc\+\+|gcc_s|m|c|dl|pthread|rt)\.so(\.\d+)?|ld-linux-.*"
)


class CannotMake(Exception):
    """There is no bundle; the message says what to do."""


@dataclass(frozen=True)
class Needs:
    """Libraries that an executable is linked to, and the newest versions of the system's two."""

    libraries: Sequence[str]
    versions: dict[str, str]


# ---- executables ---------------------------------------------------------------------------------


def built(arguments: Sequence[str]) -> dict[str, Path]:
    """Runs cargo, and returns the executables by the name of their target."""
    command = ["cargo", *arguments, *COMMON]
    environment = os.environ | CARGO_FOLDERS
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise CannotMake(f"{' '.join(command)}: exit code {done.returncode}")
    return executables(done.stdout)


def executables(messages: str) -> dict[str, Path]:
    """The executables that cargo's messages name, by the name of their target."""
    found = {}
    for line in messages.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message["executable"]:
            found[message["target"]["name"]] = Path(message["executable"])
    return found


def put_executables(folder: Path) -> None:
    """Builds all executables and puts stripped copies into `folder`."""
    folder.mkdir()
    for arguments, names in BUILDS:
        found = built(arguments)
        for target, name in names.items():
            shutil.copyfile(found[target], folder / name)
    for path in folder.iterdir():
        path.chmod(0o755)
        subprocess.run(["strip", path], check=True)


def read_needs(report: str) -> Needs:
    """What `readelf -dVW` says of an executable."""
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", report)
    versions = {}
    for name in ("GLIBC", "GLIBCXX"):
        numbers = re.findall(rf"\b{name}_([\d.]+)", report)
        if numbers:
            versions[name] = newest(numbers)
    return Needs(sorted(libraries), versions)


def refuse_strange(name: str, needs: Needs) -> None:
    """Refuses an executable that needs what is not there, MPI above all."""
    if strange := [one for one in needs.libraries if not LIBRARIES_THERE.fullmatch(one)]:
        raise CannotMake(
            f"{name} needs {', '.join(strange)}, which a machine with PyTorch alone lacks"
        )


def check_needs(folder: Path) -> dict[str, str]:
    """Looks into each executable, and returns the system that all of them need."""
    system: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        done = subprocess.run(["readelf", "-dVW", path], capture_output=True, text=True, check=True)
        needs = read_needs(done.stdout)
        refuse_strange(path.name, needs)
        for name, number in needs.versions.items():
            system[name] = newest([number, system.get(name, "0")])
        print(f"{path.name}: no MPI; needs {', '.join(needs.libraries)}", flush=True)
    return system


def newest(versions: Iterable[str]) -> str:
    """The last of versions such as 2.9 and 2.34."""
    return max(versions, key=lambda version: [int(number) for number in version.split(".")])


def check_list(folder: Path) -> int:
    """Refuses a list of tests that does not fit the executables; returns how many it names."""
    wanted = run_tests.read_list(HERE / run_tests.LIST)
    names = {name: run_tests.names_in(folder / name) for name in {name for name, _ in wanted}}
    return len(run_tests.select(wanted, names))


# ---- the folder ----------------------------------------------------------------------------------


def version() -> str:
    """The commit that the sources are of, and a mark of what was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise CannotMake(f"git {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    commit, day = git("log", "-1", "--format=%H %cs").split()
    changed = git("status", "--porcelain")
    if not changed:
        return f"oxitron, commit {commit} of {day}"
    mark = hashlib.sha256((changed + git("diff", "HEAD")).encode()).hexdigest()[:8]
    return f"oxitron, commit {commit} of {day} with changes {mark} that are not committed"


def clear(folder: Path) -> None:
    """Leaves nothing in a folder but the results of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and path.name != RESULTS:
            shutil.rmtree(path)
        elif path.name != RESULTS:
            path.unlink()


def files_of(folder: Path) -> list[Path]:
    """The files of a bundle, by name, without results."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.relative_to(folder).parts[0] != RESULTS)


def put_scripts(folder: Path) -> None:
    """Copies everything that is not built, and sees that what measures finds all of its parts."""
    for name in FILES:
        shutil.copy(HERE / name, folder / name)
    for part, patterns in NEEDED.items():
        (folder / part).mkdir()
        for pattern in patterns:
            found = list((HERE.parent / part).glob(pattern))
            if not found:
                raise CannotMake(f"tests/{part} has no {pattern}")
            for path in found:
                shutil.copy(path, folder / part / path.name)
    for name in MEASURING:
        command = [sys.executable, "-B", folder / name, "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CannotMake(f"{name} does not run in the bundle: {done.stderr.strip()}")


def write_manifest(folder: Path, system: dict[str, str]) -> list[dict]:
    """Writes sizes and sums of what is in the folder, by which a copy is known to be whole."""
    files = [
        {
            "path": str(path.relative_to(folder)),
            "bytes": path.stat().st_size,
            "sha256": run_tests.sha256(path),
        }
        for path in files_of(folder)
        if path.name != run_tests.MANIFEST
    ]
    whole = {"system": system, "files": files}
    (folder / run_tests.MANIFEST).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return files


def check_size(files: Iterable[dict], most: int = MOST_BYTES) -> int:
    """Refuses a bundle that is too large; returns its size."""
    files = list(files)
    total = sum(file["bytes"] for file in files)
    if total > most:
        largest = max(files, key=lambda file: file["bytes"])
        raise CannotMake(
            f"the bundle has {total:,} bytes, and at most {most:,} are allowed; the largest file "
            f"is {largest['path']} with {largest['bytes']:,}"
        )
    return total


def pack(folder: Path, archive: Path) -> int:
    """Writes the archive; returns its size."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    fresh = archive.with_name(archive.name + ".new")
    with tarfile.open(fresh, "w:gz", compresslevel=6) as tar:
        for path in files_of(folder):
            tar.add(path, f"{folder.name}/{path.relative_to(folder)}", filter=anonymous)
    fresh.replace(archive)
    return archive.stat().st_size


def make(folder: Path, archive: Path) -> dict:
    """Makes folder and archive, and returns the line of figures."""
    archive.unlink(missing_ok=True)
    clear(folder)
    made_from = version()
    put_executables(folder / "bin")
    if version() != made_from:
        made_from += ", and with others that were made during the build"
    put_scripts(folder)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    (folder / "VERSION").write_text(made_from + "\n", encoding="utf-8")
    system = check_needs(folder / "bin")
    tests = check_list(folder / "bin")
    files = write_manifest(folder, system)
    total = check_size(files)
    packed = pack(folder, archive)
    rows = [(file["path"], f"{file['bytes']:,}") for file in files]
    rows += [("together", f"{total:,}"), (archive.name, f"{packed:,}")]
    outcome.print_table(("file", "bytes"), rows)
    needed = ", ".join(f"{name} {number}" for name, number in system.items())
    print(f"{folder}: {tests} tests; needs {needed} or newer, and PyTorch 2.11.0 for CUDA 13")
    return {
        "bundle": str(folder),
        "version": made_from,
        "bytes": total,
        "archive_bytes": packed,
        "tests": tests,
        "system": system,
    }


def main() -> int:
    try:
        made = make(BUNDLE, BUNDLE.with_name(BUNDLE.name + ".tar.gz"))
    except (CannotMake, run_tests.CannotRun) as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
