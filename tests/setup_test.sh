#!/usr/bin/env bash
# Runs launch/scripts/setup.sh in a copy of the clone on a pretended machine: PATH holds a few real
# tools and stubs of those that set-up asks (apt-get, dpkg-query, pip, id, sudo, cargo).
# No network, no root, about two seconds.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# --- The pretended machine -----------------------------------------------------------------------

stub() { printf '#!%s\n%s\n' "$(command -v bash)" "$2" >"$bin/$1" && chmod +x "$bin/$1"; }

# A fresh machine: all tools, no MPI, no libclang, no libtorch, user is root, network works.
new_machine() {
    m=$(mktemp -d "$work/machine.XXXX")
    bin=$m/bin home=$m/home clone=$m/clone
    mkdir -p "$bin" "$home" "$clone/launch/scripts"
    cp "$root/launch/scripts/setup.sh" "$clone/launch/scripts/"
    cp "$root/Cargo.toml" "$clone/"
    local tool
    for tool in bash cat cut dirname env flock grep head mkdir mv rm sed sort touch uname; do
        ln -s "$(command -v $tool)" "$bin/$tool"
    done
    : >"$m/installed" && : >"$m/log"
    stub cargo 'echo "cargo 1.95.0 (stub)"'
    stub c++ ''
    stub make ''
    stub id 'echo 0'
    stub sudo 'exit 1'
    stub dpkg-query "grep -qx \"\${@: -1}\" '$m/installed' && echo installed"
    stub apt-get "
        echo \"apt-get \$*\" >>'$m/log'
        [ ! -e '$m/offline' ] || exit 100
        [ \"\$1\" = update ] || for p; do echo \"\$p\" >>'$m/installed'; done"
    # pip: refuses without network unless it is told of local wheels; otherwise lays out a libtorch.
    stub python3 "
        [ \"\$2 \$3\" = 'pip --version' ] && exit 0
        echo \"python3 \$*\" >>'$m/log'
        case \" \$* \" in *' --no-index '*) ;; *) [ ! -e '$m/offline' ] || exit 1 ;; esac
        while [ \"\$1\" != --target ]; do shift; done
        mkdir -p \"\$2/torch/lib\" \"\$2/torch/include/torch/csrc/api/include\"
        touch \"\$2/torch/lib/libtorch_cpu.so\"
        echo \"__version__ = '2.11.0+cu130'\" >\"\$2/torch/version.py\""
}

# Runs set-up with the given variables; its words go to $m/out, its status to $status.
setup() {
    status=0
    env -i PATH="$bin" HOME="$home" "$@" bash "$clone/launch/scripts/setup.sh" \
        >"$m/out" 2>&1 || status=$?
}

# A libtorch of version $2 in folder $1.
libtorch_at() {
    mkdir -p "$1/lib" "$1/include/torch/csrc/api/include"
    touch "$1/lib/libtorch_cpu.so"
    echo "$2" >"$1/build-version"
}

# --- What is asked of it -------------------------------------------------------------------------

fail() {
    echo "FAILED: $scenario: $1"
    sed 's/^/    | /' "$m/out"
    failures=$((failures + 1))
}
scenario() { scenario=$1 && new_machine; }
succeeds() { [ "$status" = 0 ] || fail "exit code $status"; }
refuses() { [ "$status" = 1 ] || fail "exit code $status, wanted 1"; }
says() { grep -qF -- "$1" "$m/out" || fail "does not say: $1"; }
ran() { grep -qF -- "$1" "$m/log" || fail "did not run: $1"; }
never_ran() { ! grep -qF -- "$1" "$m/log" || fail "should not have run: $1"; }
names_libtorch() { grep -qF "value = \"$1\"" "$clone/.cargo/config.toml" || fail "no $1 in config"; }

scenario "root on a fresh machine: installs all, then has nothing to do"
setup; succeeds
ran "apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 libopenmpi-dev openmpi-bin libclang-dev"
ran "--no-deps torch==2.11.0 nvidia-cuda-runtime==13.0.* nvidia-cuda-cupti==13.0.*"
names_libtorch "$home/.cache/oxitron/libtorch-2.11.0-cpu/torch"
[ -z "$(compgen -G "$home/.cache/oxitron/.partial-*")" ] || fail "leaves a partial folder"
: >"$m/log" && touch -d 2020-01-01 "$clone/.cargo/config.toml"
before=$(stat -c %Y "$clone/.cargo/config.toml")
setup; succeeds
[ ! -s "$m/log" ] || fail "the second run installs again"
[ "$(stat -c %Y "$clone/.cargo/config.toml")" = "$before" ] || fail "the second run rewrites the config"

scenario "only what is missing is installed"
printf '%s\n' libopenmpi-dev libclang-dev >"$m/installed"
setup; succeeds
ran "Timeout=600 openmpi-bin"
never_ran "libclang-dev"

scenario "no root: the one line to run"
stub id 'echo 1000'
setup; refuses
says "sudo apt-get install -y --no-install-recommends libopenmpi-dev openmpi-bin libclang-dev"
never_ran "apt-get"

scenario "no root, sudo without a password"
stub id 'echo 1000'
stub sudo "[ \"\$*\" = '-n true' ] && exit; echo \"sudo \$*\" >>'$m/log'; shift; exec \"\$@\""
setup; succeeds
ran "sudo -n apt-get update"

scenario "missing compiler and pip are in the same line"
rm "$bin/c++" && stub python3 'exit 1'
stub id 'echo 1000'
setup; refuses
says "libopenmpi-dev openmpi-bin libclang-dev g++ python3-pip"

scenario "missing python3"
rm "$bin/python3" && stub id 'echo 1000'
setup; refuses
says "libclang-dev python3 python3-pip"

scenario "no apt-get"
rm "$bin/apt-get"
setup; refuses
says "this machine has no apt-get"

scenario "no cargo"
rm "$bin/cargo"
setup; refuses
says "install Rust from https://rustup.rs"

scenario "a cargo that is too old"
stub cargo 'echo "cargo 1.75.0 (stub)"'
setup; refuses
says "cargo 1.75.0 is too old"

scenario "no network for apt"
touch "$m/offline"
setup; refuses
says "apt could not install: libopenmpi-dev openmpi-bin libclang-dev"

scenario "no network for pip: names the files, then takes them"
printf '%s\n' libopenmpi-dev openmpi-bin libclang-dev >"$m/installed"
touch "$m/offline"
setup; refuses
says "torch-2.11.0-cp312-cp312-manylinux_2_28_$(uname -m).whl"
says "nvidia_cuda_runtime-13.0.*-py3-none-manylinux*"
says "nvidia_cuda_cupti-13.0.*-py3-none-manylinux*"
says "put them into $home/.cache/oxitron/wheels"
[ ! -e "$home/.cache/oxitron/libtorch-2.11.0-cpu" ] || fail "leaves half a libtorch"
[ -z "$(compgen -G "$home/.cache/oxitron/.partial-*")" ] || fail "leaves a partial folder"
[ ! -e "$clone/.cargo/config.toml" ] || fail "writes a config for a libtorch that is not there"
mkdir "$home/.cache/oxitron/wheels"
touch "$home/.cache/oxitron/wheels/torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl"
setup; succeeds
ran "--no-index --find-links $home/.cache/oxitron/wheels"

scenario "CUDA=1 installs all dependencies and is kept by a later plain run"
setup CUDA=1; succeeds
never_ran "--no-deps"
names_libtorch "$home/.cache/oxitron/libtorch-2.11.0-cuda/torch"
: >"$m/log"
setup; succeeds
[ ! -s "$m/log" ] || fail "the plain run installs again"
names_libtorch "$home/.cache/oxitron/libtorch-2.11.0-cuda/torch"

scenario "the user's own LIBTORCH"
libtorch_at "$m/own" 2.11.0+cpu
setup LIBTORCH="$m/own"; succeeds
never_ran "python3"
names_libtorch "$m/own"
libtorch_at "$m/old" 2.4.1
setup LIBTORCH="$m/old"; refuses
says "is version 2.4.1, and 2.11.0 is needed"
names_libtorch "$m/own"
setup LIBTORCH="$m/none"; refuses
says "no such folder"
setup LIBTORCH=relative; refuses
says "is not an absolute path"
mkdir "$m/empty"
setup LIBTORCH="$m/empty"; refuses
says "holds no lib/libtorch_cpu.so"

scenario "other settings in the user's cargo config stay"
mkdir "$clone/.cargo"
printf '[build]\njobs = 3\n[env]\nOTHER = "1"\n' >"$clone/.cargo/config.toml"
setup; succeeds
printf '[build]\njobs = 3\n[env]\nLIBTORCH = { value = "%s", force = false }\nOTHER = "1"\n' \
    "$home/.cache/oxitron/libtorch-2.11.0-cpu/torch" |
    cmp -s - "$clone/.cargo/config.toml" || fail "cargo config: $(cat "$clone/.cargo/config.toml")"

scenario "two clones at once install one libtorch"
printf '%s\n' libopenmpi-dev openmpi-bin libclang-dev >"$m/installed"
mkdir "$m/slow" && mv "$bin/python3" "$m/slow/" && ln -s "$(command -v sleep)" "$bin/sleep"
stub python3 "[ \"\$3\" = --version ] || sleep 0.3; exec '$m/slow/python3' \"\$@\""
cp -r "$clone" "$m/clone2"
(clone=$m/clone2 m=$m/clone2 && setup && exit "$status") &
setup; succeeds
wait $! || fail "the second clone fails"
[ "$(grep -c 'pip install' "$m/log")" = 1 ] || fail "installed $(grep -c 'pip install' "$m/log") times"

[ $failures = 0 ] || { echo "setup_test: $failures checks failed"; exit 1; }
echo "setup_test: all scenarios passed"
