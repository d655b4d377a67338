#!/usr/bin/env bash
# launch/scripts/demo.sh with a stand-in for `oxitron` that leaves each command's product at once:
# a demo that is killed in a step goes on with that step, a finished one does nothing again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
fail() {
    echo "FAILED: $1"
    sed 's/^/    | /' "$work/out"
    failures=$((failures + 1))
}

mkdir -p "$work/bin" "$work/clone/launch/scripts" "$work/target/release"
cp "$root/launch/scripts/demo.sh" "$work/clone/launch/scripts/"
cat >"$work/bin/cargo" <<'CARGO'
#!/usr/bin/env bash
[ "$1 $2" = 'metadata --locked' ] || exit 9
echo '{"workspace_members": ["own"], "packages": [
    {"id": "own", "manifest_path": "/clone/own/Cargo.toml"},
    {"id": "b", "manifest_path": "/registry/b-1.0/Cargo.toml"},
    {"id": "a", "manifest_path": "/registry/a-2.0/Cargo.toml"}]}'
CARGO
cat >"$work/target/release/oxitron" <<'OXITRON'
#!/usr/bin/env bash
echo "$1${2:+ $2}" >>"$LOG"
[ "${KILLED_IN:-none}" != "$1 $2" ] || exit 75
case "$1 $2" in
'data train-tokenizer') touch runs/demo/tokenizer.json ;;
'data tokenize') mkdir runs/demo/data ;;
launch\ *) echo '{"event":"stop","step":46,"reason":"finished","detail":null}' >>runs/demo/events.jsonl ;;
'convert to-hf') mkdir runs/demo/hf && touch runs/demo/hf/config.json ;;
generate\ *) echo 'a sample' ;;
report\ *) echo 'the table' ;;
*) exit 9 ;;
esac
OXITRON
chmod +x "$work/bin/cargo" "$work/target/release/oxitron"

# Runs the demo; what it ran of `oxitron` goes to $ran, one command per line.
demo() {
    : >"$work/log"
    status=0
    env LOG="$work/log" PATH="$work/bin:$PATH" CARGO_TARGET_DIR="$work/target" "$@" \
        bash "$work/clone/launch/scripts/demo.sh" >"$work/out" 2>&1 || status=$?
    ran=$(paste -sd, "$work/log")
}
expect() {
    [ "$status" = "$2" ] || fail "$1: exit code $status, wanted $2"
    [ "$ran" = "$3" ] || fail "$1: ran $ran, wanted $3"
}

config=configs/pretrain/demo.toml
rest="launch $config,convert to-hf,generate runs/demo/hf,report runs/demo"
demo KILLED_IN='data tokenize'
expect "killed while tokenising" 75 "data train-tokenizer,data tokenize"
grep -q 'make demo goes on where it was' "$work/out" || fail "does not say how to go on"
[ "$(paste -sd, "$work/clone/runs/demo/corpus.txt")" = /registry/a-2.0,/registry/b-1.0 ] ||
    fail "the corpus is not the crates but for our own, by name"
demo KILLED_IN="launch $config"
expect "killed while training" 75 "data tokenize,launch $config"
demo
expect "taken up again" 0 "$rest"
demo
expect "finished" 0 "report runs/demo"
grep -q 'the table' "$work/out" && grep -q 'a sample' "$work/out" || fail "shows no results"

[ $failures = 0 ] || exit 1
echo "demo_test: a killed demo goes on, a finished one shows its results"
