#!/bin/sh
# Installs the environment of tests/oracle: PyTorch, transformers 5.x, and transformers 4.x beside it.
#
#   setup.sh            installs what is missing or out of date, prints the folder on stdout
#
# The folder is $OXITRON_ORACLE, or oxitron/oracle in the user's cache: `venv/`, and
# `transformers-4/`, which goes in front on PYTHONPATH. About 5 GB, since PyTorch's wheel brings
# CUDA libraries that a bare `import torch` needs. Nothing of it is used by `make test`.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=${OXITRON_ORACLE:-${XDG_CACHE_HOME:-$HOME/.cache}/oxitron/oracle}
python=${PYTHON:-python3}

say() { echo "oracle: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

# Each folder is stamped last, with the requirements it was made from: a killed installation is not
# taken for a whole one, and a changed list is installed anew.
is_current() { cmp -s "$here/$2" "$root/$1/requirements.txt"; }

command -v "$python" >/dev/null || fail "python3 is missing: install it, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $("$python" --version) was found: set PYTHON"
mkdir -p "$root"

if ! is_current venv requirements.txt; then
    free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 12 ] || fail "12 GB must be free in $root while installing, $free GB are"
    say "installing PyTorch and transformers into $root/venv (5 GB, some minutes)"
    rm -rf "$root/venv"
    "$python" -m venv "$root/venv" ||
        fail "python3 -m venv failed: on Debian, apt-get install python3-venv"
    "$root/venv/bin/pip" install --quiet --disable-pip-version-check \
        --requirement "$here/requirements.txt" >&2 ||
        fail "pip could not install $here/requirements.txt; with a mirror, set PIP_INDEX_URL"
    cp "$here/requirements.txt" "$root/venv/requirements.txt"
fi

if ! is_current transformers-4 requirements-transformers-4.txt; then
    say "installing transformers 4.x into $root/transformers-4"
    rm -rf "$root/transformers-4"
    "$root/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        --target "$root/transformers-4" \
        --requirement "$here/requirements-transformers-4.txt" >&2 ||
        fail "pip could not install $here/requirements-transformers-4.txt"
    cp "$here/requirements-transformers-4.txt" "$root/transformers-4/requirements.txt"
fi

echo "$root"
