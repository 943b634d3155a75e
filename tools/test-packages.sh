#!/bin/sh
# What the tests need of Debian or Ubuntu, installed where that is allowed; elsewhere those tests are skipped.
set -u
packages="g++ systemd python3-venv mosquitto mosquitto-clients rabbitmq-server gir1.2-gst-rtsp-server-1.0 python3-gi \
gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly \
chromium chromium-driver"
missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    # The tests start their own brokers: new services stay off, now and at the next boot.
    new=
    for service in mosquitto rabbitmq-server epmd; do
        command -v $service >/dev/null || new="$new $service"
    done
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
    fi
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >/dev/null || failed=1
    for service in $new; do
        systemctl disable -q $service 2>/dev/null
    done
    [ "${failed:-}" ] || exit 0
fi
echo "not installed:$missing"
echo "the tests that need them are skipped; to run them: sudo apt install$missing"
