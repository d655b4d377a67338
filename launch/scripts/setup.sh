#!/usr/bin/env bash
# Gets a machine ready to build: Debian packages, libtorch, and the line that tells cargo where
# libtorch lies. Safe to run at any time; takes a fraction of a second when there is nothing to do.
#
#   launch/scripts/setup.sh             (`make setup`)
#
#   LIBTORCH=/abs/folder   use this libtorch 2.11.0 instead of installing one
#   CUDA=1 | CUDA=0        install libtorch with | without the CUDA libraries that a GPU run needs
#   XDG_CACHE_HOME         the cache lies under $XDG_CACHE_HOME/oxitron (default ~/.cache/oxitron)
#
# With neither variable the libtorch that `.cargo/config.toml` names already is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly torch_version=2.11.0 # the one that tch =0.24.0 accepts
readonly python_tag=3.12      # which torch wheel is fetched; its libtorch is the same for each
readonly cache=${XDG_CACHE_HOME:-$HOME/.cache}/oxitron
readonly wheels=$cache/wheels # looked into before the index, for machines without a network
readonly config=.cargo/config.toml

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    [ $# = 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# --- Rust ----------------------------------------------------------------------------------------

check_cargo() {
    have cargo || die "cargo is missing" \
        "install Rust from https://rustup.rs (no root needed), open a new shell, run this again"
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    found=$(cargo --version | cut -d' ' -f2)
    [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
        die "cargo $found is too old: Oxitron needs Rust $wanted or later" "run: rustup update"
}

# --- Debian packages -----------------------------------------------------------------------------

# True when dpkg knows the package as installed.
installed() {
    have dpkg-query &&
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# One package per line that the build needs and this machine lacks. A tool that is there without
# its package (an Open MPI of the cluster, say) is as good.
missing_packages() {
    have mpicc || installed libopenmpi-dev || echo libopenmpi-dev
    have mpirun || installed openmpi-bin || echo openmpi-bin
    [ -n "${LIBCLANG_PATH:-}" ] || installed libclang-dev || find_libclang || echo libclang-dev
    local cxx=${CXX:-c++} # may carry arguments, as in "ccache g++"
    have "${cxx%% *}" || echo g++
    have make || echo make
    have python3 || echo python3
    if [ "$1" = with-pip ] && ! python3 -m pip --version >/dev/null 2>&1; then
        echo python3-pip
    fi
}

# A libclang outside of Debian's package manager.
find_libclang() { ! have dpkg-query && ldconfig -p 2>/dev/null | grep -q 'libclang[-.]'; }

install_packages() {
    local packages=("$@") as_root=()
    local line="apt-get install -y --no-install-recommends ${packages[*]}"
    say "missing on this machine: ${packages[*]}"
    have apt-get || die "these are Debian package names, and this machine has no apt-get" \
        "install what they hold: Open MPI with its headers (libopenmpi-dev, openmpi-bin)," \
        "libclang (libclang-dev), a C++17 compiler (g++), Python 3 with pip; then run this again"
    if [ "$(id -u)" != 0 ]; then
        if have sudo && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            die "installing them needs root; run this line once, then the same command again:" \
                "sudo $line"
        fi
    fi
    say "running: ${as_root[*]:+${as_root[*]} }apt-get update && $line"
    # A broken third-party source must not stop us: what counts is whether the install succeeds.
    "${as_root[@]}" apt-get update -qq || say "apt-get update failed; trying the lists at hand"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 \
        "${packages[@]}" ||
        die "apt could not install: ${packages[*]}" \
            "without a network: install these packages from a mirror or by 'dpkg -i', run again"
}

# --- libtorch ------------------------------------------------------------------------------------

# The version of the libtorch in folder $1, or nothing. The zip of pytorch.org has `build-version`,
# the wheel has `version.py`, both have the header.
torch_version_of() {
    local header=$1/include/torch/headeronly/version.h found=
    if [ -f "$1/build-version" ]; then
        read -r found <"$1/build-version" || true
    elif [ -f "$1/version.py" ]; then
        found=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" "$1/version.py")
    elif [ -f "$header" ]; then
        found=$(sed -n 's/^ *"\([0-9][0-9.]*\)" *$/\1/p' "$header" | head -n 1)
    fi
    printf '%s' "${found%%+*}"
}

usable() {
    [ -e "$1/lib/libtorch_cpu.so" ] && [ -d "$1/include/torch/csrc/api/include" ] &&
        [ "$(torch_version_of "$1")" = $torch_version ]
}

# Refuses a LIBTORCH that would fail minutes later in a compiler's or linker's words.
check_own_libtorch() {
    local dir=$1 found
    local remedy="point LIBTORCH at libtorch $torch_version, or unset it to have one installed"
    [[ $dir = /* ]] || die "LIBTORCH=$dir is not an absolute path" "$remedy"
    [ -d "$dir" ] || die "LIBTORCH=$dir: no such folder" "$remedy"
    [ -e "$dir/lib/libtorch_cpu.so" ] ||
        die "LIBTORCH=$dir holds no lib/libtorch_cpu.so" "$remedy" \
            "(in a Python environment it is …/site-packages/torch)"
    found=$(torch_version_of "$dir")
    [ "$found" = $torch_version ] ||
        die "LIBTORCH=$dir is version ${found:-unknown}, and $torch_version is needed" "$remedy"
    [ -d "$dir/include/torch/csrc/api/include" ] ||
        die "LIBTORCH=$dir has no C++ headers under include/" "$remedy"
}

# Installs the wheels of variant $1 (cpu | cuda) into $2: first under a temporary name, so that a
# folder of that name is always whole, and under a lock, so that two clones do not clash.
install_libtorch() {
    local variant=$1 target=$2 partial
    mkdir -p "$cache" || die "cannot write $cache" "set XDG_CACHE_HOME to a folder that you own"
    exec 9>"$cache/setup.lock"
    flock -n 9 || { say "another set-up is installing libtorch: waiting for it"; flock 9; }
    usable "$target/torch" && return
    rm -rf "$cache"/.partial-* "$target"
    partial=$cache/.partial-$$
    # shellcheck disable=SC2064
    trap "rm -rf '$partial'" EXIT
    mkdir -p "$partial/tmp"

    local packages=(torch==$torch_version)
    local how=(--only-binary=:all: --python-version $python_tag)
    if [ "$variant" = cpu ]; then
        # libtorch_cpu.so of the index names libcudart and libcupti; nothing else is needed.
        packages+=('nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cupti==13.0.*')
        how+=(--no-deps)
        say "installing libtorch $torch_version into $target (about 560 MB to fetch)"
    else
        say "installing libtorch $torch_version with CUDA into $target (about 3 GB to fetch)"
    fi
    if compgen -G "$wheels/torch-$torch_version*.whl" >/dev/null; then
        say "from the wheels in $wheels"
        how+=(--no-index --find-links "$wheels")
    fi
    # pip builds in TMPDIR and moves from there: keep it on the disk of the target.
    TMPDIR=$partial/tmp PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
        python3 -m pip install --no-compile --target "$partial/root" \
        "${how[@]}" "${packages[@]}" || no_wheels "$variant"
    usable "$partial/root/torch" ||
        die "pip installed no libtorch $torch_version (its words are above)"
    mv "$partial/root" "$target"
    rm -rf "$partial"
    flock -u 9
}

# Says which files to bring to a machine that pip could not fetch them for.
no_wheels() {
    local python=cp${python_tag/./} machine names download
    machine=$(uname -m)
    names=("torch-$torch_version-$python-$python-manylinux_2_28_$machine.whl")
    download="python3 -m pip download --only-binary=:all: --python-version $python_tag"
    if [ "$1" = cpu ]; then
        names+=("nvidia_cuda_runtime-13.0.*-py3-none-manylinux*_$machine.whl"
            "nvidia_cuda_cupti-13.0.*-py3-none-manylinux*_$machine.whl")
        download+=" --no-deps torch==$torch_version"
        download+=" 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cupti==13.0.*'"
    else
        names+=("and all that it depends on (the line below fetches them together)")
        download+=" torch==$torch_version"
    fi
    die "pip could not get libtorch (its last lines are above)" \
        "if this machine has no network, fetch these files where there is one:" \
        "${names[@]/#/    }" \
        "for instance with" "    $download" \
        "put them into $wheels and run this again;" \
        "or set LIBTORCH to a libtorch $torch_version unpacked anywhere"
}

# --- cargo's configuration -----------------------------------------------------------------------

# The libtorch that cargo's configuration names, or nothing.
configured_libtorch() {
    [ ! -f $config ] || sed -n 's/^LIBTORCH = .*value = "\([^"]*\)".*/\1/p' $config
}

# Tells cargo, an editor's too, where libtorch lies. `force = false`: a LIBTORCH in the environment
# wins. The file is left untouched when it says so already, and other settings in it are kept.
configure_cargo() {
    local line="LIBTORCH = { value = \"$1\", force = false }"
    [ "$(configured_libtorch)" = "$1" ] && return
    mkdir -p .cargo
    touch $config
    if grep -q '^LIBTORCH = ' $config; then
        sed "s|^LIBTORCH = .*|$line|" $config >$config.new
    elif grep -q '^\[env\]' $config; then
        sed "s|^\[env\].*|&\n$line|" $config >$config.new
    else
        { cat $config && printf '[env]\n%s\n' "$line"; } >$config.new
    fi
    mv $config.new $config
    say "wrote $config: libtorch is $1"
}

# --- Which libtorch ------------------------------------------------------------------------------

main() {
    [[ $cache = /* ]] || die "XDG_CACHE_HOME=$XDG_CACHE_HOME is not an absolute path"
    check_cargo
    local libtorch variant=cpu kept
    kept=$(configured_libtorch)
    [ "${CUDA:-0}" = 0 ] || variant=cuda
    if [ -n "${LIBTORCH:-}" ]; then
        check_own_libtorch "$LIBTORCH"
        libtorch=$LIBTORCH
    elif [ -z "${CUDA:-}" ] && [ -n "$kept" ] && usable "$kept"; then
        libtorch=$kept
    else
        libtorch=$cache/libtorch-$torch_version-$variant/torch
    fi

    local pip=no-pip missing
    [ -n "${LIBTORCH:-}" ] || usable "$libtorch" || pip=with-pip
    missing=$(missing_packages $pip)
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_packages $missing
    usable "$libtorch" || install_libtorch "$variant" "$(dirname "$libtorch")"
    configure_cargo "$libtorch"
    say "ready (libtorch $torch_version in $libtorch)"
}

main
