"""Rounds of adapter updates: refused where they could say nothing, averaged so that no agent outweighs the others."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from adapter_world import PLENTY, adapter_plan, config, policy, round_plan

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback import adapters
from ebbflow.cloud.feedback.adapters import Update, average_of
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.adapters import agents_needed, check_adapter, unit_variance_of
from ebbflow.common.privacy.calibration import calibrate, complete_policy, variance_of
from ebbflow.common.student.model import Student

SETTINGS = round_pb2.AdapterSettings()


def refused(settings: round_pb2.AdapterSettings, allowed: pb.PrivacyPolicy, cohort: int) -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        adapters.make_adapter_plan(settings, 3, config(), allowed, cohort)
    return caught.value


class Fleet:
    """Noisy updates of honest agents whose users all pull in one direction."""

    def __init__(self, plan: pb.RoundPlan, seed: int = 0) -> None:
        self.plan, self._random = plan, np.random.default_rng(seed)
        self.sigma = math.sqrt(variance_of(plan.mechanism))
        self.size, self.scale = plan.adapter.dimension, plan.adapter.scale
        self.direction = self._random.standard_normal(self.size)
        self.direction /= np.linalg.norm(self.direction)

    def updates(self, agents: int, users: int, release: int = 1) -> list[Update]:
        signal = np.rint(self.direction * self.scale * users)
        return [Update(f"a{at}", release, (signal + np.rint(self.noise())).astype(np.int64)) for at in range(agents)]

    def noise(self) -> npt.NDArray[np.float64]:
        return self._random.standard_normal(self.size) * self.sigma


def test_zeros_take_the_defaults_and_the_result_is_sound() -> None:
    plan = adapters.make_adapter_plan(SETTINGS, 3, config(), policy(), PLENTY)
    assert (plan.rank, list(plan.modules), plan.steps, plan.batch_size) == (4, ["o_proj", "down_proj"], 8, 4)
    assert (plan.clip_norm, plan.learning_rate, plan.sequence_length, plan.users_per_agent) == (1.0, 1.0, 64, 1)
    assert (plan.release, plan.max_staleness) == (3, 0)
    check_adapter(round_plan(plan))


def test_staleness_never_reaches_below_the_first_release() -> None:
    asked = round_pb2.AdapterSettings(max_staleness=7)
    assert adapters.make_adapter_plan(asked, 3, config(), policy(), PLENTY).max_staleness == 2


def test_a_policy_that_does_not_allow_adapters_is_obeyed() -> None:
    error = refused(SETTINGS, complete_policy(pb.PrivacyPolicy(epsilon=8.0)), PLENTY)
    assert error.reason is Reason.STATE_CONFLICT


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"modules": ["lm_head"]}, "adapter.modules"), ({"rank": 2000}, "adapter.rank")],
)
def test_what_the_student_cannot_change_is_named(settings: dict[str, object], field: str) -> None:
    error = refused(round_pb2.AdapterSettings(**settings), policy(), PLENTY)  # type: ignore[arg-type]
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, field)


def test_the_rank_is_the_largest_that_the_fleet_makes_loud_unless_somebody_says_one() -> None:
    def rank(cohort: int, said: int = 0) -> int:
        settings = round_pb2.AdapterSettings(users_per_agent=20, rank=said)
        return adapters.make_adapter_plan(settings, 3, config(), policy(4.0), cohort).rank

    ranks = [rank(cohort) for cohort in range(2, 100)]
    assert ranks == sorted(ranks)
    assert set(ranks) == {1, 2, 4}
    assert rank(10**6) == 4
    assert rank(10**6, said=3) == 3


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_a_round_that_cannot_be_heard_is_refused_with_the_number_of_agents_that_could(epsilon: float) -> None:
    settings = round_pb2.AdapterSettings(users_per_agent=2)
    error = refused(settings, policy(epsilon), 3)
    assert error.reason is Reason.SIGNAL_TOO_WEAK
    needed = int(error.metadata["agents_needed"])
    unit = float(variance_of(calibrate(epsilon, 1e-6, 4)))
    assert needed == agents_needed(unit, 128, 2)
    assert f"{needed} such agents" in str(error)
    assert adapters.make_adapter_plan(settings, 3, config(), policy(epsilon), needed).users_per_agent == 2
    refused(settings, policy(epsilon), needed - 1)


def test_more_users_on_an_agent_are_worth_their_square_in_agents() -> None:
    unit = float(unit_variance_of(round_plan(adapter_plan(config()))))
    few, many = (agents_needed(unit, 10**5, users) for users in (5, 50))
    assert few == pytest.approx(100 * many, rel=0.02)


def test_the_average_is_what_one_user_changed() -> None:
    fleet = Fleet(round_plan(adapter_plan(config(), users_per_agent=20)))
    found = average_of(fleet.plan, fleet.updates(400, 20))
    assert found.agents == 400
    assert found.limited == 0
    assert found.signal_to_noise > 5
    assert float(found.values @ fleet.direction) == pytest.approx(1.0, abs=0.1)  # the clip norm
    assert float(np.linalg.norm(found.values)) == pytest.approx(1.0, abs=0.1)


def test_a_fleet_without_users_is_told_from_one_with_a_signal() -> None:
    """Of 200 rounds of noise none is called informative; by the law one in some hundred thousand is."""
    fleet = Fleet(round_plan(adapter_plan(config())))
    silent = [average_of(fleet.plan, fleet.updates(5, 0)) for _ in range(200)]
    ratios = [each.signal_to_noise for each in silent]
    assert abs(float(np.mean(ratios)) - 1) < 0.01
    assert not any(adapters.is_informative(ratio, fleet.size) for ratio in ratios)
    loud = average_of(fleet.plan, fleet.updates(5, 20))
    assert adapters.is_informative(loud.signal_to_noise, fleet.size)


def test_shrinking_brings_the_average_nearer_to_the_truth() -> None:
    """Measured over 50 rounds: the error of the shrunk average against that of the plain one."""
    fleet = Fleet(round_plan(adapter_plan(config(), users_per_agent=5)))
    shrunk, plain = 0.0, 0.0
    for _ in range(50):
        updates = fleet.updates(10, 5)
        raw = np.mean([each.values for each in updates], axis=0) / (5 * fleet.scale)
        shrunk += float(np.sum((average_of(fleet.plan, updates).values - fleet.direction) ** 2))
        plain += float(np.sum((raw - fleet.direction) ** 2))
    assert shrunk < 0.75 * plain


def test_updates_to_releases_that_the_plan_does_not_take_are_left_out() -> None:
    plan = round_plan(adapter_plan(config(), release=9, max_staleness=2))
    fleet = Fleet(plan)
    for release, agents in ((9, 1), (7, 1), (6, 0), (10, 0), (0, 0)):
        assert average_of(plan, fleet.updates(1, 3, release)).agents == agents


def test_a_stale_update_weighs_less() -> None:
    plan = round_plan(adapter_plan(config(), release=9, max_staleness=3, users_per_agent=50))
    fleet = Fleet(plan)
    found = average_of(plan, [*fleet.updates(40, 50, 9), *fleet.updates(40, 0, 6)])
    # weights 1 and 1/2: (1 + 0) / (1 + 1/2)
    assert float(found.values @ fleet.direction) == pytest.approx(2 / 3, abs=0.05)


def test_no_agent_changes_the_average_by_more_than_the_largest_norm() -> None:
    plan = round_plan(adapter_plan(config(), users_per_agent=10))
    fleet = Fleet(plan)
    honest = fleet.updates(50, 10)
    hostile = Update("h", 1, (-1_000_000 * fleet.direction).astype(np.int64))
    clean, poisoned = average_of(plan, honest), average_of(plan, [*honest, hostile])
    assert (clean.limited, poisoned.limited) == (0, 1)
    step = plan.adapter.clip_norm / plan.adapter.scale / 10
    bound = (adapters.largest_norm(plan) + np.linalg.norm(np.sum([each.values for each in honest], 0)) / 50) / 51
    assert float(np.linalg.norm(clean.values - poisoned.values)) < 1.2 * bound * step
    assert float(poisoned.values @ fleet.direction) > 0.5


@pytest.mark.parametrize("hostile", [1, 5, 10])
def test_a_share_of_hostile_agents_does_not_turn_the_average_around(hostile: int) -> None:
    """Of 50, each pushing against it as hard as the norm allows."""
    plan = round_plan(adapter_plan(config(), users_per_agent=20))
    fleet = Fleet(plan)
    push = (-adapters.largest_norm(plan) * fleet.direction).astype(np.int64)
    updates = [*fleet.updates(50 - hostile, 20), *(Update(f"h{at}", 1, push) for at in range(hostile))]
    undefended = float(np.mean([each.values for each in updates], axis=0) @ fleet.direction) / (20 * fleet.scale)
    defended = average_of(plan, updates)
    assert defended.limited >= hostile
    assert float(defended.values @ fleet.direction) > max(0.4, undefended)


def test_honest_agents_are_not_limited_even_with_twice_the_users() -> None:
    fleet = Fleet(round_plan(adapter_plan(config(), users_per_agent=10)))
    assert average_of(fleet.plan, fleet.updates(500, 20)).limited == 0


def test_busy_agents_are_not_limited_where_most_agents_have_no_users() -> None:
    fleet = Fleet(round_plan(adapter_plan(config(), users_per_agent=100)))
    updates = [*fleet.updates(60, 0), *fleet.updates(40, 100)]
    found = average_of(fleet.plan, updates)
    assert found.limited == 0
    assert float(found.values @ fleet.direction) == pytest.approx(0.4, abs=0.05)


def test_no_updates_are_no_average() -> None:
    found = average_of(round_plan(adapter_plan(config())), [])
    assert (found.agents, found.signal_to_noise) == (0, 0.0)
    assert not found.values.any()


def applied(values: npt.NDArray[np.float32], plan: pb.AdapterPlan) -> tuple[Student, Student]:
    before, after = (Student.random(config(), 1, 0.2) for _ in range(2))
    adapters.apply(after, values.astype("<f4").tobytes(), plan)
    return before, after


@torch.no_grad()
def distance(before: Student, after: Student) -> float:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return math.sqrt(sum(float((one - other).square().sum()) for one, other in pairs))


def test_no_more_of_a_change_is_applied_than_one_user_may_change() -> None:
    plan = adapter_plan(config(), clip_norm=0.5)
    direction = np.random.default_rng(0).standard_normal(plan.dimension).astype(np.float32)
    direction *= 0.5 / np.linalg.norm(direction)
    half, whole, tenfold = (distance(*applied(direction * factor, plan)) for factor in (0.5, 1.0, 10.0))
    assert tenfold == pytest.approx(whole, rel=1e-4)
    assert half == pytest.approx(whole / 2, rel=1e-4)
    assert whole == pytest.approx(0.5, rel=0.3)  # A keeps lengths on average


def test_only_the_plan_s_layers_change() -> None:
    plan = adapter_plan(config())
    before, after = applied(np.ones(plan.dimension, np.float32), plan)
    changed = {
        name
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {
        f"model.layers.{at}.{name}.weight" for at in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(
    "values", [np.ones(511, np.float32), np.full(512, np.nan, np.float32), np.full(512, np.inf, np.float32)]
)
def test_a_blob_that_holds_no_change_is_refused(values: npt.NDArray[np.float32]) -> None:
    with pytest.raises(EbbflowError) as caught:
        applied(values, adapter_plan(config()))
    assert caught.value.reason is Reason.FILE_CORRUPT


def test_an_average_of_noise_is_not_learnt_from() -> None:
    noise = round_pb2.Aggregate(adapter=round_pb2.AdapterAggregate(agents=5, signal_to_noise=1.01))
    with pytest.raises(EbbflowError) as caught:
        adapters.check_usable(noise)
    assert caught.value.reason is Reason.SIGNAL_TOO_WEAK
    with pytest.raises(EbbflowError) as caught:
        adapters.check_usable(round_pb2.Aggregate(informative=True))
    assert caught.value.reason is Reason.STATE_CONFLICT
    noise.informative = True
    adapters.check_usable(noise)
