"""Writing golden files: the same bytes for the same values."""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def out_folder(description: str) -> Path:
    """The `--out` folder of a generator; `tests/golden` unless told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, value: dict) -> None:
    """Floats are written with the fewest digits that read back as the same f64."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(0o644)


read_tensors = load_file
