#!/bin/sh
# The tests under each Python: all of them under the first, all but the longest under the second, the quick ones
# under the others.
set -u
cd "$(dirname "$0")/.."
failed=0 count=0
pythons=$(mktemp)
trap 'rm -f "$pythons"' EXIT
tools/pythons.sh >"$pythons"

while read -r version path <&3; do
    dir=.venv-test-$version
    constraints=tests/constraints-$version.txt
    [ -f "$constraints" ] || constraints=
    if [ ! -e "$dir/.installed" ] || [ pyproject.toml -nt "$dir/.installed" ]; then
        rm -f "$dir/.installed"
        tools/venv.sh "$dir" test "$path" "$constraints" &
    fi
done 3<"$pythons"
wait

while read -r version path <&3; do
    count=$((count + 1))
    dir=.venv-test-$version
    [ -e "$dir/.installed" ] || exit 1
    case $count in
    1) marks="not gpu" ;;
    2) marks="not gpu and not soak" ;;
    *) marks="not gpu and not soak and not slow" ;;
    esac
    echo "Python $version: pytest -m '$marks'"
    "$dir/bin/python" -m pytest -m "$marks" --durations=5 ${PYTEST_ARGS:-} || failed=1
done 3<"$pythons"
exit $failed
