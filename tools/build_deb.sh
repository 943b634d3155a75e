#!/bin/sh
# Make dist/edge-agent_VERSION+pyX.Y_ARCHITECTURE.deb, which needs no network to install: all Python packages are in it.
#
#   PYTHON    of the system that it is for, /usr/bin/python3; build on one of the same release and architecture
#   EXTRAS, PLATFORM    see tools/install.sh
#   COMPRESS  xz, or gzip, which is quicker
#   OUT       folder that it is put in, dist
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-/usr/bin/python3}
out=${OUT:-dist}

case $("$python" -c 'import sys; print(sys.base_prefix)') in
/usr) ;;
*) echo "error: $python is not the system's, and others have no such one; PYTHON=/usr/bin/python3" >&2 && exit 1 ;;
esac
minor() { "$python" -c "import sys; print('%d.%d' % (sys.version_info[0], sys.version_info[1] + $1))"; }
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' edge_agent/__init__.py)+py$(minor 0)
architecture=$(dpkg --print-architecture)

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
chmod 755 "$stage"
DESTDIR=$stage PREFIX=/usr PYTHON=$python EXTRAS=${EXTRAS-onnx,opencv,tracking,signed,prometheus} \
    PLATFORM=${PLATFORM:-} tools/install.sh install

mkdir "$stage/DEBIAN"
cat >"$stage/DEBIAN/control" <<CONTROL
Package: edge-agent
Version: $version
Architecture: $architecture
Maintainer: edge-agent <edge-agent@localhost>
Section: misc
Priority: optional
Installed-Size: $(du -sk --exclude=DEBIAN "$stage" | cut -f 1)
Depends: python3 (>= $(minor 0)), python3 (<< $(minor 1)), systemd, procps
Suggests: mosquitto
Description: camera frames in, model results out over MQTT
 Runs ONNX and TensorRT models on the frames of V4L2, RTSP and other cameras
 and publishes what they see, health and statistics to an MQTT broker.
 .
 It carries its Python packages in /usr/lib/edge-agent, for Python $(minor 0).
CONTROL
echo /etc/edge-agent/config.toml >"$stage/DEBIAN/conffiles"
install -m 755 systemd/debian/postinst systemd/debian/prerm systemd/debian/postrm "$stage/DEBIAN"
(cd "$stage" && find usr -type f -exec md5sum {} +) >"$stage/DEBIAN/md5sums"

mkdir -p "$out"
dpkg-deb --root-owner-group -Z"${COMPRESS:-xz}" --build "$stage" "$out/edge-agent_${version}_$architecture.deb"
