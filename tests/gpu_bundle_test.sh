#!/usr/bin/env bash
# The scripts of the bundle for GPU machines (tests/gpu) with stand-ins for PyTorch, Python and the
# executables: which PyTorch they take, how outcomes are told, exit codes, and what a bundle may be;
# and the bench of whole steps with the built binary, where there is one, on the processor. Builds
# nothing, needs no GPU, takes a minute at most.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
# Not a shim, which would need more of PATH.
python=$(python3 -c 'import sys; print(sys.executable)')

# --- The pretended machine -----------------------------------------------------------------------

stub() { printf '#!%s\n%s\n' "$(command -v bash)" "$2" >"$1" && chmod +x "$1"; }

# A PyTorch of version $2 for CUDA $3 ('None' for a build for CPUs) in folder $1.
torch_at() {
    mkdir -p "$1/lib" "$1/../nvidia/cu13/lib" "$1/../nvidia/nccl/lib"
    touch "$1/lib/libtorch_cpu.so"
    [ "$3" = None ] || touch "$1/lib/libtorch_cuda.so"
    local cuda=$3
    [ "$3" = None ] || cuda="'$3'"
    printf "__version__ = '%s'\ncuda: Optional[str] = %s\n" "$2" "$cuda" >"$1/version.py"
}

# A Python that imports the PyTorch in folder $2, or none.
python_at() {
    mkdir -p "${1%/*}"
    stub "$1" "[ \"\$1\" != -c ] || { echo '${2:-}' && exit; }; exec '$python' \"\$@\""
}

# A machine with the right PyTorch, and a bundle whose tests all end in their own way.
new_machine() {
    m=$(mktemp -d "$work/machine.XXXX")
    bin=$m/bin bundle=$m/gpu-bundle log=$m/log
    mkdir -p "$bin" "$bundle/bin"
    local tool
    for tool in bash dirname env mkdir sed sleep touch; do
        ln -s "$(command -v $tool)" "$bin/$tool"
    done
    stub "$bin/c++" ''
    torch_at "$m/site/torch" 2.11.0+cu130 13.0
    python_at "$bin/python3" "$m/site/torch"
    cp "$root"/tests/gpu/{run-gpu-tests.sh,run-gpu-bench.sh,run_tests.py,torch.sh} "$bundle/"
    echo 'oxitron, commit 1234' >"$bundle/VERSION"
    printf '# ops\nkernels-tests ops::\nkernels-tests cuda:: # libraries\ntrainer-tests a\n' \
        >"$bundle/tests.txt"
    : >"$log"
    stub "$bundle/bin/oxitron" "
        echo \"oxitron \$* with \$LD_LIBRARY_PATH\" >>'$log'
        echo '  ok       processor  4 cores'
        [ \"\$3\" = cpu ] || [ ! -e '$m/no-gpu' ] ||
            { echo '  missing  NVIDIA driver  NVIDIA driver is missing: no'; exit 1; }"
    stub "$bundle/bin/kernels-tests" "$(kernels_tests ops::passes ops::skips cuda::loads)"
    stub "$bundle/bin/trainer-tests" "$(kernels_tests a::passes other::passes)"
    stub "$bundle/bin/gpu-bench" "
        echo \"gpu-bench \$* with \$LD_LIBRARY_PATH\" >>'$log'
        echo 'a table' && exit \"\${BENCH:-0}\""
    whole
}

# The text of an executable with these tests. What they print is what Rust's test harness prints.
kernels_tests() {
    cat <<TESTS
if [ "\$1" = --list ]; then printf '%s: test\n' $* && exit; fi
echo "\$2 on \${OXITRON_TEST_DEVICE:-cpu}" >>'$log'
result() {
    printf '\ntest result: ok. %d passed; 0 failed; %d ignored; ' \$1 \$2
    printf '0 measured; 7 filtered out; finished in 0.00s\n'
}
printf '\nrunning 1 test\ntest %s ... ' "\$2"
case \$2 in
*::skips) echo 'skipped: it is Sunday' && result 1 0 ;;
*::is_ignored) echo 'ignored' && result 0 1 ;;
*::is_not_there) result 0 0 ;;
*::is_silent) ;;
*::fails) echo 'relative error 3.1e-1 above 1e-5' && exit 101 ;;
*::crashes) kill -SEGV \$\$ ;;
*::hangs) echo \$\$ >'$m/hangs' && echo 'begins' && sleep 60 ;;
*) echo ok && result 1 0 ;;
esac
TESTS
}

# Another set of tests in the kernels' executable, all of them wanted.
with_tests() {
    stub "$bundle/bin/kernels-tests" "$(kernels_tests "$@")"
    echo 'kernels-tests o' >"$bundle/tests.txt"
    whole
}

# Makes the bundle whole again after a change.
whole() {
    PYTHONPATH=$root/tests/gpu "$python" -B -c '
import sys, pathlib, make_bundle
make_bundle.write_manifest(pathlib.Path(sys.argv[1]), {})' "$bundle"
}

# Runs a script of the bundle in folder $m; its words go to $m/out, its status to $status.
run_with() {
    local script=$1 variables=()
    shift
    while [[ ${1:-} = *=* ]]; do variables+=("$1") && shift; done
    status=0
    (cd "$m" && exec env -i PATH="$bin" HOME="$m" "${variables[@]}" \
        bash "$bundle/$script" "$@") >"$m/out" 2>&1 || status=$?
}
tests() { run_with run-gpu-tests.sh "$@"; }
bench() { run_with run-gpu-bench.sh "$@"; }

# --- What is asked of it -------------------------------------------------------------------------

fail() {
    echo "FAILED: $scenario: $1"
    sed 's/^/    | /' "$m/out"
    failures=$((failures + 1))
}
scenario() { scenario=$1 && new_machine; }
ends() { [ "$status" = "$1" ] || fail "exit code $status, wanted $1"; }
says() { grep -qF -- "$1" "$m/out" || fail "does not say: $1"; }
ran() { grep -qF -- "$1" "$log" || fail "did not run: $1"; }
never_ran() { ! grep -qF -- "$1" "$log" || fail "should not have run: $1"; }
# What the file of results has at a Python expression over `results` and `by_name`.
written() {
    local found
    found=$("$python" -c '
import json, sys
results = json.load(open(sys.argv[1]))
by_name = {test["name"]: test for test in results["tests"]}
print(eval(sys.argv[2]))' "$bundle/results/tests.json" "$1" 2>&1 | tail -n 1) || true
    [ "$found" = "$2" ] || fail "results: $1 is $found, wanted $2"
}

scenario "the right PyTorch: every test of the list on the GPU, one process each"
tests LD_LIBRARY_PATH=/own; ends 0
libraries="$m/site/torch/lib:$m/site/nvidia/cu13/lib:$m/site/nvidia/nccl/lib:/own"
ran "oxitron doctor --device cuda with $libraries"
for name in ops::passes ops::skips cuda::loads a::passes; do ran "$name on cuda"; done
never_ran other::passes
says "4 tests in"
says "3 PASS, 1 SKIP; $bundle/results/tests.json"
says "ops::skips  (it is Sunday)"
written 'results["totals"]' "{'PASS': 3, 'FAIL': 0, 'SKIP': 1, 'not run': 0}"
written 'results["version"], results["device"], len(results["doctor"])' \
    "('oxitron, commit 1234', 'cuda', 1)"
written 'by_name["ops::skips"]["outcome"], by_name["ops::skips"]["reason"]' \
    "('SKIP', 'it is Sunday')"
written 'by_name["a::passes"]["executable"]' trainer-tests

scenario "tests that fail, each in its own way"
with_tests ops::fails ops::crashes ops::hangs ops::is_silent ops::is_not_there ops::is_ignored \
    ops::passes
tests --time-limit 0.5; ends 1
outcomes='[by_name["ops::" + name]["outcome"] for name in ("passes", "is_ignored")]'
written "$outcomes" "['PASS', 'SKIP']"
written 'results["totals"]["FAIL"]' 5
written 'by_name["ops::fails"]["reason"]' 'exit code 101'
written 'by_name["ops::fails"]["output"][-1]' 'test ops::fails ... relative error 3.1e-1 above 1e-5'
written 'by_name["ops::crashes"]["reason"]' 'ended by SIGSEGV'
written 'by_name["ops::hangs"]["reason"]' 'was not done after 0.5 s'
written 'by_name["ops::hangs"]["output"][-1]' 'test ops::hangs ... begins'
written 'by_name["ops::is_silent"]["reason"]' 'exit code 0 without a result'
written 'by_name["ops::is_not_there"]["reason"]' 'there is no such test'
! kill -0 "$(cat "$m/hangs")" 2>/dev/null || fail "a test that hangs is still there"

scenario "one part, several at a time, elsewhere"
tests --filter ops:: --jobs 2 --results "$m/elsewhere"; ends 0
never_ran cuda::loads
[ -s "$m/elsewhere/tests.json" ] || fail "no results where they were wanted"
tests --filter nothing; ends 2
says "no test has 'nothing' in its name"

scenario "a run that is ended ends its test and keeps what it knows"
with_tests o::passes o::hangs o::never
(cd "$m" && exec env -i PATH="$bin" HOME="$m" bash "$bundle/run-gpu-tests.sh") >"$m/out" 2>&1 &
started=$!
while [ ! -s "$m/hangs" ]; do sleep 0.05; done
kill -TERM $started
wait $started && fail "exit code 0" || status=$?
ends 143
! kill -0 "$(cat "$m/hangs")" 2>/dev/null || fail "the test is still there"
never_ran o::never
written 'results["totals"]' "{'PASS': 1, 'FAIL': 0, 'SKIP': 0, 'not run': 2}"

scenario "GPUs that cannot be used: what is missing, and no test"
touch "$m/no-gpu"
tests; ends 2
says "NVIDIA driver is missing"
says "no test was run, because the GPUs of this machine cannot be used"
never_ran ops::passes

scenario "on the processor: no GPU, and no PyTorch for CUDA"
touch "$m/no-gpu"
torch_at "$m/cpu/torch" 2.11.0+cpu None
tests OXITRON_TORCH="$m/cpu/torch" OXITRON_TEST_DEVICE=cuda --cpu; ends 0
ran "oxitron doctor --device cpu"
ran "ops::passes on cpu"
written 'results["device"]' cpu
rm "$bin/c++"
tests --cpu; ends 2
says "there is no c++"

scenario "executables that this machine cannot load"
stub "$bundle/bin/oxitron" "echo \"version 'GLIBC_9.99' not found\"; exit 127"
whole
tests; ends 2
says "GLIBC_9.99"
says "oxitron doctor does not run here (127)"

scenario "which PyTorch is taken"
python_at "$m/other/bin/python"
torch_at "$m/old/torch" 2.9.1+cu128 12.8
python_at "$m/venv/bin/python" "$m/old/torch"
tests VIRTUAL_ENV="$m/other"; ends 0
says "run-gpu-tests: libtorch of $m/site/torch"
torch_at "$m/own/torch" 2.11.0+cu130 13.0
tests OXITRON_TORCH="$m/own/torch"; ends 0
says "run-gpu-tests: libtorch of $m/own/torch"
python_at "$bin/python3"
tests VIRTUAL_ENV="$m/other"; ends 2
says "no PyTorch 2.11.0 of CUDA 13 was found"
says "$m/other/bin/python has no PyTorch"
says "./venv/bin/python has one that is version 2.9.1+cu128, and 2.11.0 is needed"
says "python3 has no PyTorch"
python_at "$m/venv/bin/python" "$m/own/torch"
tests; ends 0
says "run-gpu-tests: libtorch of $m/own/torch"

scenario "a PyTorch that will not do"
torch_at "$m/a/torch" 2.10.0+cu130 13.0
tests OXITRON_TORCH="$m/a/torch"; ends 2
says "is version 2.10.0+cu130, and 2.11.0 is needed"
torch_at "$m/b/torch" 2.11.0+cpu None
tests OXITRON_TORCH="$m/b/torch"; ends 2
says "is a build for CPUs alone, and one for CUDA 13 is needed"
torch_at "$m/c/torch" 2.11.0+cu128 12.8
tests OXITRON_TORCH="$m/c/torch"; ends 2
says "is a build for CUDA 12.8, and one for CUDA 13 is needed"
tests OXITRON_TORCH="$m/none"; ends 2
says "OXITRON_TORCH=$m/none holds no lib/libtorch_cpu.so"
never_ran oxitron

scenario "a bundle that is not whole, and a list that does not fit"
echo 'cut short' >"$bundle/bin/trainer-tests"
tests; ends 2
says "bin/trainer-tests is not as it was made"
never_ran oxitron
new_machine
echo 'kernels-tests gone::' >>"$bundle/tests.txt"
tests; ends 2
says "tests.txt: no test of kernels-tests begins with gone::"

scenario "under the sanitizer"
tests --sanitize; ends 2
says "--sanitize: compute-sanitizer is neither on the PATH nor"
never_ran ops::passes
stub "$bin/compute-sanitizer" "
    echo \"\$* with caching \$PYTORCH_NO_CUDA_MEMORY_CACHING\" >>'$log'
    [ \"\$2\" != racecheck ] || exit 86
    shift 4; exec \"\$@\""
tests --sanitize; ends 1
ran "--tool memcheck --error-exitcode 86 $bundle/bin/kernels-tests --exact ops::passes"
ran "--nocapture with caching 1"
never_ran cuda::loads
never_ran a::passes
says "racecheck kernels-tests ops::passes  (the sanitizer has found errors)"
written 'results["totals"]' "{'PASS': 1, 'FAIL': 2, 'SKIP': 1, 'not run': 0}"

scenario "the bench: options go to it, its exit code comes back"
bench kernels --quick --filter norm; ends 0
says "a table"
ran "gpu-bench --json $bundle/results/bench.json --quick --filter norm with $m/site/torch/lib:"
bench BENCH=1 kernels; ends 1
bench BENCH=2 OXITRON_TORCH="$m/none" kernels; ends 2
says "run-gpu-bench: OXITRON_TORCH=$m/none"

# A bundle whose Oxitron and PyTorch tell figures and compute nothing: the largest model does not
# fit, eager PyTorch fits only if it computes blocks again.
with_steps() {
    PYTHONPATH=$root/tests/gpu "$python" -B -c '
import sys, pathlib, make_bundle
make_bundle.put_scripts(pathlib.Path(sys.argv[1]))' "$bundle"
    cat >"$bundle/bin/oxitron" <<OXITRON
#!$python -B
import json, re, sys
from pathlib import Path
sys.path.insert(0, "$bundle")
import step_cases
command, arguments = sys.argv[1], sys.argv[2:]
open("$log", "a").write(f"oxitron {' '.join(sys.argv[1:])}\n")
if command == "plan":
    print(json.dumps({"stages": [{"device_bytes": 10**9}]}))
if command == "data":
    Path(arguments[-1]).mkdir()
if command == "train":
    config = Path(arguments[0])
    of = lambda key: int(re.search(rf"^{key} = (\d+)$", config.read_text(), re.M)[1])
    case = next(
        case for case in step_cases.CASES.values()
        if case.model.hidden_size == of("hidden_size") and case.seq_len == of("seq_len")
    )
    if case.model.hidden_size == 4096:
        sys.exit("RuntimeError: CUDA out of memory. Tried to allocate 1 GiB\nand more words")
    flops = step_cases.flops(case, case.again)
    seconds = flops.full / 0.55 / 989e12
    share = 1 / seconds / 989e12
    record = {
        "loss": 10.0, "grad_norm": 1.0, "step_seconds": seconds, "peak_bytes": 2 * 10**9,
        "mfu": flops.causal * share, "mfu_full": flops.full * share, "hfu": flops.hardware * share,
    }
    run = config.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text((json.dumps(record) + "\n") * of("steps"))
OXITRON
    cat >"$bundle/peers/device_peer.py" <<PEER
import json, sys
sys.path.insert(0, "$bundle")
import step_cases
arguments = sys.argv[1:]
if "--compile" not in arguments and "--recompute" not in arguments:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory.")
sizes = json.loads(arguments[arguments.index("--model") + 1])
case = step_cases.CASES["1.3B at 4096"]
assert sizes == case.model.sizes(), sizes
seconds = step_cases.flops(case, step_cases.Again.NOTHING).full / 0.55 / 989e12 * 1.25
print(json.dumps({
    "parameters": case.model.parameters, "step_seconds": [seconds] * 3, "peak_bytes": 3 * 10**9,
    "first_loss": 10.0, "last_loss": 9.9,
}))
PEER
}
# What the file of figures has at a Python expression over `steps`, `bars` and `rows`.
measured() {
    local found
    found=$("$python" -c '
import json, sys
steps = json.load(open(sys.argv[1]))
bars = {bar["name"]: (bar["found"], bar["pass"]) for bar in steps["bars"]}
rows = {(row["case"], row["side"]): row for row in steps["rows"]}
print(eval(sys.argv[2]))' "$bundle/results/steps.json" "$1" 2>&1 | tail -n 1) || true
    [ "$found" = "$2" ] || fail "figures: $1 is $found, wanted $2"
}

scenario "whole steps: a row for each side, what fails is a row too, bars are judged"
with_steps
bench steps --only "1.3B at 4096" "7B at 4096"; ends 1
ran "--set run.device=cuda"
ran "--set checkpoint.at_end=false"
ran "--set run.deterministic=true"
says "out of memory"
measured 'len(rows), round(steps["peak_tflops"])' '(7, 989)'
measured 'round(bars["1.3B at 4096: MFU, full attention"][0], 6)' 0.55
measured 'round(bars["1.3B at 4096: tokens/s over torch.compile"][0], 6)' 1.25
measured '[held for _, held in bars.values()]' '[True, True, False, None, True]'
measured 'rows["7B at 4096", "Oxitron"]["outcome"]' 'out of memory'
measured 'rows["1.3B at 4096", "eager"]["note"]' 'blocks computed again'
measured 'round(rows["1.3B at 4096", "torch.compile"]["mfu_full"], 6)' 0.44
[ -s "$bundle/results/steps/7B-at-4096-Oxitron.txt" ] || fail "what the failed run said is gone"

scenario "whole steps: what the minutes do not suffice for is said"
with_steps
bench steps --minutes 0.01; ends 2
says "not run: the time was up"
measured '{held for _, held in bars.values()}' '{None}'

scenario "whole steps: no GPU, and options that there are not"
with_steps
stub "$bundle/bin/oxitron" "echo '  missing  NVIDIA driver'; exit 1"
bench steps; ends 2
says "missing  NVIDIA driver"
bench --only "1.3B at 4096"; ends 2
says "there is no option --only for all at once"
bench --help; ends 0
says "run-gpu-bench.sh steps"

scenario "what a bundle may be"
: >"$m/out"
PYTHONPATH=$root/tests/gpu "$python" -B - >"$m/out" 2>&1 <<'PYTHON' || fail "see below"
import json
from pathlib import Path

import make_bundle


def refused(words, call, *arguments):
    try:
        call(*arguments)
    except make_bundle.CannotMake as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"was not refused: {words}")


files = [{"path": "a", "bytes": 7}, {"path": "b", "bytes": 35}]
assert make_bundle.check_size(files, 42) == 42
too_many = "42 bytes, and at most 41 are allowed; the largest file is b with 35"
refused(too_many, make_bundle.check_size, files, 41)

report = """\
 0x0000000000000001 (NEEDED)             Shared library: [libtorch_cpu.so]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
  000: Name: GLIBC_2.9  Flags: none
  010: Name: GLIBC_2.34  Flags: none
  020: Name: GLIBCXX_3.4.29  Flags: none
"""
needs = make_bundle.read_needs(report)
assert needs.libraries == ["libc.so.6", "libtorch_cpu.so"], needs
assert needs.versions == {"GLIBC": "2.34", "GLIBCXX": "3.4.29"}, needs
make_bundle.refuse_strange("oxitron", needs)
with_mpi = make_bundle.read_needs(report.replace("libc.so.6", "libmpi.so.40"))
refused("oxitron needs libmpi.so.40", make_bundle.refuse_strange, "oxitron", with_mpi)

messages = [
    {"reason": "compiler-artifact", "target": {"name": "oxitron_kernels"}, "executable": None},
    {"reason": "compiler-artifact", "target": {"name": "gpu"}, "executable": "/target/gpu-1"},
    {"reason": "build-finished", "success": True},
]
found = make_bundle.executables("\n".join(map(json.dumps, messages)))
assert found == {"gpu": Path("/target/gpu-1")}, found

import tempfile
import bench_steps, runs

with tempfile.TemporaryDirectory() as folder:
    try:
        runs.run_to_end(["sleep", "60"], Path(folder) / "output", limit_seconds=0.3)
    except runs.RunFailed as error:
        assert bench_steps.reason(str(error)) == "not done in time", error
    else:
        raise AssertionError("was not ended")
PYTHON

# --- The scripts with the built binary, on the processor ------------------------------------------

built=${CARGO_TARGET_DIR:-$root/target}/release/oxitron
scenario "whole steps of the built binary, on the processor"
if [ ! -x "$built" ]; then
    echo "skipped: $scenario: there is no $built"
else
    status=0
    "$python" -B "$root/tests/gpu/bench_steps.py" --smoke --without-peers --binary "$built" \
        --results "$bundle/results" >"$m/out" 2>&1 || status=$?
    ends 0
    measured '[row["outcome"] for row in steps["rows"] if row["side"].startswith("Oxitron")]' \
        "['ok', 'ok', 'ok', 'ok']"
    measured 'bars["1.3B at 4096: the same bits twice, if deterministic"][0]' 1.0
    scenario "cases of the bench fit into an H200, by the plan"
    status=0
    "$python" -B "$root/tests/gpu/bench_steps.py" --plan --without-peers --binary "$built" \
        >"$m/out" 2>&1 || status=$?
    ends 0
fi

[ $failures = 0 ] || { echo "gpu_bundle_test: $failures checks failed"; exit 1; }
echo "gpu_bundle_test: all scenarios passed"
