"""What there is to see of a rollout: facts as texts, for a terminal that follows it and for plain output. No IO."""

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ebbflow.cli import phases, windows
from ebbflow.cli.output import printable, table, when, word
from ebbflow.cli.quantities import duration, percent, size
from ebbflow.cli.watching import remaining

ENDED = frozenset({"succeeded", "halted", "aborted", "superseded"})
"""States in which nothing moves by itself any more."""
HEADS = ("PHASE", "AGENTS", "SUCCEEDED", "FAILED", "ASSIGNED", "WAITING")


@dataclass(frozen=True)
class Counts:
    """Devices by state."""

    waiting: int = 0
    assigned: int = 0
    succeeded: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.waiting + self.assigned + self.succeeded + self.failed

    @classmethod
    def of(cls, message: Any) -> "Counts":
        """Reads DeviceCounts."""
        return cls(message.waiting, message.assigned, message.succeeded, message.failed)


@dataclass(frozen=True)
class PhaseRow:
    """One phase."""

    number: int
    """From 1."""
    place: str
    """"done", "now" or "later"."""
    who: str
    counts: Counts
    measures: tuple[str, ...]
    """What decides on it beside the counts: soak time, probe rise, acceptance."""

    def cells(self) -> list[str]:
        """Returns one text for each of `HEADS`; "*" marks the current phase."""
        counts = self.counts
        head = f"{'*' if self.place == 'now' else ' '} {self.number}"
        numbers = (f"{counts.succeeded}/{counts.total}", counts.failed, counts.assigned, counts.waiting)
        return [head, self.who, *map(str, numbers)]


@dataclass(frozen=True)
class View:
    """A rollout at one moment."""

    name: str
    release: str
    state: str
    reason: str
    counts: Counts
    phases: tuple[PhaseRow, ...]
    phase: str
    """Such as "phase 1/2"."""
    bytes: str
    saved: str
    next: str
    failures: tuple[str, ...]
    """Such as "2 PROBE_FAILED: kiosk-1, kiosk-2"."""
    rules: str
    """Who made it, and when and how it may act."""


def view(rollout: Any, now: dt.datetime) -> View:
    """Reads a `Rollout`."""
    from ebbflow.api.v1.rollout_pb2 import Rollout

    state = word(Rollout.State, rollout.state)
    fetched, saved = traffic(rollout.fetched_bytes, rollout.full_bytes)
    return View(
        name=rollout.name,
        release=rollout.release,
        state=state.replace("_", " "),
        reason=printable(rollout.reason),
        counts=Counts.of(rollout.counts),
        phases=tuple(_row(rollout, index, state, now) for index in range(len(rollout.phases))),
        phase=f"phase {position(rollout)}",
        bytes=fetched,
        saved=saved,
        next=decision(rollout.next_decision, now, told=rollout.reason),
        failures=tuple(map(failure, rollout.failures)),
        rules=_rules(rollout),
    )


def position(rollout: Any) -> str:
    """Returns the current phase, counted from 1, and how many there are: "1/3"."""
    return f"{min(rollout.phase_index + 1, max(1, len(rollout.phases)))}/{len(rollout.phases)}"


def traffic(fetched_bytes: int, full_bytes: int) -> tuple[str, str]:
    """Returns what was fetched and what that saved, as texts; the second one is empty if nothing was."""
    if not full_bytes:
        return "nothing fetched yet" if not fetched_bytes else f"{size(fetched_bytes)} fetched", ""
    saved_bytes = full_bytes - fetched_bytes
    saved = f"{size(saved_bytes)} saved ({percent(saved_bytes / full_bytes)})" if saved_bytes > 0 else ""
    return f"{size(fetched_bytes)} fetched of {size(full_bytes)} in full", saved


def decision(message: Any, now: dt.datetime, told: str = "") -> str:
    """Returns the next decision, why it is not taken yet, and when it can be at the earliest.

    Args:
        message: a `NextDecision`; without an action there is nothing to say.
        now: the time.
        told: a reason that is shown elsewhere already.
    """
    if not message.action:
        return ""
    reason = message.reason if message.reason != told else ""
    text = printable(": ".join(filter(None, (message.action, reason))))
    if not message.HasField("earliest_time"):
        return text
    left_s = (message.earliest_time.ToDatetime(dt.UTC) - now).total_seconds()
    wait = f"in {remaining(left_s)}" if left_s >= 1 else "now"
    return f"{text}; at the earliest {when(message.earliest_time)} UTC ({wait})"


def failure(message: Any) -> str:
    """Returns one reason with its devices."""
    named = [agent.removeprefix("agents/") for agent in message.agents]
    more = message.count - len(named)
    text = ", ".join(named) + (f" and {more} more" if named and more > 0 else "")
    return printable(f"{message.count} {message.reason}" + (f": {text}" if text else ""))


def line(seen: View) -> str:
    """Returns everything on one line, for a log."""
    counts = seen.counts
    parts = [
        f"{seen.name} {seen.state} {counts.succeeded}/{counts.total} {seen.phase}",
        f"{counts.assigned} assigned",
        f"{counts.failed} failed" + (f" ({'; '.join(seen.failures)})" if seen.failures else ""),
    ]
    text = ", ".join([*parts, *([seen.saved] if seen.saved else [])])
    return "; ".join([text, *filter(None, [seen.reason, seen.next and f"next: {seen.next}"])])


def facts(seen: View) -> list[tuple[str, str]]:
    """Returns what is beside the phases, as names and texts."""
    counts = seen.counts
    agents = f"{counts.succeeded} of {counts.total} serve it, {counts.assigned} under way, {counts.failed} failed"
    known = [
        *((f"phase {row.number}", ", ".join(row.measures)) for row in seen.phases),
        ("agents", f"{agents}, {counts.waiting} not told"),
        ("bytes", ", ".join(filter(None, (seen.bytes, seen.saved)))),
        *(("failed" if index == 0 else "", text) for index, text in enumerate(seen.failures)),
        ("rules", seen.rules),
        ("reason", seen.reason),
        ("next", seen.next),
    ]
    return [(name, text) for name, text in known if text]


def lines(seen: View) -> list[str]:
    """Returns the whole view as plain lines."""
    known = facts(seen)
    width = max(len(name) for name, _ in known)
    return [
        f"{seen.name}  {seen.release}  {seen.state}",
        "",
        *table(HEADS, [row.cells() for row in seen.phases]),
        "",
        *(f"{name.ljust(width)}  {text}" for name, text in known),
    ]


def _row(rollout: Any, index: int, state: str, now: dt.datetime) -> PhaseRow:
    from ebbflow.api.v1.rollout_pb2 import PhaseResult

    phase = rollout.phases[index]
    result = rollout.results[index] if index < len(rollout.results) else PhaseResult()
    counts = Counts.of(result.counts)
    begun = state != "waiting_for_approval"
    current = index == rollout.phase_index and begun and state not in {"succeeded", "aborted", "superseded"}
    done = index < rollout.phase_index or (state == "succeeded" and index == rollout.phase_index)
    place = "now" if current else "done" if done else "later"
    return PhaseRow(
        number=index + 1,
        place=place,
        who=printable(phases.who(phases.of_proto(phase), last=index == len(rollout.phases) - 1)),
        counts=counts,
        measures=tuple(_measures(phase, result, place, now)),
    )


def _measures(phase: Any, result: Any, place: str, now: dt.datetime) -> Iterator[str]:
    if place == "now" and result.HasField("soak_end_time"):
        left_s = (result.soak_end_time.ToDatetime(dt.UTC) - now).total_seconds()
        yield f"soak {remaining(left_s)} left" if left_s >= 1 else "soak over"
    elif place == "now" and phase.soak.ToMilliseconds():
        yield f"soak {duration(phase.soak.ToMilliseconds() / 1000)} once it passes"
    if result.counts.succeeded + result.counts.failed:
        limit = f" (max {phase.max_probe_rise:.4g})" if phase.max_probe_rise else ""
        yield f"probe rise {round(result.probe_rise, 4) or 0.0:+.4f}{limit}"
    if result.acceptance_informative:
        yield f"accepted {100 * result.acceptance:.1f} % (others {100 * result.acceptance_elsewhere:.1f} %)"
    elif phase.max_acceptance_drop and place == "now":
        yield "acceptance says nothing yet"


def _rules(rollout: Any) -> str:
    from ebbflow.api.v1.rollout_pb2 import OnHalt

    said = [f"by {rollout.creator.removeprefix('admins/')}"] if rollout.creator else []
    said += [f"approved by {rollout.approver.removeprefix('admins/')}"] if rollout.approver else []
    said += [f"open {windows.listed(rollout.windows)}"] if rollout.windows else []
    if rollout.HasField("spread") and rollout.spread.ToMilliseconds():
        said.append(f"starts spread over {duration(rollout.spread.ToMilliseconds() / 1000)}")
    if rollout.on_halt:
        said.append(f"on a halt {word(OnHalt, rollout.on_halt).replace('_', ' ')}")
    return printable(", ".join(said))
