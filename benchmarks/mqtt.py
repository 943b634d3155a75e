"""What a message costs on its way to the broker: our outbox and link beside bare aiomqtt and bare paho, in one run.

`python -m benchmarks.mqtt [--repeats N] [--json FILE] [--messages N] [--seconds S] [--profile FILE]`. Needs a
mosquitto. Each publisher runs in a fresh process, in turn, and sends the same results of about 1 kB to the same broker;
CPU is the publisher's alone. Then eight cameras at 30 results a second: what they take of one core, JSON included.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import aiomqtt
import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine
from benchmarks._troubles import need_mosquitto
from edge_agent import logs, messages
from edge_agent.config import MqttOptions, QosOptions, SpoolOptions
from edge_agent.data import Detections, Frame, Message, ModelRef, Names, Result, Timings
from edge_agent.messages import Topics
from edge_agent.mqtt import Link
from edge_agent.outbox import Outbox
from edge_agent.threads import OwnerThread
from tests.rigs import Broker

PUBLISHERS = ("paho", "aiomqtt", "link", "steady", "idle")
Qos = Literal[0, 1]
QOS: tuple[Qos, ...] = (0, 1)
CORE_BAR = 0.15
COMPARED: tuple[tuple[str, str, str, Literal["less", "more"]], ...] = (
    ("CPU a message", "µs", "cpu_us", "less"),
    ("messages", "/s", "per_s", "more"),
)
CAMERAS, FPS = 8, 30
WARM_UP = 500
TOPICS = Topics("edge", "bench")
LABELS = ("person", "bicycle", "car", "truck", "bus", "dog")


def results(count: int) -> list[Result]:
    """Ones with six detections that are followed, of eight cameras in turn."""
    rng = np.random.default_rng(3)
    image = np.empty((720, 1280, 3), np.uint8)
    model = ModelRef("yolox-nano", "1", "detection", Names(labels=LABELS))
    made = []
    for index in range(count):
        near = rng.uniform(0, 600, (6, 2))
        boxes = np.hstack([near, near + rng.uniform(20, 120, (6, 2))]).astype(np.float32)
        scores = rng.uniform(0.4, 1, 6).astype(np.float32)
        prediction = Detections(boxes, scores, np.arange(6), track_ids=np.arange(6))
        frame = Frame(f"camera-{index % CAMERAS}", index, image, time.time_ns(), time.monotonic_ns())
        timings = Timings(0.412, 1.893, 14.267, 0.534, 21.45)
        made.append(Result(frame, model, prediction, timings))
    return made


class Cost:
    """Seconds, and the CPU of this process, between `begin` and `end`."""

    def begin(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, count: int) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"per_s": count / wall, "cpu_us": cpu / count * 1e6, "core": cpu / wall}


def bare_paho(port: int, qos: Qos, load: list[Message]) -> dict[str, float]:
    """Bare paho, with a thread of its own; of QoS 1, twenty at a time, as the link has it."""
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.max_queued_messages_set(0)
    pending, done, sent = threading.Semaphore(20), threading.Event(), 0

    def on_publish(*_: Any) -> None:
        nonlocal sent
        sent += 1
        pending.release()
        if sent == len(load):
            done.set()

    client.on_publish = on_publish
    client.connect("127.0.0.1", port)
    client.loop_start()
    cost = Cost()
    for index, message in enumerate(load):
        if index == WARM_UP:
            cost.begin()
        pending.acquire()
        client.publish(message.topic, message.payload, qos)
    done.wait(60)
    figures = cost.end(len(load) - WARM_UP)
    client.disconnect()
    client.loop_stop()
    return figures


async def bare_aiomqtt(port: int, qos: Qos, load: list[Message]) -> dict[str, float]:
    """Bare aiomqtt, as its documentation has it: `await client.publish`; of QoS 1, in twenty tasks."""
    cost, left = Cost(), iter(load[WARM_UP:])
    async with aiomqtt.Client("127.0.0.1", port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        client.pending_calls_threshold = 1000

        async def publish() -> None:
            for message in left:
                await client.publish(message.topic, message.payload, qos)

        for message in load[:WARM_UP]:
            await client.publish(message.topic, message.payload, qos)
        cost.begin()
        await asyncio.gather(*(publish() for _ in range(20 if qos else 1)))
        return cost.end(len(load) - WARM_UP)


async def with_link(
    port: int, qos: Qos, work: Callable[[Outbox, Link], Awaitable[dict[str, float]]]
) -> dict[str, float]:
    """What `work` comes to, with a link that is connected, as the agent has it."""
    options = MqttOptions(port=port, qos=QosOptions(results=qos), protocol="5", max_queued_results=100_000)
    outbox = Outbox(max_results=options.max_queued_results)
    connected = asyncio.Event()
    with OwnerThread("spool") as spooling:
        link = Link(
            options,
            topics=TOPICS,
            outbox=outbox,
            spool=SpoolOptions(),
            spooling=spooling,
            listens=TOPICS.listened([]),
            on_message=lambda inbound: None,
            on_connect=connected.set,
        )
        running = asyncio.ensure_future(link.run())
        await connected.wait()
        figures = await work(outbox, link)
        outbox.close()
        await running
    return figures


async def through_link(port: int, qos: Qos, load: list[Message]) -> dict[str, float]:
    """The outbox never runs dry, and never holds more than a few hundred."""

    async def work(outbox: Outbox, link: Link) -> dict[str, float]:
        async def put(part: list[Message]) -> None:
            goal = sum(link.sent.values()) + len(part)
            for begin in range(0, len(part), 100):
                for message in part[begin : begin + 100]:
                    outbox.put(message)
                while len(outbox) > 200:  # noqa: ASYNC110  the link empties it
                    await asyncio.sleep(0.002)
            while sum(link.sent.values()) < goal:  # noqa: ASYNC110  the same
                await asyncio.sleep(0.002)

        await put(load[:WARM_UP])
        cost = Cost()
        cost.begin()
        await put(load[WARM_UP:])
        return cost.end(len(load) - WARM_UP)

    return await with_link(port, qos, work)


async def steadily(port: int, qos: Qos, seconds: float, *, sends: bool) -> dict[str, float]:
    """Eight cameras at 30 results a second: encode, put, send. Without `sends`: what the rhythm costs by itself."""

    async def work(outbox: Outbox, link: Link) -> dict[str, float]:
        found = results(CAMERAS * FPS)
        cost, count, next_s = Cost(), 0, time.monotonic()
        cost.begin()
        while count < CAMERAS * FPS * seconds:
            if sends:
                outbox.put(messages.encode_result(found[count % len(found)], TOPICS))
            count += 1
            next_s += 1 / (CAMERAS * FPS)
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        return cost.end(count)

    return await with_link(port, qos, work)


def publisher(name: str, port: int, qos: Qos, count: int, seconds: float) -> dict[str, float]:
    """One publisher, in this process."""
    if name in ("steady", "idle"):
        return asyncio.run(steadily(port, qos, seconds, sends=name == "steady"))
    load = [messages.encode_result(result, TOPICS) for result in results(count + WARM_UP)]
    if name == "paho":
        figures = bare_paho(port, qos, load)
    else:
        figures = asyncio.run((bare_aiomqtt if name == "aiomqtt" else through_link)(port, qos, load))
    return {**figures, "bytes": statistics.mean(len(message.payload) for message in load)}


def in_a_process(name: str, port: int, qos: Qos, options: argparse.Namespace) -> dict[str, float]:
    """One publisher, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.mqtt", "--publisher", name, "--port", str(port), "--qos", str(qos)]
    command += ["--messages", str(options.messages), "--seconds", str(options.seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compared(runs: Runs, qos: Qos) -> list[Figure]:
    """Outbox and link beside each of the others, and what the cameras take of a core."""
    link, cameras = runs[_subject("link", qos)], runs[_subject("steady", qos)]
    figures = [
        Figure(
            f"outbox and link, QoS {qos}: {what}", unit, link[key], other, runs[_subject(other, qos)][key], better=to
        )
        for what, unit, key, to in COMPARED
        for other in ("paho", "aiomqtt")
    ]
    figures.append(
        Figure(f"{CAMERAS} cameras x {FPS} results/s, QoS {qos}", "of a core", cameras["core"], bar=CORE_BAR)
    )
    rhythm = runs[_subject("idle", qos)]["core"]
    return [*figures, Figure(f"of it the rhythm, QoS {qos}", "of a core", rhythm)]


def _subject(name: str, qos: Qos) -> str:
    return f"{name}, QoS {qos}"


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--messages", type=int, default=10_000, help="10000 unless told, after 500 that do not count")
    parser.add_argument("--seconds", type=float, default=5.0, help="of eight cameras; 5 unless told")
    parser.add_argument("--profile", type=Path, help="of the link, for pstats; nothing else is done then")
    parser.add_argument("--publisher", choices=PUBLISHERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=0, help="what is profiled; 0 unless told")
    options = parser.parse_args()
    if options.repeats < 1 or options.messages < 1 or options.seconds <= 0:
        parser.error("--repeats, --messages and --seconds must be more than 0")
    logs.configure(level="error", format="json")
    if options.publisher:
        print(json.dumps(publisher(options.publisher, options.port, options.qos, options.messages, options.seconds)))
        return
    need_mosquitto()
    runs, about = Runs(), machine("aiomqtt", "paho-mqtt", "msgspec")
    with tempfile.TemporaryDirectory() as name, Broker(Path(name)) as broker:
        if options.profile:
            with cProfile.Profile() as profile:
                publisher("link", broker.port, options.qos, options.messages, options.seconds)
            profile.dump_stats(options.profile)
            return
        for _ in range(options.repeats):
            for qos in QOS:
                for kind in PUBLISHERS:
                    runs.add(_subject(kind, qos), in_a_process(kind, broker.port, qos, options))
    size = statistics.median(runs[_subject("link", 0)]["bytes"])
    report = Report(
        "mqtt",
        "A message on its way to the broker",
        command("mqtt"),
        about,
        [figure for qos in QOS for figure in compared(runs, qos)],
        [
            f"Results of {size:.0f} bytes with six objects, to a mosquitto on the same machine. "
            "The rhythm: the same eight cameras without encoding and sending."
        ],
    )
    sys.exit(finish(report, options))


if __name__ == "__main__":
    main()
