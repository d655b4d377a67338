"""NVRTC, the compiler of GPU kernels that a run uses: found or installed, and called.

    nvrtc.py     prints the folder that it lies in

It is installed from the Python index into the user's cache the first time (about 100 MB), unless
OXITRON_NVRTC names a folder that holds libnvrtc.so.13 and its builtins.
"""

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"


class CannotCheck(Exception):
    """Nothing can be said of the kernels; the message has the remedy."""


def nvrtc_folder() -> Path:
    """Where libnvrtc lies; installs it where needed."""
    if named := os.environ.get("OXITRON_NVRTC"):
        folder = Path(named)
        for pattern in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.*"):
            if not any(folder.glob(pattern)):
                raise CannotCheck(
                    f"OXITRON_NVRTC={named} holds no {pattern}: "
                    "correct it, or unset it to have NVRTC installed"
                )
        return folder
    pinned = re.search(r"^nvidia-cuda-nvrtc==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)
    if not pinned:
        raise CannotCheck(f"{REQUIREMENTS} does not pin nvidia-cuda-nvrtc")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base).absolute() / "oxitron"
    folder = cache / f"nvrtc-{pinned[1]}"
    if not folder.is_dir():
        try:
            install(cache, folder)
        except OSError as error:
            raise CannotCheck(
                f"cannot install NVRTC in {cache}: {error}; "
                "set XDG_CACHE_HOME to a folder that you own and that has 300 MB free"
            ) from None
    return folder


def install(cache: Path, folder: Path) -> None:
    """Installs under a temporary name first, so that a folder of that name is always whole, and
    under a lock, so that two clones do not clash."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "nvrtc.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        # What a killed installation has left.
        for left in cache.glob(".nvrtc-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".nvrtc-", dir=cache) as scratch:
            partial = Path(scratch) / "lib"
            partial.mkdir()
            print(f"cuda: installing NVRTC into {folder} (about 100 MB)", file=sys.stderr)
            extract(download(Path(scratch), cache / "wheels"), partial)
            partial.rename(folder)


def download(folder: Path, wheels: Path) -> Path:
    """Has pip bring the wheel; wheels at hand go first, for machines without a network."""
    name = REQUIREMENTS.relative_to(ROOT)
    how = ["download", "--no-deps", "--only-binary=:all:", "--requirement", str(REQUIREMENTS)]
    source = []
    if any(wheels.glob("nvidia_cuda_nvrtc-*.whl")):
        source = ["--no-index", "--find-links", str(wheels)]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder)]
    # pip unpacks nothing here, but keeps what it fetches in TMPDIR for a while.
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *how, *source, *quiet], stdout=sys.stderr, env=environment
    )
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise CannotCheck(
            f"pip could not get what {name} names (its words are above)\n"
            "  without pip: on Debian, apt-get install python3-pip\n"
            "  with a mirror: set PIP_INDEX_URL\n"
            "  without a network: where there is one, run\n"
            f"      python3 -m pip download --no-deps --requirement {name}\n"
            f"  and put the file into {wheels};\n"
            "  or set OXITRON_NVRTC to the folder of a libnvrtc.so.13 (lib64 of a CUDA 13 toolkit)"
        )
    return found[0]


def extract(wheel: Path, folder: Path) -> None:
    """Takes the two libraries out of the wheel; the rest, larger, is for other uses."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.rpartition("/")[2]
            if re.fullmatch(r"libnvrtc(-builtins)?\.so\.[\d.]+", name):
                with archive.open(member) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    if len(list(folder.iterdir())) != 2:
        raise CannotCheck(f"{wheel.name} does not hold the libraries expected")


class Nvrtc:
    """The library, loaded."""

    def __init__(self, folder: Path) -> None:
        try:
            # NVRTC looks for its builtins by name along the system's paths, and finds them there
            # when they are loaded already.
            for builtins in folder.glob("libnvrtc-builtins.so.13.*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            self.library = ctypes.CDLL(str(folder / "libnvrtc.so.13"))
        except OSError as error:
            raise CannotCheck(f"cannot load NVRTC: {error}") from None
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.expect(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"{major.value}.{minor.value}"

    def compile(
        self, name: str, source: bytes, headers: Mapping[str, bytes], options: Sequence[str]
    ) -> tuple[str, str, str]:
        """What went wrong, if anything; the log; and PTX, if it came so far."""
        program = ctypes.c_void_p()
        self.expect(
            self.library.nvrtcCreateProgram(
                ctypes.byref(program),
                source,
                name.encode(),
                len(headers),
                strings(headers.values()),
                strings(header.encode() for header in headers),
            )
        )
        arguments = strings(option.encode() for option in options)
        status = self.library.nvrtcCompileProgram(program, len(arguments), arguments)
        log = self.text(program, "ProgramLog")
        ptx = self.text(program, "PTX")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return self.words(status) if status else "", log, ptx

    def text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        if getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
            return ""
        buffer = ctypes.create_string_buffer(size.value + 1)
        self.expect(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.value.decode(errors="replace")

    def words(self, status: int) -> str:
        return self.library.nvrtcGetErrorString(status).decode()

    def expect(self, status: int) -> None:
        if status:
            raise CannotCheck(f"NVRTC: {self.words(status)}")


def strings(values: Iterable[bytes]) -> ctypes.Array:
    values = list(values)
    return (ctypes.c_char_p * len(values))(*values)


def main() -> int:
    try:
        print(nvrtc_folder())
    except (CannotCheck, OSError) as error:
        print(f"cuda: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
