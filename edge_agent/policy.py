"""The latency ladder: which model should run, judged by how long inference takes.

Decides and nothing else: it has no clock, loads no model and tells nobody. Whoever carries its moves out says what time
it is, what was measured and what the sensors saw.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edge_agent.config import ModelOptions, PolicyOptions, Precision

Cause = Literal["latency", "thermal", "power_mode", "recovered"]
LadderState = Literal["ok", "stepped_down", "floor", "spent"]

_HOUR_S = 3600.0
_SLICES = 20  # of a window
_HALF = _SLICES // 2
_PATIENCE = 1.5  # windows; see `Ladder`
_FEWEST = 3
_STEP = 1.02  # from one bucket of latencies to the next
_LEAST_MS, _MOST_MS = 0.01, 1e6


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder: a model by `name` or `name@version`, or one of its own cheaper engines. `limit_ms` is the
    limit that holds on it."""

    model: str
    limit_ms: float
    precision: Precision | None = None
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}" if self.size else None
        return " ".join(part for part in (self.model, self.precision, size) if part)


@dataclass(frozen=True, slots=True)
class Move:
    """What should be done: go to rung `to` (0 is the best). `reason` is a sentence with the figures."""

    to: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the sensors say of the machine now: that it throttles, that its power mode is lower than it was; or None."""

    throttling: str | None = None
    power_mode: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the ladder stood when it last decided; `detail` says what it saw or waits for.

    `ok`: on the best rung. `stepped_down`: on a lower one. `floor`: over the limit, and no rung below is of use.
    `spent`: it would move, but has moved as often in the last hour as it may. `p95_ms` is of the last window, None
    where there were too few inferences; `last` is the last move that was carried out.
    """

    state: LadderState
    rung: int
    limit_ms: float
    p95_ms: float | None
    changes_last_hour: int
    last: Move | None
    detail: str


@dataclass(frozen=True, slots=True)
class Latencies:
    """How long inferences took: the 95th percentile (nearest rank), and the third slowest; both within 1 %."""

    p95_ms: float
    third_ms: float

    def exceed(self, limit_ms: float) -> bool:
        """Among few inferences one or two slow ones would make the percentile, so three must be slow."""
        return min(self.p95_ms, self.third_ms) > limit_ms


class LatencyWindow:
    """How long the inferences of the last `window_s` took, in twenty slices of it.

    Each slice is a histogram whose buckets are 2 % wide, so memory does not grow with the rate: 20 slices of at most
    930 buckets, of which a model fills some thirty. `add` may be called from another thread than the rest.
    """

    def __init__(self, window_s: float) -> None:
        self._slice_s = window_s / _SLICES
        self._slices: deque[tuple[int, Counter[int]]] = deque(maxlen=_SLICES)
        self._since_s = -math.inf
        self._lock = threading.Lock()

    def add(self, at_s: float, latency_ms: float) -> None:
        """One inference that ended at `at_s`."""
        if not latency_ms >= 0:
            return
        bucket = _bucket(latency_ms)
        with self._lock:
            if at_s >= self._since_s:
                self._slice(math.floor(at_s / self._slice_s))[bucket] += 1

    def clear(self, now_s: float) -> None:
        """Begin anew; what ended before `now_s` and is told later does not count either."""
        with self._lock:
            self._slices.clear()
            self._since_s = now_s

    def last(self, now_s: float, slices: int = _SLICES) -> Latencies | None:
        """Of the last so many slices, the unfinished one among them; None if they hold less than three inferences."""
        after = math.floor(now_s / self._slice_s) - slices
        total: Counter[int] = Counter()
        with self._lock:
            for index, counts in self._slices:
                if index > after:
                    for bucket, count in counts.items():
                        total[bucket] += count
        return _latencies(total)

    def _slice(self, index: int) -> Counter[int]:
        if not self._slices or index > self._slices[-1][0]:
            self._slices.append((index, Counter()))
        return self._slices[-1][1]  # a straggler goes to the newest


class Ladder:
    """Steps down when latency stays over the limit, and back up when a better rung is projected to hold it.

    **Over the limit for the whole window**: the 95th percentile of the last half window has been over the limit at
    every decision for one and a half windows. A slow spell shorter than a window cannot fill that, and a step in
    latency does within two, if there are ten inferences or more in a window. (The percentile of a whole window would
    be up for longer than a window after a spell of little more than a tenth of it.) Three inferences at least must be
    over; where half a window has fewer, nothing is decided: frames have stopped, or the engine hangs, and both are for
    others to see.

    **Down** goes one usable rung at a time and waits for no dwell time. A rung is not usable for an hour after it was
    refused, nor where it was measured no faster than the one in use. After each move the window begins empty, so that
    the next needs another one and a half windows of the new model's own latency.

    **Up** goes to the nearest rung above that has been projected under `recover_below` of its limit for a whole window,
    once its dwell time since the last move is over. The projection is what was measured of it, times how much slower
    than measured the rung in use runs now; a light moment does not lower it below what was measured. Both measurements
    must be known, and of the same conditions: measured while all was well, not while a rung was being left.

    **Dwell**: from `dwell_s` on, a rung's dwell time doubles each time it is left downwards after it was climbed to, up
    to an hour, and halves for each hour that it held before. So in the long run a rung is climbed to at most about once
    an hour, whatever the load does.

    **Conditions** are never a reason to step down while latency holds its limit: a model that is fast enough on a
    throttled board is fast enough. When latency is over, throttling, or else a lower power mode, seen meanwhile is
    named as the cause. While the board throttles there is no step up.

    `record` may be called from any thread, all else from one. `decide` is called every `interval_s`; after a longer
    silence than half a window it begins anew. What it returns it will suggest again until it is told `moved` or
    `refused`. When something else than the ladder changes the model, make a new ladder.
    """

    def __init__(self, rungs: Sequence[Rung], options: PolicyOptions, *, at: int = 0) -> None:
        if not 0 <= at < len(rungs):
            raise ValueError(f"there is no rung {at} among {len(rungs)}")
        self.rungs = tuple(rungs)
        self.interval_s = min(1.0, options.window_s / 10)
        self._options = options
        self._at = at
        self._window = LatencyWindow(options.window_s)
        self._trend = _Trend(longest_gap_s=options.window_s / 2)
        self._dwell_s = [options.dwell_s] * len(rungs)
        self._refused: dict[int, tuple[float, str]] = {}
        self._changes: deque[float] = deque(maxlen=options.max_changes_per_hour)
        self._now_s: float | None = None
        self._moved_s: float | None = None
        self._climbed_s: float | None = None
        self._seen = Conditions()
        self._last: Move | None = None
        self._verdict = _Verdict("no decision yet")

    def record(self, at_s: float, latency_ms: float) -> None:
        """One inference of the rung in use that ended at `at_s`: about two microseconds, under a lock."""
        self._window.add(at_s, latency_ms)

    def decide(self, now_s: float, *, measured_ms: Sequence[float | None], conditions: Conditions) -> Move | None:
        """What to do now, if anything. `measured_ms`: the 95th percentile measured of each rung earlier, on this
        machine, while all was well; None where it never ran."""
        self._now_s = now_s
        self._moved_s = now_s if self._moved_s is None else self._moved_s
        self._verdict = self._judge(now_s, measured_ms, conditions)
        return self._verdict.move

    def moved(self, now_s: float, to: int) -> None:
        """The move was carried out: `to` is in use, its window begins empty, its dwell time begins."""
        if not 0 <= to < len(self.rungs) or to == self._at:
            raise ValueError(f"cannot have moved from rung {self._at} to {to} of {len(self.rungs)}")
        if to > self._at and self._climbed_s is not None:
            self._dwell_s[self._at] = self._dwell_after(self._dwell_s[self._at], now_s - self._climbed_s)
        self._climbed_s = now_s if to < self._at else None
        proposed = self._verdict.move
        self._last = proposed if proposed and proposed.to == to else None
        self._at = to
        self._now_s = self._moved_s = now_s
        self._changes.append(now_s)
        self._window.clear(now_s)
        self._trend.holds(None, now_s)
        self._verdict = _Verdict(self._last.reason if self._last else f"moved to {self.rungs[to]}")

    def refused(self, now_s: float, to: int, reason: str) -> None:
        """The move could not be made: rung `to` is left out for an hour."""
        self._refused[to] = (now_s + _HOUR_S, reason)
        self._verdict = _Verdict(f"{self.rungs[to]} was refused: {reason}")

    @property
    def standing(self) -> Standing:
        """For status and health."""
        now_s = self._now_s
        latencies = self._window.last(now_s) if now_s is not None else None
        return Standing(
            state=self._verdict.state or ("stepped_down" if self._at else "ok"),
            rung=self._at,
            limit_ms=self._limit_ms,
            p95_ms=round(latencies.p95_ms, 1) if latencies else None,
            changes_last_hour=self._changes_before(now_s) if now_s is not None else 0,
            last=self._last,
            detail=self._verdict.detail,
        )

    def _judge(self, now_s: float, measured_ms: Sequence[float | None], conditions: Conditions) -> _Verdict:
        latencies = self._window.last(now_s, _HALF)
        if latencies is None:
            self._trend.holds(None, now_s)
            return _Verdict(f"fewer than {_FEWEST} inferences in {self._options.window_s / 2:g} s: nothing to judge by")
        if latencies.exceed(self._limit_ms):
            return self._down(now_s, latencies, measured_ms, conditions)
        return self._up(now_s, latencies, measured_ms, conditions)

    def _down(
        self, now_s: float, latencies: Latencies, measured_ms: Sequence[float | None], conditions: Conditions
    ) -> _Verdict:
        over_s = self._trend.holds("down", now_s)
        self._seen = conditions if over_s == 0 else _merged(self._seen, conditions)
        if over_s < _PATIENCE * self._options.window_s:
            return _Verdict(f"p95 is {latencies.p95_ms:.1f} ms for {over_s:.0f} s, the limit is {self._limit_ms:g} ms")
        cause, reason = self._why(self._window.last(now_s) or latencies)
        to = self._below(now_s, latencies, measured_ms)
        if to is None:
            return _Verdict(f"{reason}; {self._no_lower(now_s)}", "floor")
        return self._propose(now_s, Move(to, cause, reason))

    def _up(
        self, now_s: float, latencies: Latencies, measured_ms: Sequence[float | None], conditions: Conditions
    ) -> _Verdict:
        if self._at == 0:
            to, detail = None, "the best model runs within its limit"
        elif conditions.throttling:
            to, detail = None, f"no step up meanwhile: {conditions.throttling}"
        else:
            to, detail = self._above(now_s, latencies, measured_ms)
        fits_s = self._trend.holds(to, now_s)
        if to is None:
            return _Verdict(detail)
        wait_s = max(self._options.window_s - fits_s, self._dwell_left_s(now_s, to))
        if wait_s > 0:
            return _Verdict(f"{detail}; {wait_s:.0f} s to wait")
        return self._propose(now_s, Move(to, "recovered", f"{detail} for {self._options.window_s:g} s"))

    def _propose(self, now_s: float, move: Move) -> _Verdict:
        most = self._options.max_changes_per_hour
        if self._changes_before(now_s) >= most:
            return _Verdict(f"{move.reason}; but there were {most} changes in an hour, all there may be", "spent")
        return _Verdict(move.reason, move=move)

    def _below(self, now_s: float, latencies: Latencies, measured_ms: Sequence[float | None]) -> int | None:
        """The next usable rung down."""
        here_ms = measured_ms[self._at] or latencies.p95_ms
        for rung in range(self._at + 1, len(self.rungs)):
            known_ms = measured_ms[rung]
            if not self._is_refused(rung, now_s) and (known_ms is None or known_ms < here_ms):
                return rung
        return None

    def _above(self, now_s: float, latencies: Latencies, measured_ms: Sequence[float | None]) -> tuple[int | None, str]:
        """The nearest rung up that is projected to hold its limit, and the figures; or None, and why the nearest is
        not."""
        here_ms = measured_ms[self._at]
        if not here_ms:
            return None, f"{self.rungs[self._at]} was never measured here: nothing to project from"
        slower = max(1.0, latencies.p95_ms / here_ms)
        why_not: list[str] = []
        for rung in range(self._at - 1, -1, -1):
            fits, figures = self._project(now_s, rung, measured_ms[rung], slower)
            if fits:
                return rung, figures
            why_not.append(figures)
        return None, "; ".join(why_not)

    def _project(self, now_s: float, rung: int, known_ms: float | None, slower: float) -> tuple[bool, str]:
        if self._is_refused(rung, now_s):
            return False, f"{self.rungs[rung]} was refused: {self._refused[rung][1]}"
        if known_ms is None:
            return False, f"{self.rungs[rung]} was never measured here"
        projected_ms, bar_ms = known_ms * slower, self._options.recover_below * self.rungs[rung].limit_ms
        fits = projected_ms < bar_ms
        measured = f"(measured {known_ms:.1f} ms, now times {slower:.2f})"
        compared = "under" if fits else "not under"
        return fits, f"{self.rungs[rung]} is projected at {projected_ms:.1f} ms {measured}, {compared} {bar_ms:g} ms"

    def _why(self, latencies: Latencies) -> tuple[Cause, str]:
        figures = f"p95 of inference was {latencies.p95_ms:.1f} ms for {self._options.window_s:g} s"
        figures = f"{figures}, the limit is {self._limit_ms:g} ms"
        if self._seen.throttling:
            return "thermal", f"{figures}; {self._seen.throttling}"
        if self._seen.power_mode:
            return "power_mode", f"{figures}; {self._seen.power_mode}"
        return "latency", figures

    def _no_lower(self, now_s: float) -> str:
        refused = [
            f"{self.rungs[i]} was refused: {why}" for i, (until_s, why) in self._refused.items() if now_s < until_s
        ]
        return "; ".join(["no model below is of use", *refused])

    def _is_refused(self, rung: int, now_s: float) -> bool:
        return rung in self._refused and now_s < self._refused[rung][0]

    def _dwell_left_s(self, now_s: float, to: int) -> float:
        moved_s = now_s if self._moved_s is None else self._moved_s
        return self._dwell_s[to] - (now_s - moved_s)

    def _dwell_after(self, dwell_s: float, held_s: float) -> float:
        least_s = self._options.dwell_s
        return min(max(_HOUR_S, least_s), max(least_s, dwell_s * 2 ** (1 - held_s / _HOUR_S)))

    def _changes_before(self, now_s: float) -> int:
        return sum(now_s - changed_s < _HOUR_S for changed_s in self._changes)

    @property
    def _limit_ms(self) -> float:
        return self.rungs[self._at].limit_ms


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a decision came to; without a `state` it is that of the rung."""

    detail: str
    state: LadderState | None = None
    move: Move | None = None


class _Trend:
    """For how long every decision has come to the same: "down", up to one rung, or nothing."""

    def __init__(self, *, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._what: int | str | None = None
        self._since_s = 0.0
        self._told_s = -math.inf

    def holds(self, what: int | str | None, now_s: float) -> float:
        if what != self._what or now_s - self._told_s > self._longest_gap_s:
            self._what, self._since_s = what, now_s
        self._told_s = now_s
        return now_s - self._since_s


def rungs(active: str, models: Mapping[str, ModelOptions], options: PolicyOptions) -> list[Rung]:
    """The ladder below `active`: itself, its own cheaper engines, then the models of `[policy] ladder`; of those only
    the ones after it, where it is named there itself."""

    def entry(model: str) -> ModelOptions | None:
        return models.get(model) or models.get(model.partition("@")[0])

    def limit_ms(model: str) -> float:
        own = entry(model)
        return own.max_latency_ms if own and own.max_latency_ms else options.max_latency_ms

    own = entry(active)
    cheaper = [Rung(active, limit_ms(active), one.precision, one.size) for one in (own.cheaper if own else ())]
    names = (active, active.partition("@")[0])
    after = next((i + 1 for i, name in enumerate(options.ladder) if name in names), 0)
    return [Rung(active, limit_ms(active)), *cheaper, *(Rung(name, limit_ms(name)) for name in options.ladder[after:])]


def _merged(before: Conditions, now: Conditions) -> Conditions:
    return Conditions(now.throttling or before.throttling, now.power_mode or before.power_mode)


def _bucket(latency_ms: float) -> int:
    return int(math.log(min(max(latency_ms, _LEAST_MS), _MOST_MS) / _LEAST_MS, _STEP))


def _middle_ms(bucket: int) -> float:
    return float(_LEAST_MS * _STEP ** (bucket + 0.5))


def _latencies(counts: Counter[int]) -> Latencies | None:
    count = counts.total()
    if count < _FEWEST:
        return None
    return Latencies(p95_ms=_slowest_but(count // 20, counts), third_ms=_slowest_but(2, counts))


def _slowest_but(slower: int, counts: Counter[int]) -> float:
    """The slowest when so many that are slower are left out."""
    bucket = 0
    for bucket in sorted(counts, reverse=True):
        slower -= counts[bucket]
        if slower < 0:
            break
    return _middle_ms(bucket)
