#!/bin/sh
# Install the agent as a service, or take it away again: tools/install.sh install|uninstall. `make` calls it with
#
#   PREFIX    where to, /usr/local         DESTDIR   put before each path, to make a package of
#   PYTHON    what runs the agent          EXTRAS    of pyproject.toml, with commas
#   PLATFORM  jetson or nvidia: which devices the service may open; default: what this machine is
#   SYSTEM_PACKAGES=yes  the agent sees the system's Python packages, as on a Jetson it does anyway
#   PURGE=1   uninstall: configuration, models, engines and the user go too
#
# What is in /etc/edge-agent is never written over; a default that differs is put beside it.
set -eu
cd "$(dirname "$0")/.."
act=${1:-}
prefix=${PREFIX:-/usr/local} destdir=${DESTDIR:-} python=${PYTHON:-python3} platform=${PLATFORM:-}
extras=${EXTRAS-onnx,opencv,tracking,signed,prometheus}

lib=$prefix/lib/edge-agent
doc=$prefix/share/doc/edge-agent
case $prefix in
/usr | /usr/local) units=$prefix/lib/systemd/system sysusers=$prefix/lib/sysusers.d ;;
*) units=/etc/systemd/system sysusers=/etc/sysusers.d ;; # systemd looks nowhere else
esac

say() { printf '%s\n' "$*"; }

give_up() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_live() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }

install_program() { # into an environment of its own; editable first, as the other environments here, then as a copy
    target=$destdir$lib
    wanted=$("$python" -c 'import sys; print(sys.version_info[:2])') || give_up "there is no $python; name one: PYTHON="
    has=$("$target/bin/python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null) || has=
    [ "$wanted" = "$has" ] || rm -rf "$target"
    if [ "${SYSTEM_PACKAGES:-}" = yes ] && [ ! -e "$target" ]; then
        "$python" -m venv --system-site-packages "$target"
    fi
    tools/venv.sh "$target" "$extras" "$python"
    case $("$python" -c 'import sys; print(sys.base_prefix)') in
    /home/* | /root/*) say "warning: $python lies in a home directory, where the service may not look; PYTHON=/usr/bin/python3" ;;
    esac
    rm -f "$target/.installed"
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    pip="$target/bin/python -m pip --quiet --disable-pip-version-check"
    $pip wheel --no-deps --wheel-dir "$wheels" .
    $pip install --no-deps --no-index --force-reinstall --find-links "$wheels" edge-agent
    rm -f "$target"/bin/activate* "$target"/bin/Activate.ps1
    [ -z "$destdir" ] || relocate
    link edge-agent
    link edgectl
}

relocate() { # the environment knows where it was made; make it know where it will be
    from=$(printf '%s' "$target" | sed 's/[][\.*^$|]/\\&/g')
    find "$target/bin" "$target/pyvenv.cfg" -type f -exec grep -Iq . {} \; -exec sed -i "s|$from|$lib|g" {} \;
    "$target/bin/python" -m compileall -qq -f -j 0 -s "$destdir" -p / "$target/lib" || true # not all files are for this Python
}

link() {
    mkdir -p "$destdir$prefix/bin"
    ln -sfn "../lib/edge-agent/bin/$1" "$destdir$prefix/bin/$1"
}

install_units() {
    [ -n "$platform" ] || platform=$([ -e /etc/nv_tegra_release ] && echo jetson || echo nvidia)
    case $platform in jetson | nvidia) ;; *) give_up "PLATFORM=$platform: it is jetson or nvidia" ;; esac
    remove_units
    for unit in edge-agent.service edge-agent@.service; do
        put "systemd/$unit" "$units/$unit"
        for drop_in in $platform $(is_old && echo old-systemd); do
            put "systemd/edge-agent.service.d/$drop_in.conf" "$units/$unit.d/$drop_in.conf"
        done
    done
    put systemd/sysusers.conf "$sysusers/edge-agent.conf"
}

is_old() { # systemd, of this machine
    version=$(systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    [ "${version:-239}" -lt 239 ]
}

remove_units() {
    for unit in edge-agent.service edge-agent@.service; do
        rm -f "$destdir$units/$unit"
        for drop_in in jetson nvidia old-systemd; do
            rm -f "$destdir$units/$unit.d/$drop_in.conf"
        done
        rmdir "$destdir$units/$unit.d" 2>/dev/null || true # what else is in there is not ours
    done
}

put() { # a text, with the paths of this prefix
    mkdir -p "$(dirname "$destdir$2")"
    sed "s|/usr/local|$prefix|g" "$1" >"$destdir$2"
    chmod 644 "$destdir$2"
}

install_config() { # a service talks to a broker that is there, not to one of its own
    folder=$destdir/etc/edge-agent
    mkdir -p "$folder" "$destdir$doc"
    sed -e '1s/a broker of its own\.$/a broker on this machine./' -e 's/^embedded = true /embedded = false/' \
        config.toml >"$destdir$doc/config.toml"
    chmod 644 "$destdir$doc/config.toml"
    for file in README.md LICENSE docs/systemd.md; do
        put "$file" "$doc/$(basename "$file")"
    done
    if [ ! -e "$folder/config.toml" ]; then
        install -m 640 "$destdir$doc/config.toml" "$folder/config.toml"
    elif ! cmp -s "$destdir$doc/config.toml" "$folder/config.toml"; then
        install -m 640 "$destdir$doc/config.toml" "$folder/config.toml.dist"
        say "/etc/edge-agent/config.toml is left as it is; the default of this version is beside it, as config.toml.dist"
    fi
}

make_known() { # to this system: the user, and the units
    [ -z "$destdir" ] || return 0
    [ "$(id -u)" = 0 ] || return 0
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers "$sysusers/edge-agent.conf"
        chgrp edge-agent /etc/edge-agent/config.toml* # passwords may be in it: no others read it
    else
        say "there is no systemd-sysusers here: make the user and the groups of $sysusers/edge-agent.conf yourself"
    fi
    ! is_live || systemctl daemon-reload
    say "installed. Edit /etc/edge-agent/config.toml, then: systemctl enable --now edge-agent"
    ! is_live || ! systemctl -q is-active edge-agent || say "the agent that runs is the old one: systemctl restart edge-agent"
}

uninstall() {
    if is_live; then
        systemctl disable -q --now edge-agent.service 2>/dev/null || true
        systemctl stop 'edge-agent@*.service' 2>/dev/null || true
    fi
    [ ! -e "$destdir$lib" ] || [ -e "$destdir$lib/pyvenv.cfg" ] || give_up "$destdir$lib is not what was installed; look at it"
    rm -rf "$destdir$lib" "$destdir$doc"
    for program in edge-agent edgectl; do
        [ "$(readlink "$destdir$prefix/bin/$program")" != "../lib/edge-agent/bin/$program" ] || rm -f "$destdir$prefix/bin/$program"
    done
    remove_units
    rm -f "$destdir$sysusers/edge-agent.conf"
    ! is_live || systemctl daemon-reload
    if [ "${PURGE:-}" = 1 ]; then
        purge
    else
        say "kept: /etc/edge-agent, and where they are /var/lib/edge-agent*, /var/cache/edge-agent* and the user edge-agent (PURGE=1 removes them)"
    fi
}

purge() {
    for name in etc/edge-agent var/lib/edge-agent var/lib/edge-agents var/cache/edge-agent var/cache/edge-agents; do
        rm -rf "$destdir/$name"
    done
    [ -n "$destdir" ] || ! id edge-agent >/dev/null 2>&1 || userdel edge-agent
    say "kept: what the journal holds, and the groups video and render"
}

case $prefix in /*) ;; *) give_up "PREFIX is an absolute path" ;; esac
case $destdir in '' | /*) ;; *) destdir=$PWD/$destdir ;; esac
destdir=${destdir%/}
case $act in
install)
    umask 022
    install_program
    install_units
    install_config
    make_known
    ;;
uninstall) uninstall ;;
*) give_up "tools/install.sh install|uninstall" ;;
esac
