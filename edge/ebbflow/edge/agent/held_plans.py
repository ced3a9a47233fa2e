"""Plans that came with an earlier look and still wait, so that none travels twice while the agent runs."""

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from ebbflow.api.v1 import feedback_pb2 as pb

_MOST_BYTES = 8 << 20
"""Of plans that are held; the others come again with every look."""


class HeldPlans:
    """What the cloud has sent, whatever became of it: that a plan is held tells nothing about users."""

    def __init__(self) -> None:
        self._plans: dict[str, pb.SignedPlan] = {}

    @property
    def rounds(self) -> list[str]:
        """Names of the rounds whose plans are held."""
        return list(self._plans)

    def take(self, response: pb.GetPlanResponse) -> list[pb.SignedPlan]:
        """Returns the plans of every round that is open to this agent, and holds no others."""
        held = [self._plans[name] for name in response.held_rounds if name in self._plans]
        current = [*held, *response.plans]
        self._plans = dict(_small_enough(current))
        return current


def _small_enough(plans: Iterable[pb.SignedPlan]) -> Iterable[tuple[str, pb.SignedPlan]]:
    left_bytes = _MOST_BYTES
    for signed in plans:
        left_bytes -= len(signed.plan)
        if left_bytes < 0:
            return
        try:
            yield pb.RoundPlan.FromString(signed.plan).round, signed
        except DecodeError:  # declined where it is looked at
            continue
