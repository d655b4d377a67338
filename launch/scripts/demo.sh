#!/usr/bin/env bash
# The main job from end to end, on text that every machine with this clone has: the sources and
# documentation of the crates in Cargo.lock. Run by `make demo` after the build.
#
# Every step leaves a product that appears only when it is whole, and a step whose product is there
# is not done again: a demo that was killed goes on where it was, a finished one shows its results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly run=runs/demo
readonly oxitron=${CARGO_TARGET_DIR:-target}/release/oxitron

trap '[ $? = 0 ] || printf "\ndemo: stopped before the end; make demo goes on where it was\n" >&2' EXIT

# step WORDS DONE COMMAND…: runs COMMAND unless the command DONE says that its product is there.
step() {
    local words=$1 is_done=$2 started=$SECONDS
    shift 2
    if $is_done; then
        printf '▸ %s: done before\n' "$words"
        return
    fi
    printf '\n▸ %s\n  $ %s\n' "$words" "$*"
    "$@"
    printf '  %s: %d s\n' "$words" $((SECONDS - started))
}

# The folders of all crates but our own that a build on x86-64 Linux uses: the same list on every
# machine, and fetched already by the build.
list_corpus() {
    cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu |
        python3 -c '
import json, os, sys
metadata = json.load(sys.stdin)
ours = set(metadata["workspace_members"])
folders = [os.path.dirname(p["manifest_path"]) for p in metadata["packages"] if p["id"] not in ours]
print(*sorted(folders, key=os.path.basename), sep="\n")' >"$run/corpus.txt.new"
    mv "$run/corpus.txt.new" "$run/corpus.txt"
    printf '  %d crates, listed in %s\n' "$(wc -l <"$run/corpus.txt")" "$run/corpus.txt"
}

trained() { grep -qs '"reason":"finished"' "$run/events.jsonl"; }

write_sample() {
    "$oxitron" generate "$run/hf" --prompt "/// Returns the number of" >"$run/sample.txt.new"
    mv "$run/sample.txt.new" "$run/sample.txt"
}

# Small text files, and no crate with more than a twentieth of the whole.
readonly corpus=(--input-list "$run/corpus.txt" --format text --extensions rs,md,toml,c,h,txt
    --max-file-bytes 400000 --max-tree-share 0.05)

mkdir -p "$run"
step "list the corpus, the crates of Cargo.lock" "test -e $run/corpus.txt" \
    list_corpus
step "train a tokenizer" "test -e $run/tokenizer.json" \
    "$oxitron" data train-tokenizer "${corpus[@]}" --vocab-size 8192 --sample-bytes 30000000 \
    --out "$run"
step "tokenise" "test -e $run/data" \
    "$oxitron" data tokenize "${corpus[@]}" --tokenizer "$run/tokenizer.json" \
    --row-group-tokens 65536 --out "$run/data"
step "train on 2 ranks, from 4k to 32k tokens of context" trained \
    "$oxitron" launch configs/pretrain/demo.toml --ranks 2
step "export to the Hugging Face format" "test -e $run/hf/config.json" \
    "$oxitron" convert to-hf "$run" "$run/hf"
step "write a sample" "test -e $run/sample.txt" \
    write_sample

printf '\n▸ results\n\n'
"$oxitron" report "$run"
printf '\nA sample of the model:\n\n%s\n' "$(sed 's/^/    /' "$run/sample.txt")"
printf '\nEverything lies in %s:\n' "$run"
printf '    %-15s %s\n' \
    report.html 'curves and tables; open it in a browser' \
    hf/ 'the model for transformers: AutoModelForCausalLM.from_pretrained' \
    checkpoints/ 'the training state; goes on from here on any number of ranks' \
    metrics.jsonl 'one line per step; tensorboard/ shows the same' \
    logs/ 'what each rank said'
