"""`inference.set`, `policy.set`, `stats.*` and `job.*`: how the agent works, and what it is at."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from edge_agent import messages, plugins
from edge_agent.commands._base import Call, NoArguments, command
from edge_agent.config import Table
from edge_agent.errors import CommandError


class InferenceSet(Table, omit_defaults=True):
    """`inference.set`: keys of `[inference]`; those left out stay as they are."""

    score_threshold: float | UnsetType = UNSET
    iou_threshold: float | UnsetType = UNSET
    max_detections: int | UnsetType = UNSET
    classes: list[str] | UnsetType = UNSET
    max_results_per_s: float | UnsetType = UNSET


class PolicySet(Table, omit_defaults=True):
    """`policy.set`: keys of `[policy]`; those left out stay as they are."""

    enabled: bool | Literal["auto"] | UnsetType = UNSET
    max_latency_ms: float | UnsetType = UNSET
    window_s: float | UnsetType = UNSET
    ladder: list[str] | UnsetType = UNSET
    dwell_s: float | UnsetType = UNSET
    max_changes_per_hour: int | UnsetType = UNSET
    recover_below: float | UnsetType = UNSET


class JobNamed(Table):
    """`job.cancel`: the id of the command that began it."""

    id: str


@command("inference.set", InferenceSet, is_long=True)
async def set_inference(arguments: InferenceSet, call: Call) -> messages.Changed:
    """Thresholds, classes and the rate of results, from now on; other thresholds load the model anew, beside itself."""
    changes = {"inference": msgspec.to_builtins(arguments)}
    return await call.agent.change(lambda settings: settings.changed(changes))


@command("policy.set", PolicySet)
async def set_policy(arguments: PolicySet, call: Call) -> messages.Changed:
    """The latency ladder, from now on."""
    changes = {"policy": msgspec.to_builtins(arguments)}
    return await call.agent.change(lambda settings: settings.changed(changes))


@command("stats.get", NoArguments)
async def get_stats(arguments: NoArguments, call: Call) -> messages.Stats:
    """The stats topic's payload, now."""
    return call.agent.stats()


@command("stats.reset", NoArguments)
async def reset_stats(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """Count from now on."""
    call.agent.reset_stats()
    return {"since": call.agent.stats().since}


@command("job.list", NoArguments)
async def list_jobs(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """What runs, and how far it is."""
    return {"jobs": [job.job("running") for job in call.jobs.values() if job is not call]}


@command("job.cancel", JobNamed)
async def cancel_job(arguments: JobNamed, call: Call) -> dict[str, Any]:
    """Ask a job to end; its own reply then says that it did, or that it was too late."""
    job = call.jobs.get(arguments.id)
    if job is None or job is call:
        known = [one for one in call.jobs if one != call.id]
        raise CommandError(f"no job {arguments.id!r} runs{plugins.nearest(arguments.id, known)}", code="not_found")
    job.cancel()
    return {"id": job.id, "command": job.name}
