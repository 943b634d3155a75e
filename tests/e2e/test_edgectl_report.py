"""`edgectl report`, as people run it: all of it in one folder, and nothing secret in any of its files."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pytest
from edgectl.report import _history, _plots, _secrets
from edgectl.report._secrets import Secrets
from hypothesis import given
from hypothesis import strategies as st

from tests import brokers
from tests.rigs import DEVICE, AgentProcess, Probe, Server, config, free_port

CAMERAS = """
[cameras.a]
source = "synthetic"
width = 320
height = 240
[cameras.gate]
source = "rtsp"
url = "rtsp://admin:c0met%40night@127.0.0.1:1/x"
[cameras.door]
source = "rtsp"
url = "rtsp://admin:${DOOR}@127.0.0.1:1/x"
"""
SECRETS = (brokers.PASSWORD, "c0met%40night", "c0met@night", "d00rbell", "b0ttle-neck", "a-t0ken-of-mine")
FILES = {"index.html", "agent.json", "stats.jsonl", "latency.csv", "doctor.json", "config.json", "models.json"}


def report(folder: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from edgectl.app import main; main()", "report", *arguments]
    environ = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), **(environ or {})}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)


class Page(HTMLParser):
    """What a page refers to, its text, and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [f"{name}={value}" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data

    def titles(self) -> list[str]:
        return [svg.get("aria-label", "") for svg in self.svgs]


@pytest.fixture(scope="module")
def rights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with brokers.passwords(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, rights: Server) -> Path:
    """The folder in which an agent ran and a report was made of it; its log tells more than it should."""
    folder = tmp_path_factory.mktemp("report")
    environ = {"DOOR": "d00rbell", "CAMERA_TOKEN": "a-t0ken-of-mine"}
    text = config(rights.port, CAMERAS, mqtt=rights.mqtt)
    with Probe(rights.plain_port) as probe, AgentProcess(folder, text, environ=environ):
        probe.wait("cameras/a/results")
        (folder / "more.log").write_text(
            "a line of a plug-in: d00rbell, c0met@night and a-t0ken-of-mine\n"
            f'{{"event": "x", "password": "b0ttle-neck", "url": "mqtt://agent:{brokers.PASSWORD}@h"}}\n'
        )
        done = report(folder, "out", "--for", "4", "--log", "more.log", "--json", environ=environ)
    assert done.returncode == 0, done.stderr
    (folder / "told.json").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_the_folder_holds_what_it_says_and_nothing_secret(made: Path) -> None:
    told = json.loads((made / "told.json").read_text())
    written = {path.name: path.read_text() for path in (made / "out").iterdir()}
    assert set(written) == set(told["files"])
    assert set(written) >= FILES
    assert {name: secret for name, text in written.items() for secret in SECRETS if secret in text} == {}
    assert "a line of a plug-in: ***, *** and ***" in written["log.txt"]
    assert json.loads(written["config.json"])["cameras"]["gate"]["url"] == "rtsp://admin:***@127.0.0.1:1/x"
    assert (made / "out").stat().st_mode & 0o077 == 0
    assert told["device"] == DEVICE
    assert told["log_lines"] == 2


@pytest.mark.slow
def test_its_numbers_are_those_that_were_heard(made: Path) -> None:
    told = json.loads((made / "told.json").read_text())
    rows = list(csv.DictReader((made / "out" / "latency.csv").read_text().splitlines()))
    stats = [json.loads(line) for line in (made / "out" / "stats.jsonl").read_text().splitlines()]
    last = json.loads((made / "out" / "agent.json").read_text())
    assert told["listened_s"] == pytest.approx(4, abs=1)
    assert (len(rows), len(stats)) == (told["results"], told["stats"])
    assert len(stats) >= 2
    assert {row["camera"] for row in rows} == {"a"}
    assert [int(row["seq"]) for row in rows] == sorted({int(row["seq"]) for row in rows})
    assert (last["available"], last["status"]["device"]) == ("online", DEVICE)
    assert last["health"]["checks"]["camera.gate"]["state"] == "failed"
    doctor = json.loads((made / "out" / "doctor.json").read_text())
    assert {"state": "ok", "what": "login", "fact": "MQTT 5 with user 'agent'", "fix": None} in doctor
    page = Page((made / "out" / "index.html").read_text())
    totals = sorted(float(row["total"]) for row in rows)
    p50, p95 = (totals[math.ceil(share * len(totals)) - 1] for share in (0.5, 0.95))
    assert f"total{p50:.2f}{p95:.2f}" in page.text.replace("\n", "")


@pytest.mark.slow
def test_the_page_has_plots_and_needs_nothing_from_elsewhere(made: Path) -> None:
    text = (made / "out" / "index.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert page.titles() == [
        "Latency, capture to result",
        "Latency over time",
        "Frames inferred a second",
        "p95 by stage, as the agent counts it",
        "Memory of the agent",
        "Memory in use",
    ]
    for svg in page.svgs:
        assert svg.findall("polyline") or svg.findall("rect")
    for words in ("camera.gate", "demo-320", "a line of a plug-in", "numpy==", f"edge-agent report: {DEVICE}"):
        assert words in page.text


@pytest.mark.slow
def test_without_an_agent_the_rest_is_collected(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "config.toml").write_text(config(port, CAMERAS))
    done = report(tmp_path, "deep/down", environ={"DOOR": "d00rbell", "PATH": ""})
    assert done.returncode == 0, done.stderr
    [no_broker] = done.stderr.splitlines()
    assert no_broker.startswith(f"note: no broker at 127.0.0.1:{port} (")
    page = Page((tmp_path / "deep" / "down" / "index.html").read_text())
    assert page.svgs == []
    assert "Nothing was heard that could be drawn." in page.text
    assert "there is no journalctl here; give the agent's log with --log" in page.text
    assert f"no broker at 127.0.0.1:{port}: Connection refused" in page.text


@pytest.mark.slow
def test_of_a_broken_configuration_no_secret_is_told_either(tmp_path: Path, broker: Server) -> None:
    broken = config(broker.port, CAMERAS, mqtt='password = "b0ttle-neck"\nusernam = "x"')
    (tmp_path / "config.toml").write_text(broken)
    (tmp_path / "bin").mkdir()
    journalctl = tmp_path / "bin" / "journalctl"
    journalctl.write_text('#!/bin/sh\necho "asked: $*; b0ttle-neck"\n')
    journalctl.chmod(0o755)
    environ = {"DOOR": "d00rbell", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = report(tmp_path, "out", "--for", "0", "--unit", "edge-agent@line-3", environ=environ)
    assert done.returncode == 0, done.stderr
    assert "mqtt.usernam: unknown key" in done.stderr
    assert f"{DEVICE} said nothing: it does not run, or has another name or prefix" in done.stderr
    journal = (tmp_path / "out" / "log.txt").read_text()
    assert journal.startswith("asked: --unit edge-agent@line-3 ")
    assert "***" in journal
    every = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert [secret for secret in SECRETS if secret in every] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("full",), "full is not empty; give the name of a new folder"),
        (("full/a",), "full/a is a file; give the name of a new folder"),
        (("/proc/none",), "/proc/none cannot be made: "),
        (("new", "--log", "gone.log"), "--log gone.log: No such file or directory"),
        (("new", "--config", "gone.toml"), "gone.toml"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_at_once(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    done = report(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "a").read_text() == "mine"


passwords = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=3, max_size=12)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner)


@given(password=passwords, before=st.sampled_from(["", "said ", '{"x": "']))
def test_a_password_of_the_configuration_is_hidden_wherever_it_stands(password: str, before: str) -> None:
    raw = {"mqtt": {"password": password}, "cameras": {"a": {"url": f"rtsp://u:{quote(password, safe='')}@h/x"}}}
    secrets = _secrets.of(raw, None, Path(), environ={})
    assert password not in secrets.text(f"{before}{password} and {quote(password, safe='')}").replace("***", "")
    shown = "".join(strings(secrets.value({**raw, "notes": [f"{before}{password}"]})))
    assert password not in shown.replace("***", "").replace("rtsp://u:@h/x", "").replace(before, "")


@given(word=st.from_regex(r"[A-Za-z0-9]{6,16}", fullmatch=True))
def test_what_is_hidden_of_a_text_is_known(word: str) -> None:
    text = f"location=rtsp://me:{word}@camera/live user-id=me user-pw={word} ! decodebin"
    assert word in list(_secrets.hidden(text))
    assert word not in Secrets(_secrets.hidden(text)).text(f"{text} {word}")


@given(values=st.lists(st.floats(0, 1e6), min_size=1), share=st.sampled_from([0.5, 0.95, 0.99]))
def test_percentiles_are_those_of_numpy(values: list[float], share: float) -> None:
    wanted = np.percentile(values, 100 * share, method="inverted_cdf")
    assert _history.percentile(sorted(values), share) == wanted


@given(most=st.floats(1e-6, 1e9))
def test_ticks_are_round_and_few_and_reach_almost_to_the_end(most: float) -> None:
    ticks = _plots.ticks(most)
    assert 3 <= len(ticks) <= 7 or most < 1e-5
    assert ticks[0] == 0
    assert ticks[-1] <= most * 1.001


@given(values=st.lists(st.floats(0, 1e4), min_size=1, max_size=300))
def test_a_histogram_counts_every_frame_once_and_is_well_formed(values: list[float]) -> None:
    svg = ElementTree.fromstring(_plots.histogram("of <all> & more", {"a & b": values}, x="ms"))
    texts = [element.text for element in svg.iter("text")]
    assert f"a & b ({len(values)})" in texts
    heights = [float(bar.get("height", "nan")) for bar in svg.findall("rect")]
    assert all(math.isfinite(height) and height > 0 for height in heights)


def test_a_line_keeps_gaps_out_and_one_point_is_a_dot() -> None:
    assert _plots.lines("none", {"a": []}) == ""
    svg = ElementTree.fromstring(_plots.lines("one", {"a": [(0.0, 5.0)], "b": []}, y="MB"))
    assert len(svg.findall("circle")) == 1
    assert [element.text for element in svg.iter("text")].count("a") == 1
