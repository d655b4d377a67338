#!/usr/bin/env bash
# The prose stays true to the tree: each relative link in the Markdown leads to a file, each page
# of the book is in its table of contents, each `make` target that a page names exists, and so does
# each command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failures=0
fail() { echo "FAILED: $1"; failures=$((failures + 1)); }

pages=(README.md CONTRIBUTING.md CHANGELOG.md docs/src/*.md)
for page in "${pages[@]}"; do
    while read -r link; do
        [ -e "$(dirname "$page")/${link%%#*}" ] || fail "$page links to $link, which is not there"
    done < <(grep -oE '\]\([^)# ]+' "$page" | sed 's/^](//' | grep -vE '^[a-z]+:' || true)
    while read -r target; do
        grep -qE "^$target:" Makefile || fail "$page names 'make $target', which is not there"
    done < <(grep -oE '(`|^)make [a-z-]+' "$page" | sed -E 's/^`?make //' | sort -u || true)
done
for page in docs/src/*.md; do
    name=$(basename "$page")
    [ "$name" = SUMMARY.md ] || grep -qF "]($name)" docs/src/SUMMARY.md ||
        fail "$page is not in docs/src/SUMMARY.md"
done

# The page on the command line knows every command of the built binary.
oxitron=${CARGO_TARGET_DIR:-target}/release/oxitron
[ -x "$oxitron" ] || fail "$oxitron is missing: run 'make build' first"
commands() { sed -n '/^Commands:/,/^$/s/^  \([a-z-]*\) .*/\1/p' | grep -vx help; }
for command in $("$oxitron" --help | commands); do
    grep -qE "^oxitron $command( |$)" docs/src/cli.md ||
        fail "docs/src/cli.md does not know 'oxitron $command'"
    for action in $("$oxitron" "$command" --help | commands); do
        grep -qE "^oxitron $command $action( |$)" docs/src/cli.md ||
            fail "docs/src/cli.md does not know 'oxitron $command $action'"
    done
done

[ $failures = 0 ] || exit 1
echo "docs_test: ${#pages[@]} pages, all links lead somewhere"
