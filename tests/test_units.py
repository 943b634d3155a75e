"""The systemd units: what systemd itself says of them, and that the two say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rigs import ROOT, need_program

SYSTEMD = ROOT / "systemd"
UNITS = ("edge-agent.service", "edge-agent@.service")
PLATFORMS = ("jetson", "nvidia")
MOST_EXPOSED = 2.0
NEWER_KEYS = {"RestartSteps", "RestartMaxDelaySec"}  # than systemd 252; older ones ignore them and say so


def installed(folder: Path, unit: str, platform: str) -> Path:
    """The unit and a platform's drop-in, as `make install` lays them, with a program that is there."""
    text = (SYSTEMD / unit).read_text()
    path = folder / unit.replace("@", "@line-3")
    path.write_text(text.replace("/usr/local/lib/edge-agent/bin/edge-agent", shutil.which("true") or ""))
    drop_ins = folder / f"{path.name}.d"
    drop_ins.mkdir()
    shutil.copy(SYSTEMD / f"edge-agent.service.d/{platform}.conf", drop_ins)
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = need_program("systemd-analyze", "systemd")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, unit: str, platform: str) -> None:
    path = installed(tmp_path, unit, platform)
    done = analyze("verify", "--man=no", str(path))
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or path.name in line]
    unknown = {match[1] for line in said if (match := re.search(r"Unknown key (?:name )?'(\w+)'", line))}
    assert unknown <= NEWER_KEYS
    assert not [line for line in said if "Unknown key" not in line], done.stderr
    assert "edge-agent" in analyze("verify", "--man=no", broken(path)).stderr  # so it looks at what it is given


def broken(path: Path) -> str:
    path.write_text(path.read_text().replace("[Service]\n", "[Service]\nMemoryHigh=lots\n"))
    return str(path)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_is_exposed_no_more_than_it_must_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str, platform: str
) -> None:
    path = installed(tmp_path, unit, platform)
    done = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager", str(path))
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze security --offline: needs systemd 250")
    verdict = done.stdout.strip().splitlines()[-1]
    with capsys.disabled():
        print(f"\n{unit} with {platform}.conf: {verdict.removeprefix('→ ')}")
    number = re.search(r"(\d+\.\d) ", verdict)
    assert number, done.stdout + done.stderr
    assert float(number[1]) <= MOST_EXPOSED
    assert done.returncode == 0


def test_an_instance_is_the_single_service_with_folders_of_its_own() -> None:
    single, template = ((SYSTEMD / unit).read_text().partition("[Unit]\n")[2] for unit in UNITS)
    expected = single
    for ours, its in (
        ("Description=Edge AI agent:", "Description=Edge AI agent %i:"),
        ("/etc/edge-agent/config.toml", "/etc/edge-agent/%i.toml"),
        ("Directory=edge-agent\n", "Directory=edge-agents/%i\n"),
        ("%S/edge-agent", "%S/edge-agents/%i"),
        ("%C/edge-agent", "%C/edge-agents/%i"),
        ("/etc/default/edge-agent", "/etc/default/edge-agent-%i"),
        ("systemctl edit edge-agent", "systemctl edit edge-agent@"),
    ):
        assert ours in expected
        expected = expected.replace(ours, its)
    assert template == expected


def test_the_units_exit_statuses_are_the_programs() -> None:
    from edge_agent import cli

    assert f"RestartPreventExitStatus={cli.EX_CONFIG}\n" in (SYSTEMD / UNITS[0]).read_text()
    told = (ROOT / "docs/systemd.md").read_text()
    for status in (cli.EX_OK, cli.EX_FAILED, cli.EX_GPU_LOST, cli.EX_CONFIG):
        assert f"| {status} |" in told


def test_the_user_and_groups_of_the_unit_are_made(tmp_path: Path) -> None:
    program = need_program("systemd-sysusers", "systemd")
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).write_text("root:x:0:0:root:/root:/bin/sh\n" if name == "passwd" else "root:x:0:\n")
    command = [program, f"--root={tmp_path}", str(SYSTEMD / "sysusers.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    groups = {line.split(":")[0]: line.split(":")[3] for line in (tmp_path / "etc/group").read_text().splitlines()}
    lines = (SYSTEMD / UNITS[0]).read_text().splitlines()
    wanted = dict(line.split("=", 1) for line in lines if line.startswith(("User=", "Supplementary")))
    assert f"{wanted['User']}:x:" in (tmp_path / "etc/passwd").read_text()
    assert {groups[group] for group in wanted["SupplementaryGroups"].split()} == {wanted["User"]}
