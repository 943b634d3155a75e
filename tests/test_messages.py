"""Payloads: what is encoded, and what is refused on the way in."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import hypothesis.strategies as st
import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given, settings

from edge_agent.data import Detections, Frame, Mask, ModelRef, Names, Result, Timings
from edge_agent.errors import CommandError
from edge_agent.messages import Topics, command_id, decode_command, encode_result, timestamp
from edge_agent.predictions import rle
from tests import schemas
from tests.rigs import Heard

TOPICS = Topics("edge", "dev")


def test_a_result_is_the_documented_message() -> None:
    frame = Frame("front", 7, np.zeros((480, 640, 3), np.uint8), 1_700_000_000_123_456_789, 0)
    found = Detections(np.array([[1.234, 2, 3, 4]], np.float32), np.array([0.98765], np.float32), np.array([1]))
    ref = ModelRef("m", "2", "detect", Names(("a", "b")))
    message = encode_result(Result(frame, ref, found, Timings(1, 2, 3, 4, 10.00049)), TOPICS)
    schemas.validate(Heard(message.topic, message.payload, False, 0))
    assert message.topic == "edge/dev/cameras/front/results"
    assert json.loads(message.payload) == {
        "schema": 1,
        "id": message.id,
        "device": "dev",
        "camera": "front",
        "seq": 7,
        "captured_at": "2023-11-14T22:13:20.123456Z",
        "width": 640,
        "height": 480,
        "model": {"name": "m", "version": "2", "task": "detect"},
        "latency_ms": {"queue": 1, "preprocess": 2, "inference": 3, "postprocess": 4, "total": 10.0},
        "detections": [{"label": "b", "class_id": 1, "score": 0.9876, "box": [1.23, 2.0, 3.0, 4.0]}],
    }


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)),
)
def test_masks_are_the_coco_run_lengths_of_pycocotools(size: tuple[int, int], seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    height, width = size
    top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
    bits = rng.random((rng.integers(1, height - top + 1), rng.integers(1, width - left + 1))) < density
    whole = np.zeros(size, np.uint8, order="F")
    whole[top : top + bits.shape[0], left : left + bits.shape[1]] = bits
    theirs = pycocotools.mask.encode(whole)
    ours = rle(Mask(left, top, bits), size)
    assert ours.size == tuple(theirs["size"])
    assert ours.counts.encode() == theirs["counts"]


@given(st.integers(0, 4_000_000_000_000_000_000))
def test_timestamps_are_rfc_3339_to_the_microsecond(epoch_ns: int) -> None:
    text = timestamp(epoch_ns)
    parsed = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    assert (parsed - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds() == pytest.approx(
        epoch_ns / 1e9, abs=2e-6
    )


@settings(max_examples=500)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_no_payload_is_more_than_a_refusal(payload: bytes) -> None:
    command_id(payload)
    with pytest.raises(CommandError) as caught:
        decode_command(payload)
    assert caught.value.code == "bad_arguments"


@given(st.text(min_size=1, max_size=128), st.text(min_size=1, max_size=128))
def test_a_command_comes_in_as_it_was_sent(identity: str, name: str) -> None:
    payload = json.dumps({"id": identity, "command": name, "args": {"a": 1}}).encode()
    command = decode_command(payload)
    assert (command.id, command.command, command.args) == (identity, name, {"a": 1})
    assert command_id(payload) == identity


@given(st.text(min_size=1, max_size=128))
def test_a_reply_topic_can_always_be_published_to(identity: str) -> None:
    topic = TOPICS.reply(identity)
    assert topic.count("/") == 3
    assert not set("+#\0") & set(topic)
