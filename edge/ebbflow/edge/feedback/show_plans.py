"""What `ebbflow-edge privacy plans` says: what the cloud asked of this device, with its own words."""

import json
from collections.abc import Sequence

from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.edge.feedback.history import Decision

_TEXT_CHARACTERS = 100


def _plain(text: str) -> str:
    """What the cloud wrote, without anything that could move a terminal's cursor."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _short(text: str) -> str:
    plain = _plain(text)
    return plain if len(plain) <= _TEXT_CHARACTERS else f"{plain[: _TEXT_CHARACTERS - 1]}…"


def _asked(plan: pb.RoundPlan) -> str:
    policy = plan.policy
    epsilon = epsilon_of(plan.mechanism.rho_nano, policy.delta) if 0 < policy.delta < 1 else 0.0
    what = (
        f"adapter updates of {plan.adapter.dimension} values"
        if plan.HasField("adapter")
        else (f"votes over {len(plan.bins)} bins" + (f" and {len(plan.metrics)} counters" if plan.metrics else ""))
    )
    return f"{what}; epsilon {epsilon:.2f} for each user (delta {policy.delta:g})"


def _bin_lines(plan: pb.RoundPlan, texts: int) -> list[str]:
    lines = []
    for bin_ in plan.bins:
        lines.append(f"    {_short(bin_.bin_id)} ({len(bin_.texts)} texts)")
        lines += [f"      {_short(text)}" for text in bin_.texts[:texts]]
    return lines


def _lines(decision: Decision, texts: int) -> list[str]:
    did = "answered" if decision.answered else f"declined: {decision.reason}"
    head = f"{decision.time:%Y-%m-%d %H:%M} {_short(decision.round) or 'a plan without a name'} {did}"
    body = [f"  for {_short(decision.student)}, policy version {decision.policy_version}: {_asked(decision.plan)}"]
    return [head, *(body if decision.student else []), *_bin_lines(decision.plan, texts)]


def as_text(decisions: Sequence[Decision], texts: int) -> str:
    """Returns the plans, newest first, in lines.

    Args:
        decisions: from `FeedbackStore.decisions`.
        texts: how many texts of each bin to show.
    """
    if not decisions:
        return "The cloud has asked nothing of this device yet."
    return "\n".join(line for decision in decisions for line in _lines(decision, texts))


def as_json(decisions: Sequence[Decision]) -> str:
    """Returns everything that is kept of the plans, as one JSON array."""
    return json.dumps(
        [
            {
                "time": decision.time.isoformat(),
                "round": decision.round,
                "student": decision.student,
                "policyVersion": decision.policy_version,
                "decision": "answered" if decision.answered else "declined",
                "reason": decision.reason,
                "plan": MessageToDict(decision.plan),
            }
            for decision in decisions
        ],
        indent=2,
    )
