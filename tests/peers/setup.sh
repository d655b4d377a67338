#!/bin/sh
# Installs the environment of tests/peers: PyTorch.
#
#   setup.sh            installs what is missing or out of date, prints the folder on stdout
#
# The folder is $OXITRON_PEERS, or oxitron/peers in the user's cache, and holds `venv/`. Where the
# environment of tests/oracle is installed with the same releases, that folder is taken as it is.
# About 5 GB, since PyTorch's wheel brings CUDA libraries that a bare `import torch` needs; an index
# of CPU wheels (PIP_INDEX_URL) has a smaller one. Nothing of it is used by `make test`.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oxitron
root=${OXITRON_PEERS:-$cache/peers}
oracle=${OXITRON_ORACLE:-$cache/oracle}
python=${PYTHON:-python3}

say() { echo "peers: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

# Whether the folder $1 holds a whole installation with every release wanted. The list is copied
# last, so a killed installation is not taken for a whole one.
has_all() {
    [ -f "$1/venv/requirements.txt" ] &&
        ! grep -v '^#' "$here/requirements.txt" | grep -qvxF -f "$1/venv/requirements.txt"
}

for folder in "$root" "$oracle"; do
    if has_all "$folder"; then
        echo "$folder"
        exit
    fi
done

command -v "$python" >/dev/null || fail "python3 is missing: install it, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $("$python" --version) was found: set PYTHON"
mkdir -p "$root"
free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge 12 ] || fail "12 GB must be free in $root while installing, $free GB are"
say "installing PyTorch into $root/venv (5 GB, some minutes)"
rm -rf "$root/venv"
"$python" -m venv "$root/venv" ||
    fail "python3 -m venv failed: on Debian, apt-get install python3-venv"
"$root/venv/bin/pip" install --quiet --disable-pip-version-check \
    --requirement "$here/requirements.txt" >&2 ||
    fail "pip could not install $here/requirements.txt; with a mirror, set PIP_INDEX_URL"
cp "$here/requirements.txt" "$root/venv/requirements.txt"
echo "$root"
