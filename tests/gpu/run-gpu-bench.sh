#!/usr/bin/env bash
# Measures on the first GPU. Figures go to results/.
#
#   run-gpu-bench.sh [--quick]            kernels, then whole steps
#   run-gpu-bench.sh kernels [options]    each kernel beside a copy and a product: bench.json
#   run-gpu-bench.sh steps [options]      whole training steps beside PyTorch: steps.json
#   run-gpu-bench.sh losses [options]     losses on the processor and on the GPU: losses.json
#   run-gpu-bench.sh --smoke              all of it on the processor, small: tries the scripts
#
#   OXITRON_TORCH=/folder   the PyTorch to run on (see torch.sh)
#
# `kernels --help` and the like list options. Exit codes: 0 measured; 1 a bar was missed; 2 nothing
# was measured.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly name=run-gpu-bench
# shellcheck source=tests/gpu/torch.sh
. "$here/torch.sh"

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '$d'; }

what=all
case ${1:-} in
kernels | steps | losses) what=$1 && shift ;;
-h | --help) usage && exit 0 ;;
esac
quick=() smoke=no device=cuda
for option in "$@"; do
    case $option in
    -h | --help | --emulated | --plan) device=cpu ;; # none asks for a GPU
    --smoke) device=cpu smoke=yes ;;
    --quick) quick=(--quick) ;;
    *) [ "$what" != all ] || die "there is no option $option for all at once: see --help" ;;
    esac
done
use_torch $device
mkdir -p "$here/results" || die "cannot write $here: copy the bundle to a folder that you own"
# The peers import the same PyTorch whose libraries Oxitron loads.
export PYTHONPATH="${torch%/*}${PYTHONPATH:+:$PYTHONPATH}"

kernels() { "$here/bin/gpu-bench" --json "$here/results/bench.json" "$@"; }
steps() { "$python" -B "$here/bench_steps.py" "$@"; }
losses() { "$python" -B "$here/demo_losses.py" "$@"; }

if [ $what != all ]; then
    $what "$@"
    exit
fi
# The worst of several exit codes: a bar missed before nothing measured.
worst=0
one() {
    local status=0
    printf '\n=== %s\n' "$1"
    "$@" || status=$?
    [ $status = 0 ] || [ $worst = 1 ] || worst=$status
}
if [ $smoke = yes ]; then
    one kernels --emulated
    one steps --smoke
    one losses --smoke
else
    one kernels ${quick[@]+"${quick[@]}"}
    one steps ${quick[@]+"${quick[@]}"}
fi
exit $worst
