"""What `edgectl models bench` and `compare` measure with: the agent's own loader, without the agent."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from edge_agent import backends
from edge_agent.check import engines_of
from edge_agent.config import Config, InferenceOptions
from edge_agent.data import Frame
from edge_agent.messages import Throughput
from edge_agent.models.loaded import LoadedModel, Pending
from edge_agent.models.loading import ModelLoader
from edge_agent.models.store import ModelStore
from edge_agent.sensors.throttling import ThrottlingSensor


def loader(
    store: ModelStore, loaded: Config, *, backend: str, inference: InferenceOptions | None = None
) -> ModelLoader:
    """As the agent brings models up. `backend`: `auto`, or one that has to be there; raises `ConfigError`."""
    wanted = loaded.inference.backend if backend == "auto" else backend
    fallback = loaded.inference.fallback if backend == "auto" else ""
    name = backends.choose(wanted, fallback=fallback, options=loaded.backends).name
    return ModelLoader(
        store,
        backend=name,
        backends=loaded.backends,
        engines=engines_of(name, loaded),
        inference=inference or loaded.inference,
        choice=loaded.model,
        policy=loaded.policy,
        power_mode=ThrottlingSensor().mode,
    )


def throughput(model: LoadedModel, *, within_s: float) -> Throughput:
    """Measured with noise, as latency is. Raises `EngineError`."""
    frames, waiting, done = _noise(model), deque[Pending](), 0
    began = time.monotonic()
    while (has_time := time.monotonic() - began < within_s) or waiting:
        if has_time and len(waiting) < model.depth:
            waiting.append(model.submit(frames))
        else:
            done += len(model.collect(waiting.popleft()).results)
    took = time.monotonic() - began
    return Throughput(round(done / took, 1), len(frames), model.depth, done, round(took, 3))


def _noise(model: LoadedModel) -> Sequence[Frame]:
    width, height = model.size
    noise = np.random.default_rng(0).integers(0, 256, (model.max_batch, height, width, 3), np.uint8)
    return [Frame("bench", seq, image, time.time_ns(), time.monotonic_ns()) for seq, image in enumerate(noise)]
