"""Runs the scripts of this folder, each in a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Runner:
    """Runs the other scripts, under either release of transformers."""

    def __init__(self) -> None:
        folder = os.environ.get("OXITRON_ORACLE")
        root = Path(folder) if folder else Path(sys.prefix).parent
        self.old_release = root / "transformers-4"
        if not self.old_release.is_dir():
            sys.exit(f"{self.old_release} is missing: run {HERE / 'setup.sh'}")

    def __call__(self, script: str, *arguments: object, old_release: bool = False):
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        environment.pop("PYTHONPATH", None)
        if old_release:
            environment["PYTHONPATH"] = str(self.old_release)
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def generate(self, script: str, out: Path, old_release: bool = False) -> None:
        began = time.monotonic()
        done = self(script, "--out", out, old_release=old_release)
        release = "4.x" if old_release else "5.x"
        print(f"  {script:22} {release}  {time.monotonic() - began:5.1f} s", flush=True)
        if done.returncode:
            sys.exit(f"{script} failed under transformers {release}:\n{done.stderr[-4000:]}")
