"""Models that must not come to run: each is refused with a code of its own, and the one that runs runs on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.models.store import ModelStore
from tests.rigs import ROOT, AgentProcess, Broker, Probe, config, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

GOOD = ModelStore({}).get("demo-160").path
BODY = """
[cameras.a]
source = "synthetic"
fps = 30.0
max_frames = 100
max_staleness_ms = 0
[model]
probation_frames = 60
[inference]
backend = "tests.misbehaving:BuiltEngine"
[backends.fake]
fail_after = 40
[backends."tests.misbehaving:BlindEngine"]
[backends."tests.misbehaving:TiringEngine"]
[models.narrow]
path = "{good}"
preprocess = {{ size = [64, 64] }}
[models.sluggish]
path = "{good}"
max_latency_ms = 0.001
[models.tiring]
path = "{good}"
max_latency_ms = 15.0
[models.dying]
path = "{good}"
family = "tests.crashing:KilledFamily"
[fetch]
public_key_file = "{key}"
"""


class Rig:
    """An agent that runs demo-320, and files that it may be given."""

    def __init__(self, folder: Path, probe: Probe, agent: AgentProcess) -> None:
        self.store = folder / "state" / "edge-agent" / "models"
        self.uploads = self.store / "uploads"
        self.uploads.mkdir(parents=True, exist_ok=True)
        self.probe = probe
        self.agent = agent

    def upload(self, name: str, content: bytes) -> str:
        (self.uploads / name).write_bytes(content)
        return name

    def register(self, **arguments: Any) -> Any:
        return self.probe.command("model.register", **arguments)

    def activate(self, name: str, **arguments: Any) -> Any:
        return self.probe.command("model.activate", name=name, timeout_s=40, **arguments)

    def stored(self, name: str) -> Path:
        """A good model, registered; its file in the store."""
        reply = self.register(file=self.upload(f"{name}.onnx", GOOD.read_bytes()), name=name)
        assert reply["status"] == "ok", reply
        return Path(reply["result"]["path"])

    def model(self) -> Any:
        return self.probe.command("agent.status")["result"]["model"]

    def runs_on(self) -> None:
        """The old model goes on, and no frame was lost since the start."""
        seen = len(self.probe.on("cameras/a/results"))
        self.probe.wait("cameras/a/results", n=seen + 5)
        results = [message.json() for message in self.probe.on("cameras/a/results")]
        assert results[-1]["model"]["name"] == "demo-320"
        seqs = [result["seq"] for result in results]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), "every frame, once, in order"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Ed25519 key pair by openssl: `key.pem`, and `public.pem` beside it."""
    folder = tmp_path_factory.mktemp("key")
    private, public = folder / "key.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private


@pytest.fixture
def rig(tmp_path: Path, broker: Broker, probe: Probe, key: Path) -> Iterator[Rig]:
    body = BODY.format(good=GOOD, key=key.with_name("public.pem"))
    environ = {"PYTHONPATH": str(ROOT)}
    with AgentProcess(
        tmp_path, config(broker.port, body, mqtt="max_queued_results = 100000"), environ=environ
    ) as agent:
        probe.wait("cameras/a/results", n=3, timeout_s=60)
        yield Rig(tmp_path, probe, agent)


def truncated_upload(rig: Rig) -> Any:
    return rig.register(file=rig.upload("m.onnx", GOOD.read_bytes()[:-5000]), name="m")


def truncated_in_the_store(rig: Rig) -> Any:
    path = rig.stored("short")
    os.truncate(path, 1000)
    return rig.activate("short")


def a_bit_flipped_in_the_store(rig: Rig) -> Any:
    path = rig.stored("flipped")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return rig.activate("flipped")


def another_checksum(rig: Rig) -> Any:
    wrong = hashlib.sha256(b"another").hexdigest()
    return rig.register(file=rig.upload("m.onnx", GOOD.read_bytes()), name="m", sha256=wrong)


def another_signature(rig: Rig) -> Any:
    pytest.importorskip("cryptography", reason="not installed: pip install 'edge-agent[signed]'")
    signature = rig.upload("m.sig", bytes(64))
    return rig.register(file=rig.upload("m.onnx", GOOD.read_bytes()), name="m", signature_file=signature)


def other_shapes(rig: Rig) -> Any:
    return rig.activate("narrow", backend="onnx")


def weights_elsewhere(rig: Rig) -> Any:
    onnx = pytest.importorskip("onnx", reason="not installed: pip install 'edge-agent[convert]'")
    model = onnx.load(str(GOOD))
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "../../../etc/passwd"
    return rig.register(file=rig.upload("m.onnx", model.SerializeToString()), name="m")


def weights_that_are_no_numbers(rig: Rig) -> Any:
    onnx = pytest.importorskip("onnx", reason="not installed: pip install 'edge-agent[convert]'")
    model = onnx.load(str(GOOD))
    weight = next(tensor for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.raw_data) > 64)
    weight.raw_data = b"\xff" * 4 + weight.raw_data[4:]
    return rig.register(file=rig.upload("m.onnx", model.SerializeToString()), name="m")


def outputs_that_are_no_numbers(rig: Rig) -> Any:
    return rig.activate("demo-160", backend="tests.misbehaving:BlindEngine")


def too_slow_at_once(rig: Rig) -> Any:
    return rig.activate("sluggish", backend="onnx")


def too_slow_at_work(rig: Rig) -> Any:
    return rig.activate("tiring", backend="tests.misbehaving:TiringEngine")


def a_failure_at_work(rig: Rig) -> Any:
    return rig.activate("demo-160", backend="fake")


def a_build_process_that_dies(rig: Rig) -> Any:
    return rig.activate("dying")


def no_such_model(rig: Rig) -> Any:
    return rig.activate("demo-161")


@pytest.mark.parametrize(
    ("attempt", "code", "told"),
    [
        (truncated_upload, "model_truncated", "copy it again"),
        (truncated_in_the_store, "model_truncated", "register it again"),
        (a_bit_flipped_in_the_store, "model_damaged", "register it again"),
        (another_checksum, "checksum_mismatch", "its SHA-256 is"),
        (another_signature, "signature_invalid", "not signed by"),
        (other_shapes, "model_shapes", "preprocess.size"),
        (weights_elsewhere, "external_data", "save the model as one file"),
        (weights_that_are_no_numbers, "model_not_finite", "NaN"),
        (outputs_that_are_no_numbers, "model_not_finite", "demo-320 runs again"),
        (too_slow_at_once, "model_too_slow", "the limit is 0.001 ms"),
        (too_slow_at_work, "model_too_slow", "demo-320 runs again"),
        (a_failure_at_work, "model_failed", "demo-320 runs again"),
        (a_build_process_that_dies, "build_failed", "SIGKILL"),
        (no_such_model, "model_not_found", "did you mean"),
    ],
)
def test_the_old_model_runs_on_and_the_reply_says_what_was_wrong(
    rig: Rig, attempt: Callable[[Rig], Any], code: str, told: str
) -> None:
    reply = attempt(rig)
    rig.runs_on()
    assert (reply["status"], reply["code"]) == ("error", code), reply
    assert told in reply["message"]
    assert not list(rig.store.glob(".staging-*"))
    wait_until(lambda: rig.model()["state"] == "ready")  # it may still try its first model on the other backend
    assert rig.model()["name"] == "demo-320"


def test_a_full_disk_keeps_the_store_as_it_was(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        body = f'[models]\ndir = "{disk}"\n[cameras.a]\nsource = "synthetic"\n'
        (disk / "uploads").mkdir()
        shutil.copy(GOOD, disk / "uploads" / "m.onnx")
        with AgentProcess(tmp_path, config(broker.port, body)):
            probe.wait("cameras/a/results", n=3)
            first = probe.command("model.register", file="m.onnx", name="first")
            second = probe.command("model.register", file="m.onnx", name="second")
            known = [model["id"] for model in probe.command("model.list")["result"]["models"]]
            activated = probe.command("model.activate", name="first")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert (first["status"], second["status"], second["code"]) == ("ok", "error", "disk_full")
    assert "make room" in second["message"]
    assert "first@1" in known
    assert "second@1" not in known
    assert activated["status"] == "ok"
