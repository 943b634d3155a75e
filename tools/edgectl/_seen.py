"""A result or an event in a few words, whatever the kind of model."""

from __future__ import annotations

from collections import defaultdict

from edge_agent.messages import EventMessage, ResultMessage


def seen(result: ResultMessage) -> str:
    """What is in the picture: of things that can be counted how many, and the best score of each kind."""
    if objects := result.detections or result.poses:
        scores: dict[str, list[float]] = defaultdict(list)
        for one in objects:
            scores[one.label].append(one.score)
        ordered = sorted(scores.items(), key=lambda item: (-len(item[1]), item[0]))
        return ", ".join(f"{len(found)} {label} {max(found):.2f}" for label, found in ordered)
    if result.classes:
        return ", ".join(f"{one.label} {one.score:.2f}" for one in result.classes[:2])
    if result.segmentation:
        return ", ".join(f"{one.label} {100 * one.ratio:.0f} %" for one in result.segmentation.classes[:3])
    if result.depth and result.depth.min is not None:
        return f"depths {result.depth.min:.3g} to {result.depth.max:.3g}"
    if result.embedding:
        return f"a vector of {result.embedding.size}"
    if result.tensors:
        return ", ".join(result.tensors)
    return "nothing"


def happened(event: EventMessage) -> str:
    """Who did what."""
    state = event.after or event.before
    who = f"{state.label} {event.track_id} {state.score:.2f}" if state else f"object {event.track_id}"
    did = [f"entered {zone}" for zone in event.entered] + [f"left {zone}" for zone in event.left]
    did += [f"crossed {one.line} {one.direction}" for one in event.crossed]
    return "  ".join([who, *did])
