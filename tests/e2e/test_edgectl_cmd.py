"""`edgectl cmd`, as people run it: to real agents, on a real mosquitto."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from edgectl import _schema
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.commands import described
from tests.brokers import certificates
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, config, free_port, wait_until

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-c", "from edgectl.app import main; main()"]
CAMERA = """
[cameras.a]
source = "synthetic"
fps = 2
width = 96
height = 64
"""
OTHER = "rig-2"


@dataclass(frozen=True)
class Rig:
    folder: Path
    broker: Broker

    def cmd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self.folder, "cmd", *arguments)

    def complete(self, line: str) -> list[str]:
        """What bash would offer after this."""
        words = line.split(" ")
        environ = {"_EDGECTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        code = "import sys; sys.argv[0] = 'edgectl'; from edgectl.app import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.split()


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def alone(folder: Path, port: int, mqtt: str = "") -> Path:
    """A folder with an agent's configuration, and no agent."""
    (folder / "config.toml").write_text(config(port, CAMERA, mqtt=mqtt))
    return folder


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two agents, both of the group `all-of-it`, one of them of `odd` too; the other one does not tell its commands."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("rig")
        broker = Broker(folder)
        stack.enter_context(broker)
        agents = []
        for device, mqtt in (
            (DEVICE, 'groups = ["all-of-it", "odd"]'),
            (OTHER, 'groups = ["all-of-it"]\ndisabled_commands = ["commands.list"]'),
        ):
            own = tmp_path_factory.mktemp(device)
            text = config(broker.port, CAMERA, mqtt=mqtt)
            agents.append(stack.enter_context(AgentProcess(own, text.replace(f'"{DEVICE}"', f'"{device}"', 1))))
        for agent in agents:
            wait_until(lambda agent=agent: agent.events("model.active") or agent.events("camera.running"))
        with Probe(broker.port) as probe:
            for device in (DEVICE, OTHER):
                probe.wait_topic(f"edge/{device}/cameras/a/results", timeout_s=15)
        alone(folder, broker.port)
        yield Rig(folder, broker)


def test_a_reply_is_printed_and_with_json_all_of_it(rig: Rig) -> None:
    done, whole = rig.cmd("camera.list"), rig.cmd("camera.list", "--json", "--device", OTHER)
    assert (done.returncode, done.stderr, whole.returncode) == (0, "", 0)
    reply = json.loads(whole.stdout)
    assert json.loads(done.stdout) == reply["result"]
    assert (reply["device"], reply["status"], list(reply["result"]["cameras"])) == (OTHER, "ok", ["a"])


def test_a_refusal_is_a_sentence_and_an_exit_status(rig: Rig) -> None:
    done = rig.cmd("model.activate", "name=demo-161")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model_not_found: there is no model 'demo-161'; did you mean 'demo-160'?")
    whole = rig.cmd("model.activate", "name=demo-161", "--json")
    assert (whole.returncode, json.loads(whole.stdout)["code"]) == (1, "model_not_found")
    silent = rig.cmd("agent.info", "--device", "nobody", "--timeout", "0.5")
    assert (silent.returncode, silent.stderr) == (1, "error: nobody did not answer within 0.5 s; is it online?\n")


def test_what_the_agent_would_refuse_is_not_sent(rig: Rig) -> None:
    choices = "debug, error, info, warning"
    attempts = {
        ("agent.inf",): "there is no command 'agent.inf'; did you mean 'agent.info'?",
        ("model.activate", "nam=x"): "name is missing; nam: there is no such argument; did you mean 'name'?",
        ("agent.log_level", "level=inf"): f"level: 'inf' is not one of {choices}; did you mean 'info'?",
        ("camera.snapshot", "camera=a", "max_kb=-1"): "max_kb: -1 is not more than 0",
        ("agent.info", "x"): "'x' is no key=value",
        ("agent.info", "--device", "a/b"): "a command goes to one device or one group, not to 'a/b'",
    }
    with Probe(rig.broker.port, f"edge/{DEVICE}/cmd") as probe, ThreadPoolExecutor(2) as at_once:
        everything = list(at_once.map(lambda arguments: rig.cmd(*arguments), attempts))
        assert {heard.json()["command"] for heard in list(probe.heard)} == {"commands.list"}
    for done, sentence in zip(everything, attempts.values(), strict=True):
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {sentence}\n")


def test_an_agent_that_does_not_tell_its_commands_checks_them_itself(rig: Rig) -> None:
    done = rig.cmd("agent.inf", "--device", OTHER)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown_command: ")


def test_values_are_what_the_command_takes(rig: Rig) -> None:
    for text in ("17", "null"):
        done = rig.cmd("job.cancel", f"id={text}")
        assert done.stderr.startswith("error: not_found: "), "text stays text"
    changed = rig.cmd("camera.set", "camera=a", "options.fps=12", 'options.zones={"z": [[0,0],[1,0],[1,1]]}')
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout)["cameras"] == ["a"]
    listed = rig.cmd("inference.set", "classes=disc,star", "max_detections=50")
    assert listed.returncode == 0, listed.stderr
    overrides = json.loads(rig.cmd("agent.status").stdout)["overrides"]
    assert {"cameras.a.fps", "inference.classes", "inference.max_detections"} <= set(overrides)


def test_how_a_long_command_goes_is_shown_on_a_terminal_alone(rig: Rig) -> None:
    work = ("model.benchmark", "name=demo-160", "inferences=40", "seconds=2")
    plain = rig.cmd(*work)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert json.loads(plain.stdout)["latency_ms"]["n"] > 0
    ours, theirs = pty.openpty()
    with subprocess.Popen([*RUN, "cmd", *work], cwd=rig.folder, stdout=subprocess.PIPE, stderr=theirs) as running:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert running.stdout is not None
        result = json.loads(running.stdout.read())
    os.close(ours)
    assert running.returncode == 0
    assert result["latency_ms"]["n"] > 0
    assert re.search(r"model\.benchmark: \w+", shown.decode())


def test_many_are_asked_at_once(rig: Rig) -> None:
    done = rig.cmd("--all", "agent.log_level", "level=info")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert head == ["device", "status", "ms", "result"]
    assert [row[:2] for row in rows] == [[DEVICE, "ok"], [OTHER, "ok"]]
    told = json.loads(rig.cmd("--group", "odd", "agent.info", "--json", "--for", "1.5").stdout)
    assert [(reply["device"], reply["id"]) for reply in told["replies"]] == [(DEVICE, told["id"])]
    assert (told["command"], told["missing"]) == ("agent.info", [])


def test_exactly_so_many_are_waited_for(rig: Rig) -> None:
    both = rig.cmd("--group", "all-of-it", "--expect", "2", "--json", "job.list")
    assert both.returncode == 0, both.stderr
    assert len(json.loads(both.stdout)["replies"]) == 2
    three = rig.cmd("--group", "all-of-it", "--expect", "3", "--for", "1.5", "job.list")
    assert (three.returncode, three.stderr) == (1, "error: only 2 of 3 answered\n")
    nobody = rig.cmd("--group", "even", "--for", "0.5", "job.list")
    assert nobody.returncode == 1
    assert nobody.stderr == "error: nobody answered job.list; is anybody of edge/group/even/cmd online?\n"


def test_one_that_refuses_or_is_silent_among_many_is_a_failure(rig: Rig) -> None:
    assert rig.cmd("camera.add", "camera=b", "options.source=synthetic", "--device", OTHER).returncode == 0
    some = rig.cmd("--all", "camera.disable", "camera=b")
    assert (some.returncode, some.stderr) == (1, "error: of 2 devices 1 refused and 0 did not answer\n")
    assert "there is no camera 'b'" in some.stdout
    with Probe(rig.broker.port) as probe:
        probe.publish("edge/ghost/available", "online", retain=True)
        missing = rig.cmd("--all", "job.list", "--for", "2", "--json")
        shown = rig.cmd("--all", "job.list", "--for", "2")
        probe.publish("edge/ghost/available", "", retain=True)
    assert (missing.returncode, json.loads(missing.stdout)["missing"]) == (1, ["ghost"])
    assert missing.stderr == "error: of 3 devices 0 refused and 1 did not answer\n"
    assert re.search(r"^ghost +- +- +did not answer$", shown.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments", [("--all", "--group", "x"), ("--all", "--device", "x"), ("--expect", "2"), ("--for", "1")]
)
def test_options_that_do_not_go_together_are_a_usage_error(tmp_path: Path, arguments: Sequence[str]) -> None:
    done = run(tmp_path, "cmd", "agent.info", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_shell_completes_what_the_agent_knows(rig: Rig, tmp_path: Path) -> None:
    assert rig.complete("edgectl cmd model.a") == ["model.activate"]
    assert rig.complete("edgectl cmd camera.snapshot ") == ["camera=", "annotated=", "timeout_s=", "max_kb="]
    assert rig.complete("edgectl cmd agent.log_level level=w") == ["level=warning"]
    nobody = Rig(alone(tmp_path, free_port()), rig.broker)
    assert nobody.complete("edgectl cmd commands.") == ["commands.list"], "without an agent those of this version"


def test_what_the_brokers_acl_denies_is_said(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read edge/#\n")
    with Broker(tmp_path, config=f"allow_anonymous true\nacl_file {tmp_path / 'acl'}") as broker:
        done = run(alone(tmp_path, broker.port), "cmd", "agent.info")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the broker does not let us publish to edge/{DEVICE}/cmd (")


def test_the_way_to_the_broker_is_the_agents_own(tmp_path: Path) -> None:
    made = certificates(tmp_path)
    rules = f"allow_anonymous true\ncafile {made.ca}\ncertfile {made.server.certificate}\nkeyfile {made.server.key}"
    with Broker(tmp_path, config=rules) as broker:
        silent = ("cmd", "agent.info", "--timeout", "0.5")
        trusted = run(alone(tmp_path, broker.port, f'tls = true\ntls_ca = "{made.ca}"'), *silent)
        distrusted = run(alone(tmp_path, broker.port, f'tls = true\ntls_ca = "{made.stranger_ca}"'), *silent)
        old = run(alone(tmp_path, broker.port, f'tls = true\ntls_ca = "{made.ca}"\nprotocol = "3.1.1"'), *silent)
    for done in (trusted, old):
        assert (done.returncode, done.stderr) == (1, f"error: {DEVICE} did not answer within 0.5 s; is it online?\n")
    assert distrusted.returncode == 1
    assert re.match(r"error: no broker at 127\.0\.0\.1:\d+ \(.*set mqtt\.tls_ca.*\)\n$", distrusted.stderr)


def test_no_broker_and_no_configuration_are_sentences(tmp_path: Path) -> None:
    nobody = run(alone(tmp_path, free_port()), "cmd", "agent.info")
    assert nobody.returncode == 1
    assert nobody.stderr.startswith("error: no broker at 127.0.0.1:")
    nowhere = run(tmp_path, "cmd", "agent.info", "--config", "gone.toml")
    assert nowhere.returncode == 1
    assert "gone.toml" in nowhere.stderr
    for done in (nobody, nowhere):
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)


# What is checked before it is sent

COMMANDS = described()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(["", "info", "beside", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["camera", "a"]), inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(sorted(COMMANDS)))
def test_arguments_are_right_or_wrong_as_the_schema_has_it(data: st.DataObject, name: str) -> None:
    schema = COMMANDS[name]["arguments"]
    keys = st.sampled_from([*schema["properties"], "surplus"])
    arguments = data.draw(st.dictionaries(keys, VALUES, max_size=4))
    found = list(_schema.problems(arguments, schema))
    assert (not found) == jsonschema.Draft202012Validator(schema).is_valid(arguments), found


@settings(deadline=None, max_examples=300)
@given(
    VALUES,
    st.sampled_from(
        [
            {"type": "integer", "minimum": 0, "exclusiveMaximum": 3},
            {"type": ["string", "null"], "minLength": 1, "maxLength": 3, "pattern": "^[a-z]+$"},
            {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
            {"type": "array", "prefixItems": [{"type": "boolean"}], "items": False},
            {"anyOf": [{"$ref": "#/$defs/S"}, {"type": "null"}], "$defs": {"S": {"enum": ["a", 1, True]}}},
            {"type": "object", "additionalProperties": {"type": "integer"}, "required": ["a"]},
            {},
        ]
    ),
)
def test_each_part_of_a_schema_that_is_known_is_held_to(value: Any, schema: dict[str, Any]) -> None:
    found = list(_schema.problems(value, schema))
    assert (not found) == jsonschema.Draft202012Validator(schema).is_valid(value), found


@given(st.lists(st.tuples(st.text(min_size=1), st.text()), max_size=5), st.none() | st.sampled_from(sorted(COMMANDS)))
def test_whatever_is_typed_means_something(pairs: list[tuple[str, str]], name: str | None) -> None:
    schema = COMMANDS[name]["arguments"] if name else None
    values = _schema.typed(pairs, schema)
    assert {key.split(".")[0] for key, _ in pairs} == set(values)
    json.dumps(values, allow_nan=False)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has it open any more
        return b""
