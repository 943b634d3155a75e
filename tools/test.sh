#!/bin/sh
# The tests under each Python: all of them under the first, all but the longest under the second, the quick ones
# under the others. TensorRT and CUDA's libraries are installed for the first two; the others show that all else
# works without.
set -u
cd "$(dirname "$0")/.."
failed=0 count=0
pythons=$(mktemp)
trap 'rm -f "$pythons"' EXIT
tools/pythons.sh >"$pythons"

extras=test,test-tensorrt
while read -r version path <&3; do
    dir=.venv-test-$version
    constraints=tests/constraints-$version.txt
    [ -f "$constraints" ] || constraints=
    if [ ! -e "$dir/.installed" ] || [ pyproject.toml -nt "$dir/.installed" ]; then
        rm -f "$dir/.installed"
        tools/venv.sh "$dir" "$extras" "$path" "$constraints" &
    fi
    seen=${seen-}x
    [ "$seen" = x ] || extras=test
done 3<"$pythons"
wait
tools/test-lean.sh ".venv-test-$(head -n 1 "$pythons" | cut -d ' ' -f 1)"

suite() { # the tests with these marks under a Python
    echo "Python $1: pytest -m '$2'"
    ".venv-test-$1/bin/python" -m pytest -m "$2" --durations=5 ${PYTEST_ARGS:-}
}

# The first alone, since some of its tests look at the clock; then the second, beside the others one after the other.
others= second=
while read -r version path <&3; do
    count=$((count + 1))
    [ -e ".venv-test-$version/.installed" ] || exit 1
    case $count in
    1) suite "$version" "not gpu" || failed=1 ;;
    2) second=$version ;;
    *) others="$others $version" ;;
    esac
done 3<"$pythons"
output=$(mktemp)
if [ -n "$second" ]; then
    suite "$second" "not gpu and not soak" >"$output" 2>&1 &
    running=$!
fi
for version in $others; do
    suite "$version" "not gpu and not soak and not slow" || failed=1
done
if [ -n "$second" ]; then
    wait "$running" || failed=1
    cat "$output"
fi
rm -f "$output"
exit $failed
