"""index.html of a report: one page without scripts that needs nothing from elsewhere. Takes what holds no secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from edgectl.report import _history, _plots
from edgectl.report._heard import Heard

_LOG_LINES = 300
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1360px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } .fix { color: #666; }
.ok { color: #007a4d; } .warn, .degraded { color: #9a6700; } .fail, .failed { color: #b3261e; font-weight: 600; }
pre { background: #f5f5f5; padding: .8rem; overflow: auto; max-height: 36rem; font-size: 12px; }
.plots { margin-top: 1.2rem; display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 1.2rem; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #444; }
svg .title { font-size: 13px; font-weight: 600; fill: #222; } svg .grid { stroke: #ddd; }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; }
.note { background: #fff4d6; padding: .5rem .8rem; }
"""


@dataclass(frozen=True)
class Collected:
    """What the page shows. `files`: of the folder, each with what is in it."""

    device: str
    at: str
    versions: Mapping[str, str]
    heard: Heard
    findings: Sequence[Mapping[str, Any]]
    config: Any
    models: Sequence[Mapping[str, Any]]
    log: str
    log_source: str
    notes: Sequence[str]
    files: Mapping[str, str]


def page(of: Collected) -> str:
    """The page's HTML."""
    parts = [_head(of), *_plotted(of), _health(of), _doctor(of), _models(of), _log(of), _packages(of), _files(of)]
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>edge-agent report: {escape(of.device)}</title>\n<style>{_STYLE}</style>",
            *filter(None, parts),
            "</html>\n",
        )
    )


def _head(of: Collected) -> str:
    status = of.heard.last.get("status", {})
    model = status.get("model", {})
    facts = {
        "made": of.at,
        "listened": f"for {of.heard.listened_s:g} s: {len(of.heard.stats)} statistics, {len(of.heard.frames)} results",
        "agent": " ".join(str(part) for part in (of.heard.last.get("available"), status.get("version")) if part),
        "model": " ".join(str(part) for part in (model.get("name"), model.get("version"), model.get("state")) if part),
        "backend": str(status.get("backend") or ""),
        "machine": ", ".join(of.versions.get(name, "") for name in ("system", "machine", "python")),
    }
    rows = "".join(f"<tr><th>{name}<td>{escape(value or 'not known')}" for name, value in facts.items())
    notes = "".join(f'<p class="note">{escape(note)}' for note in of.notes)
    return f"<h1>edge-agent report: {escape(of.device)}</h1>\n<table>{rows}</table>\n{notes}"


def _plotted(of: Collected) -> Iterator[str]:
    frames, stats = of.heard.frames, of.heard.stats
    plots = (
        _plots.histogram("Latency, capture to result", _history.totals(frames), x="ms"),
        _plots.lines("Latency over time", _history.latency_over_time(frames), y="ms"),
        _plots.lines("Frames inferred a second", _history.fps_over_time(frames), y="fps"),
        _plots.lines("p95 by stage, as the agent counts it", _history.stages_over_time(stats), y="ms"),
        _plots.lines("Memory of the agent", _history.own_memory(stats), y="MB"),
        _plots.lines("Memory in use", _history.machine_memory(stats), y="MB"),
    )
    yield "<h2>Performance</h2>"
    if frames:
        yield _stages(of)
    drawn = [f"<div>{plot}</div>" for plot in plots if plot]
    yield f'<div class="plots">{"".join(drawn)}</div>' if drawn else "<p>Nothing was heard that could be drawn."


def _stages(of: Collected) -> str:
    rows = []
    for stage, ordered in _history.by_stage(of.heard.frames).items():
        shown = [*(_history.percentile(ordered, share) for share in (0.5, 0.95, 0.99)), ordered[-1]]
        rows.append(f"<tr><td>{stage}" + "".join(f'<td class="n">{value:.2f}' for value in shown))
    head = "<tr><th>stage, ms<th>p50<th>p95<th>p99<th>max"
    return f"<table>{head}{''.join(rows)}</table>"


def _health(of: Collected) -> str:
    checks = of.heard.last.get("health", {}).get("checks", {})
    rows = [_row(check["state"], name, check["fact"]) for name, check in checks.items()]
    for topic, camera in sorted(of.heard.last.items()):
        if topic.startswith("cameras/"):
            told = ", ".join(camera[key] for key in ("state", "reason", "message") if camera.get(key))
            rows.append(_row("ok" if camera["state"] == "running" else "warn", f"camera {camera['camera']}", told))
    return f"<h2>Health</h2><table>{''.join(rows)}</table>" if rows else ""


def _doctor(of: Collected) -> str:
    rows = [_row(one["state"], one["what"], one["fact"], one["fix"]) for one in of.findings]
    return f"<h2>Doctor</h2><table>{''.join(rows)}</table>"


def _row(state: str, what: str, fact: Any, fix: Any = None) -> str:
    told = f'<br><span class="fix">→ {escape(str(fix))}</span>' if fix else ""
    return f'<tr><td class="{escape(state)}">{escape(state)}<td>{escape(what)}<td>{escape(str(fact))}{told}'


def _models(of: Collected) -> str:
    rows = "".join(map(_model, of.models))
    config = escape(json.dumps(of.config, indent=2, ensure_ascii=False))
    models = f"<h2>Models on this machine</h2><table>{rows}</table>" if rows else ""
    return f"{models}<h2>Configuration</h2><pre>{config}</pre>"


def _model(one: Mapping[str, Any]) -> str:
    size = "no file" if one["size_bytes"] is None else f"{one['size_bytes'] / 1e6:.1f} MB"
    name, origin, path = (escape(str(one[key])) for key in ("id", "origin", "path"))
    return f'<tr><td>{name}<td>{origin}<td class="n">{size}<td>{path}'


def _log(of: Collected) -> str:
    if not of.log:
        return f"<h2>Log</h2><p>{escape(of.log_source)}"
    lines = of.log.splitlines()
    which = f"the last {_LOG_LINES} of {len(lines)} lines" if len(lines) > _LOG_LINES else f"{len(lines)} lines"
    text = escape("\n".join(lines[-_LOG_LINES:]))
    return f"<h2>Log</h2><p>{escape(of.log_source)}, {which}<pre>{text}</pre>"


def _packages(of: Collected) -> str:
    text = escape("\n".join(f"{name} {version}" for name, version in of.versions.items()))
    return f"<h2>Versions</h2><details><summary>{len(of.versions)}</summary><pre>{text}</pre></details>"


def _files(of: Collected) -> str:
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(what)}" for name, what in of.files.items())
    return f"<h2>Files</h2><table>{rows}</table>"
