#!/usr/bin/env bash
# The main job from end to end, on text that every machine with this clone has: the sources and
# documentation of the crates in Cargo.lock. Run by `make demo` after the build.
#
# Every step leaves one product, which appears only when it is whole. A step whose product is there
# is not done again, so a demo that was killed goes on where it was, and a finished one only shows
# its results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly run=runs/demo
readonly config=configs/pretrain/demo.toml
readonly oxitron=${CARGO_TARGET_DIR:-target}/release/oxitron

# step PRODUCT WORDS COMMAND…
step() {
    local product=$1 words=$2 started=$SECONDS
    shift 2
    if [ -e "$product" ]; then
        printf '\n▸ %s: %s is there already\n' "$words" "$product"
        return
    fi
    printf '\n▸ %s\n  %s\n' "$words" "$*"
    "$@"
    printf '  took %d s: %s\n' $((SECONDS - started)) "$product"
}

# The folders of all crates that a build on x86-64 Linux uses, but for our own: the same list on
# every machine, and all of it fetched already.
list_corpus() {
    cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu |
        python3 -c '
import json, os, sys
metadata = json.load(sys.stdin)
members = set(metadata["workspace_members"])
folders = [os.path.dirname(p["manifest_path"]) for p in metadata["packages"] if p["id"] not in members]
print(*sorted(folders, key=os.path.basename), sep="\n")' >"$run/corpus.txt.new"
    mv "$run/corpus.txt.new" "$run/corpus.txt"
    printf '  %d crates\n' "$(wc -l <"$run/corpus.txt")"
}

newest_checkpoint() { find "$run/checkpoints" -name manifest.json | sort | tail -n 1 | xargs dirname; }

# Small files of source trees, no tree with more than its share: the corpus is the same everywhere.
readonly corpus=(--list "$run/corpus.txt" --max-file-bytes 400000 --max-tree-share 0.05)

mkdir -p "$run"
step "$run/corpus.txt" "List the corpus: the crates of Cargo.lock" \
    list_corpus
step "$run/tokenizer.json" "Train a tokenizer" \
    "$oxitron" data train-tokenizer "${corpus[@]}" --vocab-size 8192 --out "$run/tokenizer.json"
step "$run/tokens" "Tokenise" \
    "$oxitron" data tokenize "${corpus[@]}" --tokenizer "$run/tokenizer.json" --out "$run/tokens"
step "$run/finished" "Train on 2 ranks, from 4k to 32k tokens of context" \
    "$oxitron" launch "$config" --ranks 2
step "$run/hf/config.json" "Export to the Hugging Face format" \
    "$oxitron" convert to-hf "$(newest_checkpoint)" "$run/hf"
step "$run/sample.txt" "Write a sample" \
    "$oxitron" generate "$run/hf" --prompt "fn main() {" --max-tokens 64 --out "$run/sample.txt"

printf '\n▸ Results\n'
"$oxitron" report "$run"
printf '\nEverything lies in %s:\n' "$run"
printf '  %-16s %s\n' \
    report.html "curves and tables, open it in a browser" \
    checkpoints/ "the training state, resumable on any number of ranks" \
    hf/ "the model for transformers: AutoModelForCausalLM.from_pretrained(\"$run/hf\")" \
    sample.txt "a text that it wrote" \
    metrics.jsonl "one line per step; tensorboard/ has the same"
