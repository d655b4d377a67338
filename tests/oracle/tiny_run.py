"""A training run of the built binary, tiny and the same on every call: two stages, one restart.

The model is given by sizes, so that `reference_llama` can answer for it.
"""

import json
import shutil
from pathlib import Path

import counter_hash
from models import Model

# What the last checkpoint must hold. Tokens are fewer than rows of the embedding, as in real runs.
# The scales of `Model` are not used: the run makes its own weights.
MODEL = Model(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_positions=128,
    rms_norm_eps=1e-6,
    rope_theta=40_000.0,
    tied=True,
    scale_embedding=0.0,
    scale_linear=0.0,
    scale_residual=0.0,
    scale_norm=0.0,
)
TOKENS = 300
STEPS = 40

CONFIG = f"""
[run]
name = "tiny"
dir = "run"
seed = 7
device = "cpu"
threads = 1

[model]
family = "llama"
vocab_size = {MODEL.vocab_size}
hidden_size = {MODEL.hidden_size}
intermediate_size = {MODEL.intermediate_size}
num_layers = {MODEL.num_layers}
num_heads = {MODEL.num_heads}
num_kv_heads = {MODEL.num_kv_heads}
head_dim = {MODEL.head_dim}
rms_norm_eps = {MODEL.rms_norm_eps!r}
tie_word_embeddings = {str(MODEL.tied).lower()}
dtype = "fp32"

[data]
tokenizer = "tokenizer/tokenizer.json"
window_tokens = 4096

[[data.source]]
name = "words"
path = "shards/*.parquet"

[validation]
fraction = 0.1
every_steps = 5
batches = 1

[optimizer]
lr = 1e-2

[checkpoint]
every_steps = 15
keep = 3

[[stage]]
name = "short"
seq_len = 64
steps = {STEPS // 2}
batch_tokens = 256

[[stage]]
name = "long"
seq_len = {MODEL.max_positions}
rope_base = {MODEL.rope_theta!r}
steps = {STEPS // 2}
batch_tokens = 256
"""

WORDS = (
    "harbour lantern the of under a river stone quiet northern carries and window seven morning "
    "turns letter garden slowly iron bridge between copper weather Grüße 世界"
).split()


def corpus() -> str:
    """240 documents of 8 to 103 words as JSON lines; one word in four is drawn, the rest follow."""
    lines, drawn = [], iter(counter_hash.bits("exports/corpus", 240 * 200).tolist())
    for _ in range(240):
        words, word = [], 0
        for _ in range(8 + next(drawn) % 96):
            draw = next(drawn)
            word = (draw >> 32) % len(WORDS) if draw % 4 == 0 else (5 * word + 17) % len(WORDS)
            words.append(WORDS[word])
        lines.append(json.dumps({"text": " ".join(words) + "."}, ensure_ascii=False) + "\n")
    return "".join(lines)


def train(oxitron, folder: Path) -> Path:
    """Trains in `folder` with `oxitron(*arguments)` and returns the run directory.

    The last checkpoint is then taken away and the run started again: it repeats its last steps, and
    its records and event files tell of two attempts.
    """
    text, tokenizer, shards = folder / "corpus.jsonl", folder / "tokenizer", folder / "shards"
    text.write_text(corpus(), encoding="utf-8")
    oxitron("data", "train-tokenizer", text, "--out", tokenizer, "--vocab-size", TOKENS)
    oxitron("data", "tokenize", text, "--tokenizer", tokenizer, "--out", shards,
            "--row-group-tokens", 2000, "--threads", 1)
    config = folder / "config.toml"
    config.write_text(CONFIG)
    oxitron("train", config)
    run = folder / "run"
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08}")
    oxitron("train", config)
    return run
