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

need_ours() { [ ! -e "$1" ] || [ -e "$1/pyvenv.cfg" ] || give_up "$1 is not what was installed; look at it, or name another PREFIX"; }

install_program() { # into an environment of its own, made beside the one that is there and put into its place when it is whole
    target=$destdir$lib new=$destdir$lib.new old=$destdir$lib.old
    for folder in "$target" "$new" "$old"; do need_ours "$folder"; done
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels" "$new"' EXIT
    rm -rf "$new"
    wanted=$("$python" -c 'import sys; print(sys.version_info[:2])') || give_up "there is no $python; name one: PYTHON="
    has=$("$target/bin/python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null) || has=
    if [ "$wanted" = "$has" ]; then
        cp -a "$target" "$new" # with what was put there besides
    elif [ "${SYSTEM_PACKAGES:-}" = yes ]; then
        "$python" -m venv --system-site-packages "$new"
    fi
    tools/venv.sh "$new" "$extras" "$python" # editable first, as the other environments here, then a copy
    case $("$python" -c 'import sys; print(sys.base_prefix)') in
    /home/* | /root/*) say "warning: $python lies in a home directory, where the service may not look; PYTHON=/usr/bin/python3" ;;
    esac
    rm -f "$new/.installed"
    pip="$new/bin/python -m pip --quiet --disable-pip-version-check"
    $pip wheel --no-deps --wheel-dir "$wheels" .
    $pip install --no-deps --no-index --force-reinstall --find-links "$wheels" edge-agent
    rm -f "$new"/bin/activate* "$new"/bin/Activate.ps1
    relocate
    rm -rf "$old"
    [ ! -e "$target" ] || mv "$target" "$old"
    mv "$new" "$target" || { mv "$old" "$target"; exit 1; }
    rm -rf "$old"
    link edge-agent
    link edgectl
}

relocate() { # the environment knows where it was made; make it know where it will be
    from=$(printf '%s' "$new" | sed 's/[][\.*^$|]/\\&/g')
    find "$new/bin" "$new/pyvenv.cfg" -type f -exec grep -Iq . {} \; -exec sed -i "s|$from|$lib|g" {} \;
    [ -z "$destdir" ] || # not all files are for this Python
        "$new/bin/python" -m compileall -qq -f -j 0 -s "$new" -p "$lib" "$new/lib" || true
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

uninstall() { # the program last, since it tells that there is something to take away
    need_ours "$destdir$lib"
    [ -e "$destdir$lib" ] || give_up "there is no $destdir$lib, so nothing is taken away; name the PREFIX that it was installed with"
    [ "${PURGE:-}" != 1 ] || need_no_other
    switch_off
    for program in edge-agent edgectl; do
        [ "$(readlink "$destdir$prefix/bin/$program")" != "../lib/edge-agent/bin/$program" ] || rm -f "$destdir$prefix/bin/$program"
    done
    remove_units
    rm -f "$destdir$sysusers/edge-agent.conf"
    ! is_live || systemctl daemon-reload
    if [ "${PURGE:-}" = 1 ]; then
        purge
    else
        say "kept: /etc/edge-agent, and where they are /var/lib/edge-agent*, /var/cache/edge-agent* and the user edge-agent"
        say "(PURGE=1 removes them with the program)"
    fi
    rm -rf "$destdir$doc" "$destdir$lib"
}

need_no_other() { # installation on this machine: it has the same configuration, state and user
    for folder in /etc/systemd/system /usr/local/lib/systemd/system /usr/lib/systemd/system; do
        [ "$folder" = "$units" ] || [ ! -e "$destdir$folder/edge-agent.service" ] ||
            give_up "$folder/edge-agent.service is of another installation, which PURGE=1 would take configuration and user from"
    done
}

switch_off() { # what runs from our units, not from a Debian package's, and what would start with the machine
    [ -z "$destdir" ] || return 0
    if is_live && [ "$(systemctl show --property FragmentPath edge-agent.service)" = "FragmentPath=$units/edge-agent.service" ]; then
        systemctl stop edge-agent.service 'edge-agent@*.service' || true
    fi
    for wanted in /etc/systemd/system/*.wants/edge-agent.service /etc/systemd/system/*.wants/edge-agent@*.service; do
        for unit in edge-agent.service edge-agent@.service; do
            [ ! "$wanted" -ef "$units/$unit" ] || rm -f "$wanted"
        done
    done
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
