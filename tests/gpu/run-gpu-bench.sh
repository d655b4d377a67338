#!/usr/bin/env bash
# Measures the kernels of this bundle on the first GPU; figures go to results/bench.json, further
# options to the bench (--help lists them).
#
#   OXITRON_TORCH=/folder   the PyTorch to run on (see torch.sh)
#
# Exit codes: 0 measured; 1 a bar was missed; 2 nothing was measured.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly name=run-gpu-bench
# shellcheck source=tests/gpu/torch.sh
. "$here/torch.sh"

device=cuda
for option in "$@"; do
    case $option in
    -h | --help | --emulated) device=cpu ;; # neither asks for a GPU
    esac
done
use_torch $device
mkdir -p "$here/results" || die "cannot write $here: copy the bundle to a folder that you own"
exec "$here/bin/gpu-bench" --json "$here/results/bench.json" "$@"
