"""Makes every golden file again in a temporary folder and compares it with the committed one.

    run_all.py [--keep DIR]     run by the Python of setup.sh's environment

Parts: every generator under the installed transformers 5.x; the numbers that do not depend on the
release once more under 4.x; the committed Hugging Face folders loaded by both. Prints a table and
one line of JSON; exit code 0 when every figure keeps its bound, else 1.

Bounds. Integers, texts and file layouts: equal. Numbers in fp32 and fp64: 1e-5 relative to the
largest of their list, or to the length of the tensor they are projections of: room for another
processor's instruction set and for nothing else. Measured errors: those of fp32 at most three times
the committed ones; those of bf16 within a third of them either way, those of a single tensor within
a factor of two, since they depend on the instruction set.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import golden_io
from runner import Runner

ROUNDING = 1e-5


@dataclass
class Comparison:
    """Figures of one file: how many, and the largest fraction of its bound that one used."""

    name: str
    values: int = 0
    used: float = 0.0
    problems: list[str] = field(default_factory=list)

    def equal(self, where: str, new, old) -> None:
        self.values += 1
        if new != old:
            self.problems.append(f"{where}: {new!r} instead of {old!r}"[:200])

    def within(self, where: str, distance: float, bound: float) -> None:
        self.values += 1
        # Not `distance > bound`: NaN must fail.
        if not distance <= bound:
            self.problems.append(f"{where}: off by {distance:.3g}, allowed {bound:.3g}")
        self.used = max(self.used, distance / bound if bound else 0.0)

    def numbers(self, where: str, new: list[float], old: list[float], scale: float) -> None:
        """Numbers of one kind and size; the path to them says how they were measured."""
        for a, b in zip(new, old):
            if "bf16" in where and "error" in where:
                # One small tensor's error is a matter of luck, that of many is not.
                self.within(where, max(a / b, b / a) - 1, 1.0 if "/tensors/" in where else 1 / 3)
            elif "bf16" in where:
                self.within(where, abs(a - b) / abs(b), 1e-3)
            elif "error" in where:
                self.within(where, a / b, 3.0)
            else:
                self.within(where, abs(a - b) / max(scale, sys.float_info.min), ROUNDING)

    def json(self, where: str, new, old, norm: float = 0.0) -> None:
        """Two values of the same path; `norm` is the length of the tensor they speak of."""
        if isinstance(old, dict) and isinstance(new, dict):
            self.equal(f"{where} keys", list(new), list(old))
            for key in old.keys() & new.keys() - {"versions", "transformers_version"}:
                self.json(f"{where}/{key}", new[key], old[key], old.get("norm", norm))
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            if old and all(isinstance(value, float) for value in old + new):
                self.numbers(where, new, old, max(norm, *map(abs, old)))
            else:
                for a, b in zip(new, old):
                    self.json(where, a, b, norm)
        elif isinstance(old, float) and isinstance(new, float):
            self.numbers(where, [new], [old], abs(old))
        else:
            self.equal(where, new, old)

    def tensors(self, new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> None:
        self.equal("tensor names", sorted(new), sorted(old))
        for name in old.keys() & new.keys():
            a, b = new[name], old[name]
            self.equal(f"{name} layout", (a.dtype, a.shape), (b.dtype, b.shape))
            if a.shape != b.shape:
                continue
            if a.dtype.kind == "f":
                difference = np.linalg.norm(a.astype(np.float64) - b)
                self.within(name, difference / np.linalg.norm(b.astype(np.float64)), ROUNDING)
            else:
                self.equal(name, np.array_equal(a, b), True)


def compare(new: Path, old: Path) -> Comparison:
    """Two files of the same name; weights of Hugging Face folders are compared byte for byte."""
    result = Comparison(str(old.relative_to(golden_io.GOLDEN)))
    if not new.exists():
        result.problems.append("no generator wrote it")
    elif old.suffix == ".json" and old.name != "tokenizer.json":
        result.json("", golden_io.read_json(new), golden_io.read_json(old))
    elif old.suffix == ".safetensors" and old.parent == golden_io.GOLDEN:
        result.tensors(load_file(new), load_file(old))
    else:
        result.equal("bytes", new.read_bytes() == old.read_bytes(), True)
    return result


def golden_files() -> list[Path]:
    files = (file for file in golden_io.GOLDEN.rglob("*") if file.is_file())
    return sorted(file for file in files if file.suffix != ".md")


def compare_goldens(run: Runner, work: Path) -> list[Comparison]:
    new, old_release = work / "5", work / "4"
    for script in (
        "make_counter_hash.py",
        "make_logits.py",
        "make_gradients.py",
        "make_train20.py",
        "make_hf_model.py",
    ):
        run.generate(script, new)
    run.generate("make_hf_model.py", new, old_release=True)
    results = [compare(new / file.relative_to(golden_io.GOLDEN), file) for file in golden_files()]
    # What 5.x answers, 4.x must answer too.
    for script, names in (
        ("make_logits.py", ("logits.json", "logits.safetensors")),
        ("make_train20.py", ("train20.json", "train20.safetensors")),
    ):
        run.generate(script, old_release, old_release=True)
        for name in names:
            result = compare(old_release / name, golden_io.GOLDEN / name)
            result.name += " by 4.x"
            results.append(result)
    return results


def load_folders(run: Runner) -> list[Comparison]:
    """The committed folders in each release that can read them."""
    results = []
    for name, old_release in (("hf-tiny-4", False), ("hf-tiny-4", True), ("hf-tiny-5", False)):
        folder = golden_io.GOLDEN / name
        logits = golden_io.GOLDEN / f"{name}.logits.safetensors"
        done = run("check_export.py", folder, logits, "--json", old_release=old_release)
        result = Comparison(f"{name} loaded by {'4.x' if old_release else '5.x'}")
        try:
            checks = json.loads(done.stdout.splitlines()[-1])["checks"]
        except (IndexError, ValueError, KeyError):
            result.problems.append(f"check_export.py broke: {done.stderr[-1000:]}")
        else:
            for check, outcome in checks.items():
                result.values += 1
                if not outcome["passed"]:
                    result.problems.append(f"{check}: {outcome['found']}")
        results.append(result)
    # 4.x does not know 5.x's `rope_parameters` and `TokenizersBackend`, and silently takes base 10000.
    print("  hf-tiny-5 under 4.x is not tried: 4.x cannot read the layout of 5.x")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="keep the new files in this folder")
    keep = parser.parse_args().keep
    run = Runner()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="oracle-") as temporary:
        work = keep or Path(temporary)
        results = compare_goldens(run, work)
        versions = golden_io.read_json(work / "5" / "logits.json")["versions"]
    results += load_folders(run)
    print(f"\n  {'file':38} {'figures':>8} {'of bound':>9}")
    for result in results:
        verdict = "ok" if not result.problems else "FAIL"
        print(f"  {result.name:38} {result.values:8} {result.used:9.2f}  {verdict}")
        for problem in result.problems[:10]:
            print(f"      {problem}")
        if len(result.problems) > 10:
            print(f"      and {len(result.problems) - 10} more")
    failed = [result.name for result in results if result.problems]
    print(
        json.dumps(
            {
                "check": "oracle",
                "passed": not failed,
                "failed": failed,
                "figures": sum(result.values for result in results),
                "seconds": round(time.monotonic() - began, 1),
                "versions": versions,
            }
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
