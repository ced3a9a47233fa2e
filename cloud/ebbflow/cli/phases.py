"""Phases of a rollout as people spell them: "0.05 soak=10m", "count=5 selector=ring=canary failure=0.1". No IO."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ebbflow.cli import quantities, values
from ebbflow.common.errors import EbbflowError, Reason

CANARY_SHARE = 0.1
"""First phase of somebody who sets gates but no phases."""
_MOST_COUNT = 2**32 - 1
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(%?)")


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """One phase; None leaves a field to the cloud."""

    share: float | None = None
    """Share of the student's agents that the phase brings in, above 0 to 1."""
    count: int | None = None
    """Number of agents instead."""
    selector: str | None = None
    """Only agents with these labels, such as "ring=canary"."""
    success_share: float | None = None
    """Advances when this share of those that answered succeeded."""
    failure_share: float | None = None
    """Halts when more than this share of those that answered failed."""
    min_answers: int | None = None
    """Answers needed before either share counts."""
    soak_s: float | None = None
    """Wait between success and the next phase."""
    silence_s: float | None = None
    """An agent that was told and stays silent for so long has failed."""
    probe_rise: float | None = None
    """Halts when the mean probe loss rises by more, in nats per token."""
    acceptance_drop: float | None = None
    """Halts when the share of good outcomes is lower by more than on the other agents."""

    @property
    def takes_the_rest(self) -> bool:
        """Whether it is for everybody who is left."""
        return self.share == 1 and self.count is None and self.selector is None


def _share(text: str) -> float:
    match = _NUMBER.fullmatch(text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise ValueError
    return value


def _above_0(text: str) -> float:
    if not (value := _share(text)):
        raise ValueError
    return value


def _below_1(text: str) -> float:
    if (value := _share(text)) == 1:
        raise ValueError
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text) or not 0 < int(text) <= _MOST_COUNT:
        raise ValueError
    return int(text)


def _selector(text: str) -> str:
    values.labels(text.split(","))
    return text


def _seconds(text: str) -> float:
    return round(values.seconds(text), 3)


def _nats(text: str) -> float:
    match = _NUMBER.fullmatch(text)
    if not match or match[2] or float(match[1]) == float("inf"):
        raise ValueError
    return float(match[1])


_Reader = Callable[[str], Any]
_Writer = Callable[[Any], str]
_KEYS: dict[str, tuple[str, _Reader, _Writer]] = {
    "share": ("share", _above_0, quantities.number),
    "count": ("count", _count, str),
    "selector": ("selector", _selector, str),
    "soak": ("soak_s", _seconds, quantities.duration),
    "success": ("success_share", _above_0, quantities.number),
    "failure": ("failure_share", _below_1, quantities.number),
    "min-answers": ("min_answers", _count, str),
    "silence": ("silence_s", _seconds, quantities.duration),
    "probe-rise": ("probe_rise", _nats, quantities.number),
    "acceptance-drop": ("acceptance_drop", _below_1, quantities.number),
}
KEYS = tuple(_KEYS)


def read(text: str) -> PhaseSpec:
    """Reads a phase: words of the form key=value; a first word without a key is the share.

    Raises:
        EbbflowError: INVALID_REQUEST naming the word.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise _wrong(text, "a quotation mark is not closed") from None
    found: dict[str, Any] = {}
    for index, word in enumerate(words):
        key, value = ("share", word) if index == 0 and "=" not in word else word.partition("=")[::2]
        if key not in _KEYS or _KEYS[key][0] in found:
            fault = "is there twice" if key in _KEYS else f"is none of {', '.join(KEYS)}"
            raise _wrong(text, f"{key!r} {fault}")
        field, reader, _ = _KEYS[key]
        try:
            found[field] = reader(value)
        except ValueError:
            raise _wrong(text, f"{key} cannot be {value!r}") from None
    if not found.keys() & {"share", "count", "selector"}:
        raise _wrong(text, "say which agents: a share, count= or selector=")
    if "share" in found and "count" in found:
        raise _wrong(text, "share and count exclude each other")
    return PhaseSpec(**found)


def write(spec: PhaseSpec) -> str:
    """Returns a text that `read` reads as the same phase."""
    words = []
    for key, (field, _, writer) in _KEYS.items():
        if (value := getattr(spec, field)) is not None:
            text = writer(value)
            words.append(shlex.quote(text if key == "share" else f"{key}={text}"))
    return " ".join(words)


def plan(texts: Iterable[str], gates: Mapping[str, Any], default: Iterable[PhaseSpec] = ()) -> list[PhaseSpec]:
    """Returns the phases of a rollout.

    Without texts and gates the list is empty, which leaves the choice to the cloud. A last phase for everybody who is
    left is added if there is none.

    Args:
        texts: the phases.
        gates: fields for every phase that does not have its own; None is left out.
        default: phases to take, changed by the gates, if there are gates alone.

    Raises:
        EbbflowError: INVALID_REQUEST if a text is no phase.
    """
    given = {name: value for name, value in gates.items() if value is not None}
    specs = [_fill(read(text), given) for text in texts]
    if not specs and given:
        specs = [replace(spec, **given) for spec in default] or [PhaseSpec(share=CANARY_SHARE, **given)]
    if specs and not specs[-1].takes_the_rest:
        specs.append(PhaseSpec(share=1.0, **given))
    return specs


def to_proto(spec: PhaseSpec) -> Any:
    """Returns the message."""
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.rollout_pb2 import Phase

    def length(seconds: float | None) -> Duration | None:
        if seconds is None:
            return None
        made = Duration()
        made.FromMilliseconds(round(seconds * 1000))
        return made

    return Phase(
        share=spec.share or 0,
        count=spec.count or 0,
        selector=spec.selector or "",
        success_share=spec.success_share or 0,
        failure_share=spec.failure_share or 0,
        min_answers=spec.min_answers or 0,
        soak=length(spec.soak_s),
        silence_limit=length(spec.silence_s),
        max_probe_rise=spec.probe_rise or 0,
        max_acceptance_drop=spec.acceptance_drop or 0,
    )


def of_proto(message: Any) -> PhaseSpec:
    """Returns the phase of a message."""
    return PhaseSpec(
        share=message.share or None,
        count=message.count or None,
        selector=message.selector or None,
        success_share=message.success_share or None,
        failure_share=message.failure_share or None,
        min_answers=message.min_answers or None,
        soak_s=message.soak.ToMilliseconds() / 1000 if message.HasField("soak") else None,
        silence_s=message.silence_limit.ToMilliseconds() / 1000 if message.HasField("silence_limit") else None,
        probe_rise=message.max_probe_rise or None,
        acceptance_drop=message.max_acceptance_drop or None,
    )


def who(spec: PhaseSpec, *, last: bool) -> str:
    """Returns whom the phase brings in, for people: "10 %", "5 agents", "5 of ring=canary", "the rest"."""
    if last:
        return "the rest"
    if spec.count and not spec.selector:
        return f"{spec.count} agent{'s' if spec.count > 1 else ''}"
    amount = str(spec.count) if spec.count else quantities.percent(spec.share) if spec.share else ""
    return " of ".join(filter(None, (amount, spec.selector))) or "-"


def _fill(spec: PhaseSpec, given: Mapping[str, Any]) -> PhaseSpec:
    own = {field.name for field in fields(spec) if getattr(spec, field.name) is not None}
    return replace(spec, **{name: value for name, value in given.items() if name not in own})


def _wrong(text: str, fault: str) -> EbbflowError:
    message = f'{text!r} is no phase such as 0.1, "0.05 soak=10m" or "count=5 selector=ring=canary": {fault}'
    return EbbflowError(Reason.INVALID_REQUEST, message, field="phase")
