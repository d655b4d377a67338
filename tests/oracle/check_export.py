"""Loads an exported model folder in the running transformers and compares its answers.

    check_export.py [--json] EXPORT_DIR LOGITS.safetensors [EXPORT_DIR LOGITS.safetensors …]

LOGITS.safetensors holds `tokens` (integers [rows, seq] or [seq]) and the `logits` wanted (f32
[rows, seq, vocab] or [seq, vocab]), optionally `positions` shaped like `tokens`, for rows
packed from several documents. transformers computes in fp32 from the folder's weights, so an
export to bf16 must come with the logits of the rounded weights.

Checked: no tensor is missing or left over; logits differ by at most 1e-4 * max(1, std); the
tokenizer loads, fits the vocabulary, agrees with tokenizer.json and gives texts back unchanged;
generate runs and its first token is the arg-max of the logits. One line of JSON per folder; exit
code 0 when all hold, else 1.
"""

import argparse
import json
import sys
from pathlib import Path

import models  # first: it sets one thread and offline mode
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_hf_model

TEXTS = [text for text in make_hf_model.TEXTS if make_hf_model.END_OF_TEXT not in text] + [
    "fn main() {\n    println!(\"{}\", 1 + 1);\n}\n",
    " leading, trailing \r\n and\tinner  space ",
]


class Report:
    """Collects one line per check and prints it at once."""

    def __init__(self, quiet: bool) -> None:
        self.lines: list[tuple[str, bool, str]] = []
        self.quiet = quiet
        self.largest_difference: float | None = None  # of the logits

    def add(self, name: str, passed: bool, found: str) -> None:
        self.lines.append((name, bool(passed), found))
        if not self.quiet:
            print(f"  {'ok  ' if passed else 'FAIL'} {name:18} {found}")

    def passed(self) -> bool:
        return all(passed for _, passed, _ in self.lines)


def check_config(folder: Path, model, report: Report) -> None:
    raw = json.loads((folder / "config.json").read_text())
    nested = raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta", nested.get("rope_theta"))
    # The frequencies of the running model: transformers 4.x ignores keys it does not know, keeps
    # them as attributes, and computes with a base of 10000.
    inverse = model.model.rotary_emb.inv_freq.double()
    found = float(inverse[1]) ** -len(inverse)
    if raw.get("rope_scaling") or nested.get("rope_type", "default") != "default":
        report.add("rope_theta", True, f"{theta}, scaled; the logits decide")
    else:
        right = theta is not None and abs(found / theta - 1) < 1e-4
        report.add("rope_theta", right, f"config.json says {theta}, the model uses {found:.0f}")
    written = raw.get("torch_dtype") or raw.get("dtype")
    report.add("dtype", written is not None, f"config.json says {written}")


def load(folder: Path, report: Report):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    report.add("tensors", not wrong, json.dumps(wrong) if wrong else "none missing, none left over")
    return model.eval()


def check_logits(model, file: Path, report: Report) -> None:
    given = load_file(file)
    tokens = np.atleast_2d(given["tokens"]).astype(np.int64)
    ours = given["logits"].astype(np.float32).reshape(*tokens.shape, -1)
    vocabulary = model.config.vocab_size
    if ours.shape[-1] != vocabulary:
        found = f"{ours.shape[-1]} logits per token, the config says {vocabulary}"
        report.add("logits", False, found)
        return
    positions = given.get("positions")
    worst = 0.0
    for row in range(len(tokens)):
        extra = {}
        if positions is not None:
            line = np.atleast_2d(positions)[row : row + 1].astype(np.int64)
            extra["position_ids"] = torch.from_numpy(line)
        ids = torch.from_numpy(tokens[row : row + 1])
        theirs = model(input_ids=ids, use_cache=False, **extra).logits[0].numpy()
        # A NaN on either side must not pass: max() of an empty comparison would hide it.
        difference = np.abs(theirs - ours[row])
        worst = max(worst, float(difference.max())) if np.isfinite(difference).all() else np.inf
    std = float(ours.std())
    bound = 1e-4 * max(1.0, std)
    found = f"{tokens.size} tokens, largest difference {worst:.2e}, allowed {bound:.2e}, std {std:.3f}"
    report.largest_difference = worst
    report.add("logits", worst <= bound, found)


def check_tokenizer(folder: Path, model, report: Report) -> None:
    words = AutoTokenizer.from_pretrained(folder)
    report.add(
        "vocabulary",
        len(words) <= model.config.vocab_size,
        f"{len(words)} tokens, {model.config.vocab_size} rows in the embedding",
    )
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bad = []
    for text in TEXTS:
        ids = words.encode(text, add_special_tokens=False)
        if ids != plain.encode(text, add_special_tokens=False).ids:
            bad.append(f"{text!r}: other ids than tokenizer.json gives")
        back = words.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != text:
            bad.append(f"{text!r} came back as {back!r}")
    report.add("round trip", not bad, "; ".join(bad) or f"{len(TEXTS)} texts unchanged")


def check_generate(folder: Path, model, report: Report) -> None:
    words = AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor([words.encode("fn main", add_special_tokens=False)])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )
    first = int(model(prompt, use_cache=False).logits[0, -1].argmax())
    new = out[0, prompt.shape[1] :].tolist()
    report.add("generate", len(new) > 0 and new[0] == first, f"{len(new)} tokens: {new}")


@torch.no_grad()
def check(folder: Path, logits: Path, quiet: bool = False) -> Report:
    report = Report(quiet)

    def attempt(name: str, step, *arguments):
        """What raises has failed; later checks are still made."""
        try:
            return step(*arguments)
        except Exception as error:
            report.add(name, False, f"{type(error).__name__}: {error}")

    model = attempt("load", load, folder, report)
    if model is not None:
        attempt("config", check_config, folder, model, report)
        attempt("logits", check_logits, model, logits, report)
        attempt("tokenizer", check_tokenizer, folder, model, report)
        attempt("generate", check_generate, folder, model, report)
    return report


def as_json(folder: Path, report: Report) -> str:
    return json.dumps(
        {
            "check": "export",
            "folder": str(folder),
            "versions": models.versions(),
            "passed": report.passed(),
            "largest_difference": report.largest_difference,
            "checks": {name: {"passed": ok, "found": text} for name, ok, text in report.lines},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="EXPORT_DIR and LOGITS.safetensors in turn")
    parser.add_argument("--json", action="store_true", help="print only the lines of JSON")
    options = parser.parse_args()
    if len(options.paths) % 2:
        parser.error("every EXPORT_DIR needs a LOGITS.safetensors")
    passed = True
    for folder, logits in zip(options.paths[::2], options.paths[1::2]):
        if not options.json:
            print(f"{folder} in transformers {transformers.__version__}")
        report = check(folder, logits, quiet=options.json)
        print(as_json(folder, report))
        passed &= report.passed()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
