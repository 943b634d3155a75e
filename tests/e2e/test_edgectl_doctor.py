"""`edgectl doctor`, as people run it: on machines that lack things, and beside brokers that refuse them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import pytest
from edgectl.doctor import _machine
from edgectl.doctor._subject import Subject

from edge_agent.backends import nvidia_devices
from edge_agent.sensors.jetson import JetsonSensor
from tests import brokers
from tests.jetson_trees import XAVIER_NX_JETPACK_5, planted
from tests.rigs import DEVICE, AgentProcess, Probe, Server, config, free_port, need_program

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\nwidth = 320\nheight = 240\n'


def doctor(folder: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from edgectl.app import main; main()", "doctor", *arguments]
    environ = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), **(environ or {})}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)


def findings(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    states = {one["state"] for one in told["findings"]}
    assert told["state"] == next(state for state in ("fail", "warn", "ok") if state in states)
    assert done.returncode == int("fail" in states)
    listed: list[dict[str, Any]] = told["findings"]
    return listed


def of(listed: list[dict[str, Any]], what: str) -> list[tuple[str, str]]:
    return [(one["state"], one["fact"]) for one in listed if one["what"] == what]


def look(folder: Path, port: int, *arguments: str, mqtt: str = "") -> list[dict[str, Any]]:
    """The findings beside a broker."""
    (folder / "config.toml").write_text(config(port, CAMERA, mqtt=mqtt))
    return findings(doctor(folder, "--json", *arguments))


def test_it_says_in_plain_words_that_there_is_no_gpu_no_camera_and_no_broker(tmp_path: Path) -> None:
    if nvidia_devices() or list(Path("/dev").glob("video*")):
        pytest.skip("this machine has a GPU or a camera")
    port = free_port()
    (tmp_path / "config.toml").write_text(config(port, CAMERA))
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert "no NVIDIA GPU here; models run on the CPU" in done.stdout
    assert "no camera here: there is no /dev/video*" in done.stdout
    assert f"no broker at 127.0.0.1:{port}: Connection refused" in done.stdout
    assert "→ start the broker, or correct host and port in [mqtt]" in done.stdout
    assert "will not work: broker;" in done.stdout.splitlines()[-1]
    assert done.stderr == ""


def test_without_a_file_the_defaults_are_looked_at(tmp_path: Path) -> None:
    if Path("/etc/edge-agent/config.toml").exists():
        pytest.skip("this machine has the service's configuration")
    listed = findings(doctor(tmp_path, "--json"))
    [(state, fact)] = of(listed, "config")
    assert (state, "built-in defaults" in fact) == ("warn", True)
    assert of(listed, "model") == [("ok", "demo-320: ran once here")]


def test_beside_a_running_agent_all_is_well_and_the_agent_takes_no_notice(tmp_path: Path, broker: Server) -> None:
    with Probe(broker.plain_port) as probe, AgentProcess(tmp_path, config(broker.port, CAMERA)):
        probe.wait("cameras/a/results")
        listed = findings(doctor(tmp_path, "--json"))
        after = probe.wait("stats", n=len(probe.on("stats")) + 1)[-1].json()
        [told] = probe.wait("reply/+")
        others = [message.topic for message in list(probe.heard) if "doctor" in message.topic]
    assert "fail" not in {one["state"] for one in listed}
    assert of(listed, "login") == [("ok", "MQTT 5 with no user name")]
    [(_, listens), (_, came_back)] = of(listed, "acl")
    assert listens == f"may subscribe to edge/{DEVICE}/cmd, edge/all/cmd"
    assert came_back.startswith(f"a message came back on {told.topic} after ")
    assert (told.json()["device"], told.retain, others) == (DEVICE, False, [told.topic])
    assert after["commands"] == {}, "the agent was told nothing"
    assert of(listed, "camera") == [("ok", "a: its settings fit together (synthetic; it was not opened)")]


@pytest.fixture(scope="module")
def rights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with brokers.acl_file(tmp_path_factory.mktemp("rights")) as broker:
        yield broker


def test_a_publish_that_the_acl_denies_is_told_apart(tmp_path: Path, rights: Server) -> None:
    mute = brokers.login(tmp_path, "mute")
    denied = of(look(tmp_path, rights.port, "--acl", mqtt=mute), "acl")
    assert [state for state, _ in denied] == ["ok", "ok", "fail", "fail"]
    for leaf, (_, fact) in zip(("results", "events"), denied[2:], strict=True):
        assert fact == f"publishing to edge/{DEVICE}/cameras/edgectl-doctor/{leaf} is refused: Not authorized"


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("5", "this user may write there, and not read"),
        pytest.param("3.1.1", "MQTT 3.1.1 does not tell why", marks=pytest.mark.soak),
    ],
)
def test_a_message_that_does_not_come_back_is_told(tmp_path: Path, rights: Server, protocol: str, words: str) -> None:
    mqtt = f'{brokers.login(tmp_path, "deaf")}\nprotocol = "{protocol}"'
    listed = look(tmp_path, rights.port, mqtt=mqtt)
    assert of(listed, "login") == [("ok", f"MQTT {protocol} with user 'deaf'")]
    state, fact = of(listed, "acl")[-1]
    assert state == "warn"
    assert words in fact


def test_a_refused_subscription_is_told(tmp_path: Path) -> None:
    with brokers.acl(tmp_path) as broker:
        listed = look(tmp_path, broker.port, mqtt=brokers.login(tmp_path, "deaf"))
    assert of(listed, "acl")[0] == ("fail", f"subscribing is refused: edge/{DEVICE}/cmd, edge/all/cmd")


def test_a_wrong_password_is_told_and_not_shown(tmp_path: Path, rights: Server) -> None:
    mqtt = brokers.login(tmp_path, "agent", "wr0ng-password")
    listed = look(tmp_path, rights.port, mqtt=mqtt)
    [(state, fact)] = of(listed, "login")
    assert state == "fail"
    assert "check mqtt.username and mqtt.password" in fact
    assert "wr0ng" not in json.dumps(listed)
    assert of(listed, "acl") == []


@pytest.mark.soak
def test_a_broker_that_hangs_is_told_in_time(tmp_path: Path) -> None:
    with brokers.plain(tmp_path) as broker:
        broker.freeze()
        listed = look(tmp_path, broker.port)
    assert of(listed, "broker") == [("ok", f"127.0.0.1:{broker.port} accepts connections")]
    [(state, fact)] = of(listed, "login")
    assert (state, "the broker did not answer for 5 s" in fact) == ("fail", True)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        pytest.param("time.sleep(1000)", "said nothing for 4 s, and was left", marks=pytest.mark.soak),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the check crashed: SIGSEGV"),
        ("raise RuntimeError('it broke')", "cannot be looked at: RuntimeError: it broke"),
    ],
)
def test_a_check_that_hangs_crashes_or_raises_is_a_line(tmp_path: Path, act: str, words: str) -> None:
    """An OpenCV that does so when it is asked how it was built."""
    broken = f"import os, signal, time\n__version__ = '0'\ndef getBuildInformation():\n    {act}\n"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cv2.py").write_text(broken)
    (tmp_path / "config.toml").write_text(config(free_port(), CAMERA))
    environ = {"PYTHONPATH": str(tmp_path / "broken")}
    listed = findings(doctor(tmp_path, "--json", "--timeout", "4", environ=environ))
    assert of(listed, "opencv") == [("fail", words)]
    assert of(listed, "config") == [("ok", "config.toml")], "what comes after it is looked at"
    assert of(listed, "broker")[0][0] == "fail"


def test_a_wheel_that_hides_another_opencv_is_told(tmp_path: Path) -> None:
    (tmp_path / "dist-packages").mkdir()
    (tmp_path / "dist-packages" / "cv2.py").write_text("")
    wheels = Path(cv2.__file__).parent.parent
    environ = {"PYTHONPATH": f"{wheels}{os.pathsep}{tmp_path / 'dist-packages'}"}
    told = of(findings(doctor(tmp_path, "--json", environ=environ)), "opencv")
    hidden = f"{wheels / 'cv2'} hides another OpenCV, {tmp_path / 'dist-packages' / 'cv2.py'}"
    assert [fact.startswith(hidden) for state, fact in told if state == "warn"] == [True]


def test_a_driver_of_an_older_generation_than_cuda_for_python_is_told(tmp_path: Path) -> None:
    if nvidia_devices():
        pytest.skip("this machine has a GPU")
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *number) { *number = 12060; return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    compiler = need_program("gcc", "gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")], check=True)
    (tmp_path / "config.toml").write_text(config(free_port(), f'[inference]\nbackend = "tensorrt"\n{CAMERA}'))
    listed = findings(doctor(tmp_path, "--json", environ={"LD_LIBRARY_PATH": str(tmp_path)}))
    [(state, fact)] = of(listed, "driver")
    assert (state, fact.endswith("knows CUDA up to 12.6")) == ("ok", True)
    [python] = [one for one in listed if one["what"] == "cuda python"]
    assert python["state"] == "fail", "TensorRT is asked for by name"
    assert "pip install 'cuda-bindings<13'" in python["fix"]


def test_every_mistake_in_the_configuration_is_a_line_and_what_can_be_read_is_looked_at(tmp_path: Path) -> None:
    broken = config(free_port(), f'[model]\nactive = "demo-321"\n[inference]\nscore_treshold = 0.5\n{CAMERA}')
    (tmp_path / "config.toml").write_text(broken)
    listed = findings(doctor(tmp_path, "--json"))
    wrong = [fact for state, fact in of(listed, "config") if state == "fail"]
    assert any("inference.score_treshold" in fact for fact in wrong)
    assert any("did you mean 'demo-320'?" in fact for fact in wrong)
    assert of(listed, "broker")[0][0] == "fail"


def test_a_state_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config(free_port(), CAMERA))
    listed = findings(doctor(tmp_path, "--json", environ={"XDG_STATE_HOME": "/proc/none"}))
    [(state, fact)] = of(listed, "state")
    assert state == "fail"
    assert fact.startswith("/proc/none/edge-agent: ")
    assert "may not write there" in fact


def test_a_configuration_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--config", "gone.toml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "gone.toml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_jetson_is_told_by_its_model_and_its_jetpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted(tmp_path, XAVIER_NX_JETPACK_5) as root:
        monkeypatch.setattr(_machine, "is_jetson", lambda: True)
        monkeypatch.setattr(_machine, "JetsonSensor", lambda: JetsonSensor(root))
        found = list(_machine.board(Subject(None)))
    known, hot = [(one.state, one.fact) for one in found]
    assert known[0] == "ok"
    assert known[1].startswith("NVIDIA Jetson Xavier NX Developer Kit; JetPack 5.1.2 (L4T 35.4.1), power mode ")
    assert hot == ("warn", "heat holds the clocks back: gpu-throttle-alert 1")
