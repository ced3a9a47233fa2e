"""The gates on how well devices serve a release."""

from dataclasses import replace

import pytest
from device_fleet import NEW, SECOND, Fleet

from ebbflow.cloud.registry.tables import RolloutState
from ebbflow.cloud.rollout import verbs
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.state import Acceptance


def measured(fleet: Fleet, agent: str, rise: float) -> None:
    fleet.answer(agent)
    fleet.devices[agent] = replace(fleet.devices[agent], probe_rise=rise)


def test_a_mean_rise_of_the_probe_loss_halts_although_every_device_accepted_it() -> None:
    fleet = Fleet((Phase(share=0.5, max_probe_rise=0.1, min_answers=2), Phase()), agents=4)
    states = []
    for agent, rise in zip(fleet.wanting(NEW), (0.25, 0.05), strict=True):
        measured(fleet, agent, rise)
        fleet.tick()
        states.append(fleet.rollout.state)
    assert states == [RolloutState.RUNNING, RolloutState.HALTED], "one answer is not enough"
    assert fleet.rollout.reason == (
        "phase 1: the probe loss rose by 0.15 nats per token on average over 2 devices, 0.1 is allowed"
    )


def test_whoever_resumes_overrules_the_rise_of_the_phases_that_have_begun() -> None:
    fleet = Fleet((Phase(share=0.5, max_probe_rise=0.1), Phase(max_probe_rise=0.1)), agents=2)
    measured(fleet, fleet.wanting(NEW)[0], 0.5)
    fleet.tick()
    fleet.keep(verbs.resume(fleet.rollout, fleet.devices.values(), fleet.now))
    fleet.tick()
    assert (fleet.rollout.state, fleet.rollout.phase_index) == (RolloutState.RUNNING, 1)
    assert [phase.max_probe_rise for phase in fleet.rollout.phases] == [0.0, 0.1]


@pytest.mark.parametrize(("informative", "significant"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_drop_of_acceptance_halts_only_when_the_counts_say_enough(informative: bool, significant: bool) -> None:
    fleet = Fleet((Phase(share=0.5, max_acceptance_drop=0.05, soak=3600 * SECOND), Phase()), agents=2)
    fleet.answer(fleet.wanting(NEW)[0])
    said = Acceptance(rate=0.5, elsewhere=0.7, drop_significant=significant, informative=informative)
    fleet.rollout = replace(fleet.rollout, acceptance=(said, None))
    fleet.tick()
    halted = fleet.rollout.state is RolloutState.HALTED
    assert halted == (informative and significant)
    assert not halted or "50% of outcomes were good, 70% elsewhere" in fleet.rollout.reason


def test_a_drop_that_nobody_asked_about_does_not_halt() -> None:
    fleet = Fleet((Phase(share=0.5, soak=3600 * SECOND), Phase()), agents=2)
    said = Acceptance(rate=0.1, elsewhere=0.9, drop_significant=True, informative=True)
    fleet.rollout = replace(fleet.rollout, acceptance=(said, None))
    fleet.tick()
    assert fleet.rollout.state is RolloutState.RUNNING
