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
