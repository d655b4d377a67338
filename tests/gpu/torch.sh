# Finds the PyTorch whose libtorch the executables run on; sourced by the scripts beside it, which
# say who they are in $name.
#
#   OXITRON_TORCH=/folder   the folder of an installation (…/site-packages/torch)
#
# Without it: the first that will do of those that the Python of $VIRTUAL_ENV, of ./venv, of ./.venv
# and python3 would import.
# shellcheck shell=bash

readonly torch_version=2.11.0 # the one that the executables were built with
readonly cuda_version=13      # the one whose compiler and driver they call

die() {
    printf '%s: %s\n' "$name" "$1" >&2
    shift
    [ $# = 0 ] || printf '    %s\n' "$@" >&2
    exit 2
}

# Why the PyTorch in folder $1 will not do for device $2 (cpu | cuda); nothing where it will. What
# it is stands in a file of its own: importing it would take seconds, and load all of CUDA.
why_not() {
    local facts=$1/version.py version cuda
    [ -e "$1/lib/libtorch_cpu.so" ] || { echo "holds no lib/libtorch_cpu.so" && return; }
    [ -r "$facts" ] || { echo "holds no version.py" && return; }
    version=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" "$facts")
    [ "${version%%+*}" = $torch_version ] ||
        { echo "is version ${version:-unknown}, and $torch_version is needed" && return; }
    [ "$2" = cuda ] || return 0
    cuda=$(sed -n "s/^cuda\(: .*\)\{0,1\} = '\(.*\)'/\2/p" "$facts")
    [ -n "$cuda" ] && [ -e "$1/lib/libtorch_cuda.so" ] ||
        { echo "is a build for CPUs alone, and one for CUDA $cuda_version is needed" && return; }
    [ "${cuda%%.*}" = $cuda_version ] ||
        echo "is a build for CUDA $cuda, and one for CUDA $cuda_version is needed"
}

# The folder of the PyTorch that Python $1 would import, or nothing.
torch_of() {
    "$1" -c '
from importlib.util import find_spec
found = find_spec("torch")
print(*(found.submodule_search_locations or ())[:1] if found else ())' 2>/dev/null || true
}

# Sets $torch, the folder, and $python, a Python that runs the scripts.
find_torch() {
    local device=$1 reason candidate tried=()
    python=python3
    if [ -n "${OXITRON_TORCH:-}" ]; then
        reason=$(why_not "$OXITRON_TORCH" "$device")
        [ -z "$reason" ] || die "OXITRON_TORCH=$OXITRON_TORCH $reason"
        torch=$(cd "$OXITRON_TORCH" && pwd)
        return
    fi
    for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ./venv/bin/python \
        ./.venv/bin/python python3; do
        command -v "$candidate" >/dev/null || continue
        torch=$(torch_of "$candidate")
        if [ -z "$torch" ]; then
            tried+=("$candidate has no PyTorch")
            continue
        fi
        reason=$(why_not "$torch" "$device")
        if [ -z "$reason" ]; then
            python=$candidate
            return
        fi
        tried+=("$candidate has one that $reason ($torch)")
    done
    die "no PyTorch $torch_version of CUDA $cuda_version was found" \
        ${tried[@]+"${tried[@]}"} \
        "set OXITRON_TORCH to the folder of one (…/site-packages/torch)"
}

# Finds a PyTorch for device $1 and lets the executables load its libraries, and those of NVIDIA's
# packages beside it. The run-time path in the executables is that of the machine that built them;
# these folders go before it, and before what the loader was told of already.
use_torch() {
    local folder path
    find_torch "$1"
    path=$torch/lib
    for folder in "${torch%/*}"/nvidia/*/lib; do
        [ ! -d "$folder" ] || path+=:$folder
    done
    export LD_LIBRARY_PATH="$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    printf '%s: libtorch of %s\n' "$name" "$torch"
}
