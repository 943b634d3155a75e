"""`edgectl dashboard` in a real browser, beside a real agent and a real broker."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from edgectl.dashboard.server import files

from tests import rigs
from tests.browser import Browser
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, free_port, wait_until

pytestmark = pytest.mark.slow

CAMERA = '[cameras.gate]\nsource = "synthetic"\nfps = 10.0\nwidth = 320\nheight = 240\n'
BODY = f'[model]\nactive = "demo-320"\nprobation_frames = 5\n[inference]\nbackend = "onnx"\n{CAMERA}'
UNKNOWN = "\N{EN DASH}"
COMMAND = (sys.executable, "-c", "from edgectl.app import main; main()", "dashboard")


class Dashboard:
    """`edgectl dashboard` in a process of its own, on a free port."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--config", str(config), "--port", "0", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.said = json.loads(line)
        self.url: str = self.said["url"]
        self.port = urlsplit(self.url).port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, None if body is None else json.dumps(body), names)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    @contextmanager
    def events(self, device: str = DEVICE) -> Iterator[Callable[[Callable[[Any], bool]], Any]]:
        """The stream of news as a page gets it: call it with what to wait for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        connection.request("GET", f"/api/events?device={device}")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Content-Type")) == (200, "text/event-stream")

        def wait(accept: Callable[[Any], bool]) -> Any:
            for line in answer:
                if line.startswith(b"data: ") and accept(told := json.loads(line[6:])):
                    return told
            raise AssertionError("the stream has ended")

        try:
            yield wait
        finally:
            answer.close()
            connection.close()

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=15)
        assert (self.process.returncode, said) == (0, ""), said


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, own_broker: Broker) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path_factory.mktemp("agent"), rigs.config(own_broker.port, BODY)) as agent:
        wait_until(lambda: agent.events("agent.running"))
        yield agent


@pytest.fixture(scope="module")
def dashboard(agent: AgentProcess) -> Iterator[Dashboard]:
    with Dashboard(agent.config, "--allow-commands") as dashboard:
        yield dashboard


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """Whatever a test does, the page has nothing to complain of."""
    yield started
    complaints = started.complaints()
    started.open("about:blank")
    assert complaints == []


def frames_per_second(browser: Browser) -> str:
    return browser.text("#devices tbody tr td.number")


def picture(browser: Browser) -> int:
    """The number of the picture that is shown, once the browser has decoded it; else 0."""
    return int(
        browser.run(
            "const image = document.querySelector('#cameras img');"
            "return image && image.complete && image.naturalWidth === 320 ? Number(image.dataset.number) : 0"
        )
    )


def is_moving(browser: Browser) -> bool:
    """Whether the plot of the frame rate has points, and then more of them."""
    count = "return document.querySelector('#plots .curve')?.getAttribute('points')?.split(' ').length ?? 0"
    before = browser.run(count)
    return bool(wait_until(lambda: browser.run(count) > before, what="the plot goes on"))


def test_the_page_shows_numbers_that_move_and_pictures_that_follow(browser: Browser, dashboard: Dashboard) -> None:
    browser.open(dashboard.url)
    wait_until(lambda: re.fullmatch(r"\d+\.\d", frames_per_second(browser)), what="a rate")
    assert float(frames_per_second(browser)) == pytest.approx(10, abs=6)
    assert DEVICE in browser.text("#devices tbody tr")
    assert browser.text("#broker") == "connected"
    first = wait_until(lambda: picture(browser), what="a picture")
    wait_until(lambda: picture(browser) > first, what="another picture")
    assert is_moving(browser)
    assert re.search(r"^gate\s+running\s+320.240, \d+\.\d frames/s", browser.text("#cameras li .camera"))
    assert "p95" in browser.text("#plots")
    assert "connected" in browser.text("#health")
    assert browser.text("#model-now").startswith("demo-320 1 (detect) on onnx")


def test_nothing_comes_from_elsewhere(browser: Browser, dashboard: Dashboard) -> None:
    browser.open(dashboard.url)
    wait_until(lambda: picture(browser), what="a picture")
    loaded = browser.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert {name.rpartition("/")[2] for name in loaded} > {"app.js", "plot.js", "style.css"}
    assert [name for name in loaded if not name.startswith(dashboard.url)] == []
    for path, file in files().items():
        text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in re.sub(r"https?://www\.w3\.org", "", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|eval\(|<script>|\sstyle=|\son\w+=", text), path


def test_the_model_is_chosen_and_swapped(browser: Browser, dashboard: Dashboard, own_broker: Broker) -> None:
    browser.open(dashboard.url)
    wait_until(lambda: "demo-160" in browser.text("#models"), what="models to choose from")
    wait_until(lambda: not browser.run("return document.querySelector('#activate button').disabled"))
    with Probe(own_broker.port) as probe:
        browser.send_keys("#models", "demo-160")
        browser.click("#activate button")
        shown = wait_until(lambda: browser.text("#jobs"), what="how it goes")
        assert "model.activate" in shown
        probe.wait("cameras/gate/results", lambda result: result["model"]["name"] == "demo-160")
        wait_until(lambda: re.search(r"^done\s+model.activate: demo-160 runs in", browser.text("#jobs")))
        wait_until(lambda: browser.text("#model-now").startswith("demo-160 1 (detect)"))
        jobs = [one.json()["phase"] for one in probe.on("jobs/+")]
    assert jobs, "there was progress to show"
    status, _, body = dashboard.ask("POST", "/api/activate", {"device": DEVICE, "model": "demo-320"})
    assert (status, json.loads(body)["error"]) == (403, "this page is of an earlier start; load it again")


def test_why_a_model_does_not_run_is_told(browser: Browser, dashboard: Dashboard) -> None:
    with dashboard.events() as wait:
        token = wait(lambda told: "page" in told)["page"]["token"]
        asked = {"device": DEVICE, "model": "demo-161"}
        headers = {"Content_Type": "application/json", "X_Edge_Token": token}
        status, _, body = dashboard.ask("POST", "/api/activate", asked, **headers)
        job = json.loads(body)["job"]
        told = wait(lambda told: told["detail"]["jobs"][job]["state"] == "failed" if _jobs(told, job) else False)
    failed = told["detail"]["jobs"][job]
    assert (status, failed["code"]) == (202, "model_not_found")
    assert failed["message"].startswith("there is no model 'demo-161'; did you mean")
    status, _, body = dashboard.ask("POST", "/api/activate", {**asked, "device": "nobody"}, **headers)
    assert (status, json.loads(body)["error"]) == (409, "nobody is not online, so the command would be lost")
    assert dashboard.ask("POST", "/api/activate", {"device": 1}, **headers)[0] == 400
    assert dashboard.ask("POST", "/api/activate", asked, X_Edge_Token=token, Content_Type="text/plain")[0] == 415
    elsewhere = {**headers, "Origin": "http://evil.example"}
    assert dashboard.ask("POST", "/api/activate", asked, **elsewhere)[0] == 403


def _jobs(told: Any, job: str) -> bool:
    return job in told.get("detail", {}).get("jobs", {})


def test_the_page_outlives_the_broker(browser: Browser, dashboard: Dashboard, own_broker: Broker) -> None:
    browser.open(dashboard.url)
    wait_until(lambda: picture(browser), what="a picture")
    own_broker.kill()
    try:
        wait_until(lambda: "The broker is away: " in browser.text("#alarm"), what="the page says so")
        assert browser.text("#broker") == "no broker"
        before = picture(browser)
    finally:
        own_broker.start()
    wait_until(lambda: browser.text("#broker") == "connected", timeout_s=30, what="connected again")
    assert browser.text("#alarm") == ""
    wait_until(lambda: re.fullmatch(r"\d+\.\d", frames_per_second(browser)), timeout_s=60, what="a rate")
    wait_until(lambda: picture(browser) > before, timeout_s=30, what="a new picture")


def test_old_figures_are_not_shown_as_new(browser: Browser, dashboard: Dashboard, agent: AgentProcess) -> None:
    browser.open(dashboard.url)
    wait_until(lambda: re.fullmatch(r"\d+\.\d", frames_per_second(browser)), what="a rate")
    agent.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: frames_per_second(browser) == UNKNOWN, what="nothing is known any more")
        assert browser.run("return document.querySelectorAll('.legend')[2].textContent").strip() == (
            f"GPU {UNKNOWN} CPU {UNKNOWN}"
        )
    finally:
        agent.process.send_signal(signal.SIGCONT)
    wait_until(lambda: re.fullmatch(r"\d+\.\d", frames_per_second(browser)), what="a rate again")


def test_what_strangers_publish_is_text(browser: Browser, dashboard: Dashboard, own_broker: Broker) -> None:
    name, fact = "<b id=evil>x<b>", "<img src=x onerror=document.title='evil'>"
    health = {"schema": 1, "device": name, "at": "2026-11-26T14:40:48Z", "state": "failed"}
    check = {"state": "failed", "fact": fact, "since": "2026-11-26T14:40:48Z", "age_s": 0.0}
    with Probe(own_broker.port, "nothing") as probe:
        probe.publish(f"edge/{name}/available", "online", retain=True)
        probe.publish(f"edge/{name}/health", json.dumps({**health, "checks": {fact: check}}), retain=True)
        browser.open(dashboard.url)
        wait_until(lambda: name in browser.text("#devices"), what="the stranger's name")
        browser.run("location.hash = 'device=' + encodeURIComponent(arguments[0])", name)
        wait_until(lambda: fact in browser.text("#health"), what="the stranger's fact")
        assert browser.text("#device-title") == name
        assert browser.run("return document.querySelectorAll('#evil, #health img').length") == 0
        for leaf in ("health", "available"):
            probe.publish(f"edge/{name}/{leaf}", "", retain=True)
        wait_until(lambda: name not in browser.text("#devices"), what="the stranger is gone")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_and_the_night(browser: Browser, dashboard: Dashboard, dark: bool) -> None:
    browser.emulate(width=360, height=740, dark=dark)
    try:
        browser.open(dashboard.url)
        wait_until(lambda: picture(browser), what="a picture")
        assert browser.run("return document.documentElement.scrollWidth") == 360
        contrast = browser.run(CONTRAST)
        assert (contrast["page"] < 0.2) == dark
        assert contrast["least"] >= 4.5, contrast  # https://www.w3.org/TR/WCAG22/#contrast-minimum
        unnamed = (
            "return document.querySelectorAll('img:not([alt]):not([hidden]), svg[role=img]:not([aria-label])').length"
        )
        assert browser.run(unnamed) == 0
    finally:
        browser.emulate(width=1280, height=900, dark=False)


CONTRAST = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  const colour = getComputedStyle(element).backgroundColor;
  return colour.startsWith("rgb(") || !element.parentElement ? colour : behind(element.parentElement);
};
let least = 21, where = "";
for (const element of document.querySelectorAll("p, th, td, span, strong, a, h1, h2, h3, button, label")) {
  if (!element.innerText?.trim() || !element.checkVisibility()) continue;
  const [one, other] = [light(getComputedStyle(element).color), light(behind(element))];
  const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (contrast < least) [least, where] = [contrast, `${element.id} ${element.className} ${element.innerText}`];
}
return { least, where, page: light(getComputedStyle(document.body).backgroundColor) };
"""


def test_it_is_read_only_unless_told_otherwise(browser: Browser, agent: AgentProcess) -> None:
    with Dashboard(agent.config) as dashboard:
        assert dashboard.said["allow_commands"] is False
        browser.open(dashboard.url)
        wait_until(lambda: "--allow-commands" in browser.text("#read-only"), what="how to change that")
        assert browser.text("#activate") == ""
        asked = {"device": DEVICE, "model": "demo-160"}
        status, _, body = dashboard.ask("POST", "/api/activate", asked, Content_Type="application/json")
        assert (status, json.loads(body)["error"]) == (
            403,
            "commands are off; start the dashboard with --allow-commands",
        )
        browser.open("about:blank")


def test_every_answer_is_guarded_and_strangers_names_are_refused(dashboard: Dashboard) -> None:
    for path, wanted in (("/", 200), ("/app.js", 200), ("/nothing", 404), ("/../app.js", 404), ("/%2e%2e/", 404)):
        status, headers, _ = dashboard.ask("GET", path)
        assert status == wanted, path
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert (headers["X-Content-Type-Options"], headers["Cross-Origin-Resource-Policy"]) == (
            "nosniff",
            "same-origin",
        )
    status, _, body = dashboard.ask("GET", "/", Host=f"evil.example:{dashboard.port}")
    assert (status, json.loads(body)["error"]) == (421, "this is no name of this server; use its address")
    assert dashboard.ask("GET", "/api/events", Host="evil.example")[0] == 421
    assert dashboard.ask("DELETE", "/")[0] == 405
    assert dashboard.ask("GET", f"/api/picture?device={DEVICE}&camera=none")[0] == 404


def test_pictures_are_asked_for_while_somebody_looks(dashboard: Dashboard, own_broker: Broker) -> None:
    def asked() -> int:
        return sum(message.json()["command"] == "camera.snapshot" for message in probe.on("cmd"))

    with Probe(own_broker.port) as probe:
        with dashboard.events("somebody-else") as wait:
            wait(lambda told: "stats" in str(told) and DEVICE in told.get("devices", {}))
            probe.wait("stats", n=2)
            assert asked() == 0
        with dashboard.events() as wait:
            told = wait(lambda told: told.get("detail", {}).get("pictures", {}).get("gate", {}).get("number"))
        assert asked() >= 1
        number = told["detail"]["pictures"]["gate"]["number"]
        assert number > 0
        wait_until(lambda: dashboard.ask("GET", f"/api/picture?device={DEVICE}&camera=gate")[0] == 404)
        before = asked()
        probe.wait("stats", n=3)
        assert asked() == before


def test_a_browser_that_takes_nothing_holds_nobody_up(tmp_path: Path, own_broker: Broker) -> None:
    (tmp_path / "config.toml").write_text(f'[mqtt]\nport = {own_broker.port}\nprefix = "crowd"\n')
    with Dashboard(tmp_path / "config.toml") as dashboard, Probe(own_broker.port, "nothing") as probe:
        with dashboard.events() as wait:
            for number in range(400):  # so much that no buffer on the way holds it
                probe.publish(f"crowd/{number:0>9000}/available", "online")
            wait(lambda told: f"{399:0>9000}" in told.get("devices", {}))
        with socket.socket() as slow, dashboard.events() as wait:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", dashboard.port))
            slow.sendall(f"GET /api/events HTTP/1.1\r\nHost: localhost:{dashboard.port}\r\n\r\n".encode())
            slow.recv(1, socket.MSG_PEEK)
            for word in ("one", "two", "three", "four", "five"):
                probe.publish("crowd/a/available", word)
                assert wait(lambda told, word=word: available(told) == word)
            late = told_late(slow)
    assert late == [None, "five"]  # what was when it came, and then what is


def available(told: Any) -> str | None:
    """What device `a` says, if that is news."""
    return told.get("devices", {}).get("a", {}).get("available")  # type: ignore[no-any-return]


def told_late(slow: socket.socket) -> list[str | None]:
    """What there is to read, up to the newest."""
    said: list[str | None] = []
    with slow.makefile("rb") as lines:
        while "five" not in said:
            if (line := lines.readline()).startswith(b"data: "):
                said.append(available(json.loads(line[6:])))
    return said


def test_it_starts_without_a_broker_and_says_so(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "config.toml").write_text(f'[mqtt]\nhost = "127.0.0.1"\nport = {free_port()}\n')  # no cameras here
    with Dashboard(tmp_path / "config.toml") as dashboard:
        browser.open(dashboard.url)
        alarm = wait_until(lambda: "refused" in browser.text("#alarm") and browser.text("#alarm"), what="why")
        assert alarm.startswith("The broker is away: no broker at 127.0.0.1:")
        assert browser.text("#no-devices") == "No device has said anything yet."
        browser.open("about:blank")


def test_what_keeps_it_from_starting_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[mqtt]\nprot = 1\n")
    (tmp_path / "good.toml").write_text("[mqtt]\nport = 1\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, said in (
            (
                ("--config", "good.toml", "--port", str(port)),
                f"error: port {port} of 127.0.0.1 is taken; choose another",
            ),
            (("--config", "good.toml", "--listen", "192.0.2.1"), "error: --listen 192.0.2.1: this machine has no such"),
            (("--config", "good.toml", "--listen", "no such"), "error: --listen no such: this machine has no such"),
            (("--config", "none.toml"), "error: --config none.toml: there is no such file"),
            (("--config", "bad.toml"), "error: mqtt.prot: unknown key"),
        ):
            done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=30)
            assert (done.returncode, done.stdout) == (1, ""), done.stderr
            assert done.stderr.startswith(said), done.stderr
            assert "Traceback" not in done.stderr
