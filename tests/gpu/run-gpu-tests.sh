#!/usr/bin/env bash
# Runs the tests of this bundle on the first GPU: see README.md, and --help for the options.
#
#   OXITRON_TORCH=/folder   the PyTorch to run on (see torch.sh)
#
# Exit codes: 0 all passed or were skipped; 1 a test failed; 2 none was run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly name=run-gpu-tests
# shellcheck source=tests/gpu/torch.sh
. "$here/torch.sh"

device=cuda
for option in "$@"; do
    case $option in
    -h | --help) exec python3 -B "$here/run_tests.py" --help ;;
    --cpu) device=cpu ;;
    esac
done
use_torch $device
exec "$python" -B "$here/run_tests.py" "$@"
