"""`make install`, `make uninstall` and `make deb`: what they put where, and what they leave alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs import ROOT, need_program

pytestmark = [pytest.mark.slow, pytest.mark.soak]

SYSTEM_PYTHON = "/usr/bin/python3"


def install_sh(act: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`tools/install.sh`, however it ends."""
    command = [str(ROOT / "tools/install.sh"), act]
    variables = {**os.environ, "EXTRAS": "", "PLATFORM": "nvidia", **environ}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def make(target: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = need_program("make", "make")
    assigned = [f"{key}={value}" for key, value in {"EXTRAS": "", **variables}.items()]
    done = subprocess.run(
        [program, "--silent", target, *assigned], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def files(folder: Path) -> set[str]:
    """All that is no folder in there, but for what Python packages hold."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    return {name for name in there if "/lib/edge-agent/" not in f"/{name}"}


def need_python_with_venv(python: str) -> str:
    if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} makes no virtual environments: apt-get install python3-venv")
    return python


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a package of somebody's would be made of."""
    stage = tmp_path_factory.mktemp("stage")
    make(
        "install",
        DESTDIR=str(stage),
        PREFIX="/opt/edge",
        PLATFORM="nvidia",
        PYTHON=need_python_with_venv(sys.executable),
    )
    return stage


def test_install_puts_program_units_and_configuration_where_the_prefix_says(staged: Path) -> None:
    assert files(staged) == {
        "opt/edge/bin/edge-agent",
        "opt/edge/bin/edgectl",
        *(f"opt/edge/share/doc/edge-agent/{name}" for name in ("LICENSE", "README.md", "config.toml", "systemd.md")),
        "etc/systemd/system/edge-agent.service",
        "etc/systemd/system/edge-agent.service.d/nvidia.conf",
        "etc/systemd/system/edge-agent@.service",
        "etc/systemd/system/edge-agent@.service.d/nvidia.conf",
        "etc/sysusers.d/edge-agent.conf",
        "etc/edge-agent/config.toml",
    }
    unit = (staged / "etc/systemd/system/edge-agent.service").read_text()
    assert "ExecStart=/opt/edge/lib/edge-agent/bin/edge-agent run --config /etc/edge-agent/config.toml\n" in unit
    assert "/usr/local" not in unit


def test_nothing_that_was_installed_knows_the_folder_it_was_staged_in(staged: Path) -> None:
    known = subprocess.run(["grep", "-rlF", str(staged), str(staged)], capture_output=True, text=True, check=False)
    assert known.stdout == ""
    known = subprocess.run(["grep", "-rlF", str(ROOT), str(staged)], capture_output=True, text=True, check=False)
    assert [name for name in known.stdout.split() if not name.endswith("pyvenv.cfg")] == []  # which Python it is of
    first = (staged / "opt/edge/lib/edge-agent/bin/edge-agent").read_text().splitlines()[0]
    assert first.startswith("#!/opt/edge/lib/edge-agent/bin/python")


def test_the_staged_agent_runs_from_its_own_packages(staged: Path, tmp_path: Path) -> None:
    python = staged / "opt/edge/lib/edge-agent/bin/python"
    code = "import edge_agent, edgectl, msgspec; print(edge_agent.__file__, edgectl.__file__, msgspec.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(name.startswith(f"{staged}/opt/edge/lib/edge-agent/lib/") for name in done.stdout.split())


def test_the_services_configuration_is_valid_and_has_no_broker_of_its_own(staged: Path) -> None:
    path = staged / "etc/edge-agent/config.toml"
    assert path.stat().st_mode & 0o777 == 0o640
    command = [sys.executable, "-m", "edge_agent", "check", "--config", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from edge_agent import config

    loaded = config.load(path)
    assert not loaded.mqtt.embedded
    shipped = (ROOT / "config.toml").read_text().splitlines()
    changed = [line for line, other in zip(path.read_text().splitlines(), shipped, strict=True) if line != other]
    assert len(changed) == 2


def test_installing_again_changes_nothing_and_uninstalling_leaves_what_is_the_users(
    staged: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(staged, stage, symlinks=True)
    where = {"DESTDIR": str(stage), "PREFIX": "/opt/edge", "PLATFORM": "nvidia", "PYTHON": sys.executable}
    config = stage / "etc/edge-agent/config.toml"
    before = files(stage)
    program = stage / "opt/edge/lib/edge-agent"
    added = next(program.glob("lib/python*/site-packages")) / "of_the_user.py"
    added.write_text("")
    make("install", **where)
    assert files(stage) == before
    assert added.exists()
    assert [path.name for path in program.parent.iterdir()] == ["edge-agent"]

    config.write_text("# mine\n")
    (stage / "etc/systemd/system/edge-agent.service.d/mine.conf").write_text("[Service]\nNice=5\n")
    said = make("install", **{**where, "PLATFORM": "jetson"}).stdout
    assert "config.toml.dist" in said
    assert config.read_text() == "# mine\n"
    assert (stage / "etc/edge-agent/config.toml.dist").read_text().startswith("# edge_agent's configuration")
    drop_ins = {path.name for path in (stage / "etc/systemd/system/edge-agent.service.d").iterdir()}
    assert drop_ins == {"jetson.conf", "mine.conf"}

    venvless = tmp_path / "python3"
    venvless.write_text('#!/bin/sh\ncase $2 in *version_info*) echo "(3, 99)" ;; *) exit 1 ;; esac\n')
    venvless.chmod(0o755)
    assert install_sh("install", **{**where, "PYTHON": str(venvless)}).returncode != 0
    subprocess.run([program / "bin/python", "-c", "import edge_agent, of_the_user"], cwd=tmp_path, check=True)
    assert [path.name for path in program.parent.iterdir()] == ["edge-agent"]

    said = make("uninstall", **where).stdout
    assert "kept: /etc/edge-agent" in said
    kept = {"etc/edge-agent/config.toml", "etc/edge-agent/config.toml.dist"}
    kept.add("etc/systemd/system/edge-agent.service.d/mine.conf")
    assert files(stage) == kept
    assert not program.exists()


ON_A_COPY = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root" || exit 77
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
exec chroot "$1/root" sh -exc "$2"
"""


def on_a_copy_of_this_system(folder: Path, script: str) -> str:
    """What a shell script prints that has this system to itself: what it changes is gone afterwards."""
    if os.geteuid() != 0:
        pytest.skip("installing into the system itself: needs root")
    command = ["unshare", "--mount", "sh", "-c", ON_A_COPY, "sh", str(folder), script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"no overlay can be mounted over the root here: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_into_the_system_it_is_there_and_uninstalled_nothing_is_left(tmp_path: Path) -> None:
    need_program("systemd-sysusers", "systemd")
    need_program("make", "make")
    python = need_python_with_venv(sys.executable)
    script = f"""
        cd {ROOT}
        rm -rf /etc/edge-agent
        make --silent install PYTHON={python} EXTRAS= PLATFORM=nvidia
        [ "$(edge-agent version)" = "$({python} -m edge_agent version)" ]
        edgectl --help >/dev/null
        [ "$(stat -c '%U %G %a' /etc/edge-agent/config.toml)" = "root edge-agent 640" ]
        test -f /usr/local/lib/systemd/system/edge-agent.service
        systemctl -q enable edge-agent.service edge-agent@line-3.service
        debians=/usr/lib/systemd/system/edge-agent.service
        echo >$debians
        mkdir -p /etc/systemd/system/debians.wants
        ln -s $debians /etc/systemd/system/debians.wants
        if make --silent uninstall PURGE=1 2>/dev/null; then exit 1; fi
        edge-agent version
        cp -a /usr/local /before
        make --silent uninstall
        test -f /etc/edge-agent/config.toml
        find /etc/systemd/system -name 'edge-agent*' | grep -x /etc/systemd/system/debians.wants/edge-agent.service
        [ "$(find /etc/systemd/system -name 'edge-agent*' | wc -l)" = 1 ]
        rm -r $debians /etc/systemd/system/debians.wants /usr/local/*
        cp -a /before/. /usr/local
        rm -r /before
        make --silent uninstall PURGE=1
        if id edge-agent; then exit 1; fi
        echo left: $(find /usr/local /etc /var/lib /var/cache -xdev -name '*edge-agent*')
    """
    assert on_a_copy_of_this_system(tmp_path, script).splitlines()[-1] == "left:"


@pytest.mark.parametrize("act", ["install", "uninstall"])
def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path: Path, act: str) -> None:
    theirs = tmp_path / "opt/edge/lib/edge-agent/notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    done = install_sh(act, DESTDIR=str(tmp_path), PREFIX="/opt/edge", PURGE="1", PYTHON=sys.executable)
    assert done.returncode == 1
    assert "is not what was installed" in done.stderr
    assert theirs.read_text() == "mine"


def test_where_nothing_is_installed_nothing_is_taken_away(tmp_path: Path) -> None:
    names = ("etc/edge-agent/config.toml", "var/lib/edge-agent/model.onnx", "opt/typo/share/doc/edge-agent/notes.txt")
    kept = [tmp_path / name for name in names]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    done = install_sh("uninstall", DESTDIR=str(tmp_path), PREFIX="/opt/typo", PURGE="1")
    assert done.returncode == 1
    assert "nothing is taken away" in done.stderr
    assert [path.read_text() for path in kept] == ["mine"] * 3


A_SYSTEMCTL_THAT_TELLS_WHAT_IT_IS_ASKED = """#!/bin/sh
case "$*" in
*is-enabled* | *preset*) exec {systemctl} "$@" ;;
*is-active*) exit 3 ;;
esac
echo asked: "$@"
"""


def test_the_debian_package_waits_for_no_model_and_starts_what_it_may(tmp_path: Path) -> None:
    need_program("systemd-sysusers", "systemd")
    need_program("deb-systemd-helper", "init-system-helpers")
    asks = tmp_path / "systemctl"
    asks.write_text(A_SYSTEMCTL_THAT_TELLS_WHAT_IT_IS_ASKED.format(systemctl=need_program("systemctl", "systemd")))
    asks.chmod(0o755)
    mine = tmp_path / "copy"
    mine.mkdir()
    script = f"""
        cp {ROOT}/systemd/edge-agent.service /usr/lib/systemd/system/
        cp {ROOT}/systemd/sysusers.conf /usr/lib/sysusers.d/edge-agent.conf
        mkdir -p /etc/edge-agent /run/systemd/system
        touch /etc/edge-agent/config.toml
        export PATH={tmp_path}:$PATH DPKG_MAINTSCRIPT_PACKAGE=edge-agent SYSTEMD_OFFLINE=1
        postinst="sh {ROOT}/systemd/debian/postinst configure"
        rm -f /usr/sbin/policy-rc.d
        $postinst ''
        echo an upgrade
        $postinst 0.0.1
        echo forbidden
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        $postinst 0.0.1
        rm /usr/sbin/policy-rc.d
        echo switched off
        /usr/bin/systemctl -q disable edge-agent.service
        $postinst 0.0.1
    """
    said = [line for line in on_a_copy_of_this_system(mine, script).splitlines() if "daemon-reload" not in line]
    instances = "asked: --system --quiet --no-block try-restart edge-agent@*.service"
    assert said == [
        "asked: --system --quiet --no-block start edge-agent.service",
        "an upgrade",
        "asked: --system --quiet --no-block restart edge-agent.service",
        instances,
        "forbidden",
        "switched off",
        instances,
    ]


def test_the_debian_package_has_all_it_needs_in_it(tmp_path: Path) -> None:
    program = need_program("dpkg-deb", "dpkg")
    python = need_python_with_venv(SYSTEM_PYTHON)
    version = subprocess.run([python, "-c", "import sys; print(sys.version_info[1])"], capture_output=True, text=True)
    minor = int(version.stdout)
    if minor < 10:
        pytest.skip(f"{SYSTEM_PYTHON} is 3.{minor}; the agent needs 3.10")
    make("deb", OUT=str(tmp_path), COMPRESS="gzip", PYTHON=python)
    (package,) = tmp_path.glob("edge-agent_*.deb")

    def ask(*arguments: str) -> str:
        return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout

    from edge_agent import __version__

    assert ask("--field", str(package), "Version").strip() == f"{__version__}+py3.{minor}"
    depends = ask("--field", str(package), "Depends")
    assert f"python3 (>= 3.{minor}), python3 (<< 3.{minor + 1})" in depends
    control, content = tmp_path / "control", tmp_path / "content"
    ask("--control", str(package), str(control))
    assert (control / "conffiles").read_text() == "/etc/edge-agent/config.toml\n"
    for script in ("postinst", "prerm", "postrm"):
        assert os.access(control / script, os.X_OK)
    ask("--extract", str(package), str(content))
    checked = subprocess.run(["md5sum", "--quiet", "-c", control / "md5sums"], cwd=content, check=False)
    assert checked.returncode == 0
    assert (content / "usr/lib/systemd/system/edge-agent.service").is_file()
    assert (content / "usr/bin/edge-agent").readlink() == Path("../lib/edge-agent/bin/edge-agent")
    code = "import edge_agent, aiomqtt, numpy; print(edge_agent.__version__)"
    own = content / "usr/lib/edge-agent/bin/python"
    done = subprocess.run([own, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    owners = {line.split()[1] for line in ask("--contents", str(package)).splitlines()}
    assert owners == {"root/root"}
