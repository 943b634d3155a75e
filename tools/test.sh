#!/bin/sh
# The tests under each Python. All of them under the first, with several at once, for most of them wait; those that look
# at the clock run before, one after the other. Then the quick ones under the others, one Python beside another; under
# the second the line from end to end as well. TensorRT and CUDA's libraries are installed for the first two; the others
# show that all else works without.
set -u
cd "$(dirname "$0")/.."
work=$(mktemp -d) running=
finish() {
    trap - INT TERM HUP
    [ -z "$running" ] || kill -INT $running 2>/dev/null
    wait
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP
tools/pythons.sh >"$work/pythons"
versions=$(cut -d ' ' -f 1 "$work/pythons")
first=$(echo "$versions" | sed -n 1p) second=$(echo "$versions" | sed -n 2p)
others=$(echo "$versions" | sed 1d)

while read -r version path; do
    dir=.venv-test-$version
    case $version in "$first" | "$second") extras=test,test-tensorrt ;; *) extras=test ;; esac
    constraints=tests/constraints-$version.txt
    [ -f "$constraints" ] || constraints=
    if [ ! -e "$dir/.installed" ] || [ pyproject.toml -nt "$dir/.installed" ]; then
        rm -f "$dir/.installed"
        tools/venv.sh "$dir" "$extras" "$path" "$constraints" &
        running="$running $!"
    fi
done <"$work/pythons"
wait
running=
for version in $versions; do
    [ -e ".venv-test-$version/.installed" ] || exit 1
done
tools/test-lean.sh ".venv-test-$first"

tests() { # VERSION MARKS [OPTIONS]: become the tests with these marks under a Python
    echo "Python $1: pytest -m '$2' ${3-}"
    exec ".venv-test-$1/bin/python" -m pytest -m "$2" --durations=5 ${3-} ${PYTEST_ARGS:-}
}

workers=$((2 * $(getconf _NPROCESSORS_ONLN))) # most of their time they wait
[ $workers -le 8 ] || workers=8
failed=0 ran=
judge() { # STATUS of pytest; 5 says that PYTEST_ARGS left no test with these marks
    case $1 in 0) ran=yes ;; 5) ;; *) failed=1 ;; esac
}

(tests "$first" "not gpu and alone")
judge $?
(tests "$first" "not gpu and not alone" "-n $workers")
judge $?
for version in $others; do
    slow="not slow"
    [ "$version" != "$second" ] || slow="(line or not slow)"
    (tests "$version" "not gpu and not soak and not alone and $slow") >"$work/$version" 2>&1 &
    running="$running $!"
done
for process in $running; do
    wait "$process"
    judge $?
done
running=
for version in $others; do
    cat "$work/$version"
done
for version in $others; do
    (tests "$version" "not gpu and not soak and not slow and alone")
    judge $?
done
[ $failed = 1 ] || [ "$ran" ] || { echo "no test was chosen"; exit 5; }
exit $failed
