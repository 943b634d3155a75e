#!/bin/sh
# Make a virtual environment with this project in it: tools/venv.sh DIR EXTRAS [PYTHON] [CONSTRAINTS]
#
# On a Jetson the environment sees the system's packages, since TensorRT and an OpenCV with GStreamer
# come with JetPack; there the opencv extra is left out where the system has one.
set -eu
dir=$1 extras=$2 python=${3:-python3} constraints=${4:-}
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    say "error: Python 3.10 or newer is needed; '$python' is not. Name one: make PYTHON=/path/to/python3"
    exit 1
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

options= jetson=
if [ -e /etc/nv_tegra_release ]; then
    jetson=yes
    options=--system-site-packages
fi

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package="python$version-venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $package"
        { apt-get update -qq && apt-get install -y -qq "$package"; } >/dev/null
    else
        say "error: this Python cannot make virtual environments. Once: sudo apt install $package"
        exit 1
    fi
fi

say "installing into $dir (Python $version)"
[ -x "$dir/bin/python" ] || "$python" -m venv $options "$dir"
install() {
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check ${constraints:+-c "$constraints"} "$@"
}
if [ -z "$jetson" ]; then
    install -e ".${extras:+[$extras]}"
else
    # JetPack's OpenCV and TensorRT are built for numpy 1, and a wheel of OpenCV would hide the one with GStreamer.
    lean=$(printf '%s' "$extras" | sed 's/opencv,//; s/,opencv//; s/^opencv$//')
    # The bindings have the major version of JetPack's CUDA: 12 up to JetPack 6 (L4T 36).
    release=$(sed -n 's/^# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release)
    if [ "${release:-0}" -le 36 ]; then bindings='cuda-bindings<13'; else bindings='cuda-bindings>=13'; fi
    install 'numpy<2' "$bindings" -e ".[${lean:+$lean,}cuda]"
    if "$dir/bin/python" -c 'import cv2; cv2.dnn.NMSBoxesBatched' 2>/dev/null; then
        say "JetPack's own OpenCV is used"
    else
        say "the system's OpenCV is missing, too old or built for another numpy: installing a wheel, without GStreamer"
        install 'numpy<2' 'opencv-python-headless>=4.8,<4.12'
    fi
fi
touch "$dir/.installed"
