"""Agents that save noise are found by their null bins of several rounds, and left out, on every database."""

import math
from fractions import Fraction

import pytest
from feedback_world import AGENTS, DAY, NOW, SIGNER, Device, add_fleet, open_round

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback import policies, round_rows, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Student
from ebbflow.common.errors import EbbflowError
from ebbflow.common.privacy import release
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import Contribution

ROUNDS = 15


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        policy = pb.PrivacyPolicy(epsilon=8.0, rounds_per_window=ROUNDS)
        policies.append(session, student, policy, "", PlanSigner(SIGNER), NOW)
    return registry


def test_an_agent_with_too_little_noise_is_left_out_once_it_shows(
    fleet: Registry, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []
    refused: set[int] = set()
    for number in range(ROUNDS):
        time = NOW + number * DAY
        round_ = open_round(fleet, time)
        for device in devices:
            saved = Fraction(156, 100) if device.agent == AGENTS[1] else Fraction(1)
            with monkeypatch.context() as patch:
                patch.setattr(
                    release, "DiscreteGaussian", lambda variance, saved=saved: DiscreteGaussian(variance / saved)
                )
                try:
                    device.submit(fleet, device.answer(fleet, [Contribution(0)] * 50, time), time)
                except EbbflowError as error:
                    assert error.metadata["why"] == "under_noised"  # noqa: PT017 - one batch in some hundred
                    refused.add(number)
        with fleet.transaction() as session:
            result = round_rows.aggregate_of(rounds.close_round(session, round_.id))
        found.append(list(result.under_noised_agents))
    assert found[0] == []
    kept = [names for number, names in enumerate(found) if number not in refused]
    assert kept[-1] == [f"agents/{AGENTS[1]}"]
    assert all(names in ([], [f"agents/{AGENTS[1]}"]) for names in found)
    assert result.batches == 2
    assert result.noise_std == pytest.approx(math.sqrt(2 * variance_of(round_rows.plan_of(round_).mechanism)))
    assert result.bins[0].seen == pytest.approx(100, abs=6 * result.noise_std)


def test_an_agent_that_was_refused_twice_is_left_out_when_a_batch_passes_by_luck(
    fleet: Registry, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in range(3):
        time = NOW + number * DAY
        round_ = open_round(fleet, time)
        with monkeypatch.context() as patch:
            if number < 2:
                patch.setattr(release, "DiscreteGaussian", lambda variance: DiscreteGaussian(variance / 9))
            signed = devices[0].answer(fleet, [], time)
        if number < 2:
            with pytest.raises(EbbflowError):
                devices[0].submit(fleet, signed, time)
        else:
            devices[0].submit(fleet, signed, time)
        devices[1].submit(fleet, devices[1].answer(fleet, [], time), time)
        with fleet.transaction() as session:
            result = round_rows.aggregate_of(rounds.close_round(session, round_.id))
        found.append((list(result.under_noised_agents), result.batches))
    assert found == [([], 1), ([], 1), ([f"agents/{AGENTS[0]}"], 1)]
