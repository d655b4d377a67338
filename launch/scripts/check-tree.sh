#!/usr/bin/env bash
# Looks over the files in git: sources stay short enough to be one concept, nothing heavy sneaks in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

long=$(git ls-files -z -- '*.rs' '*.cpp' '*.h' '*.cu' '*.py' '*.sh' | xargs -0 wc -l |
    awk '$2 != "total" && $1 > 600 { print "  " $2 ": " $1 " lines" }')
heavy=$(git ls-files -z | xargs -0 stat -c '%s %n' |
    awk '$1 > 1048576 { size = $1; sub(/^[0-9]+ /, ""); print "  " $0 ": " size " bytes" }')
[ -z "$long" ] || printf 'check: more than 600 lines; is it one concept?\n%s\n' "$long" >&2
[ -z "$heavy" ] || printf 'check: more than 1 MiB; does it belong in git?\n%s\n' "$heavy" >&2
[ -z "$long$heavy" ]
