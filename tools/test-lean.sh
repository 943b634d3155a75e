#!/bin/sh
# Two generations of TensorRT's lean runtime beside a test environment, for the tests of what they have:
# tools/test-lean.sh VENV. Each in a folder of its own, since one environment holds one version.
set -u
dir=$1
[ "$(uname -m)" = x86_64 ] || exit 0
for version in 10.16.1.11 11.4.0.106; do
    target=$dir/tensorrt-lean/$version
    [ ! -e "$target/.installed" ] || continue
    rm -rf "$target"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target" \
        "tensorrt-lean-cu13-bindings==$version" "tensorrt-lean-cu13-libs==$version" && touch "$target/.installed"
done
exit 0
