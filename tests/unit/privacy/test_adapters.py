"""One user's change of an adapter is bounded in whole numbers, whatever was trained; plans say what they cost."""

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
from adapter_world import adapter_plan, config, round_plan
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError
from ebbflow.common.privacy import adapters, release
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.plans import check_plan
from ebbflow.common.privacy.vector import (
    AdapterContribution,
    Contribution,
    Layout,
    add_changes,
    add_contributions,
    layout_of,
    value_limits,
)

ANYTHING = st.floats(allow_nan=True, allow_infinity=True)


def squares(values: Iterable[int]) -> int:
    return sum(value * value for value in values)


@given(st.lists(ANYTHING, min_size=1, max_size=40), st.floats(1e-6, 1e3), st.integers(16, 1000))
def test_a_quantised_change_is_never_longer_than_the_scale(change: list[float], clip_norm: float, scale: int) -> None:
    values = adapters.quantise(change, clip_norm, scale).values
    assert len(values) == len(change)
    assert squares(values) <= scale**2


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.integers(16, 1000))
def test_rounding_makes_no_value_larger_and_turns_none_around(change: list[float], scale: int) -> None:
    values = adapters.quantise(change, 10.0, scale).values  # nothing is clipped: the norm is at most sqrt(40)
    for value, exact in zip(values, change, strict=True):
        assert abs(value) <= abs(exact) * scale / 10.0 < abs(value) + 1 + 1e-9
        assert value * exact >= 0


def test_one_user_s_broken_numbers_add_nothing_and_stop_nobody() -> None:
    for broken in (math.nan, math.inf, -math.inf):
        assert adapters.quantise([1.0, broken], 1.0, 100).values == (0, 0)


@given(st.data())
def test_a_user_more_changes_a_report_of_updates_by_at_most_the_scale(data: st.DataObject) -> None:
    size, scale = data.draw(st.integers(1, 8)), data.draw(st.integers(16, 400))
    change = st.lists(st.integers(-500, 500), min_size=size, max_size=size).map(AdapterContribution)
    others, user = data.draw(st.lists(change, max_size=5)), data.draw(change)
    layout = Layout(0, 0, 3, size)
    without, with_ = (add_changes(layout, scale**2, users) for users in (others, [*others, user]))
    assert squares(after - before for before, after in zip(without, with_, strict=True)) <= scale**2
    assert with_[size:] == [0, 0, 0]


def test_a_change_beyond_the_norm_adds_nothing_even_where_machine_integers_would_wrap() -> None:
    layout = Layout(0, 0, 0, 2)
    assert add_changes(layout, 100, [AdapterContribution((6, 8))]) == [6, 8]
    assert add_changes(layout, 100, [AdapterContribution((6, 9)), AdapterContribution((1, 2))]) == [1, 2]
    huge = np.array([2**32, 0], np.int64)  # its square is 0 in 64 bits
    assert add_changes(layout, 100, [AdapterContribution(huge)]) == [0, 0]  # type: ignore[arg-type]


def test_votes_and_changes_are_not_mixed_up() -> None:
    plan = round_plan(adapter_plan(config()))
    with pytest.raises(ValueError, match="votes in a round"):
        add_contributions(plan, [Contribution(0)])
    votes = pb.RoundPlan(bins=[pb.Bin(bin_id="a", texts=["a"])], null_bins=64)
    with pytest.raises(ValueError, match="votes in a round"):
        add_contributions(votes, [AdapterContribution((1,))])
    with pytest.raises(ValueError, match="a change of 1 values"):
        add_contributions(plan, [AdapterContribution((1,))])


def test_a_report_of_updates_has_noise_on_every_cell_around_the_sum() -> None:
    plan = round_plan(adapter_plan(config()))
    layout, scale = layout_of(plan), plan.adapter.scale
    size = layout.adapter
    assert (layout.bins, layout.metrics, layout.nulls) == (0, 0, 256)
    user = AdapterContribution([scale // 2, -(scale // 2)] + [0] * (size - 2))
    reports = [release.privatise(plan, [user] * 40) for _ in range(40)]
    sigma = math.sqrt(variance_of(plan.mechanism))
    values = np.array(reports, float)
    centred = values - np.array([20 * scale, -20 * scale] + [0] * (size - 2 + 256))
    error = sigma / math.sqrt(40)
    assert np.abs(centred.mean(axis=0)).max() < 6 * error
    assert np.all(np.abs(centred.std(axis=0, ddof=1) / sigma - 1) < 0.75)
    assert abs(centred.std() / sigma - 1) < 0.03
    least, most = value_limits(plan)
    assert np.all(values >= least)
    assert np.all(values <= most)
    assert [list(layout.adapter_cells(report)) + list(layout.null_cells(report)) for report in reports] == reports


def test_the_values_are_the_layers_of_the_student_in_its_order() -> None:
    shape = config()
    found = adapters.slots(shape, {"down_proj", "o_proj"}, 4)
    assert [slot.name for slot in found] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert [slot.begin for slot in found] == [0, *(slot.end for slot in found)][:-1]
    assert adapters.dimension_of(shape, {"down_proj", "o_proj"}, 4) == 4 * 4 * shape.hidden_size
    assert all(slot.end - slot.begin == 4 * slot.outputs for slot in found)


def test_a_plan_of_the_cloud_is_one_that_devices_accept() -> None:
    check_plan(round_plan(adapter_plan(config())))
    adapters.check_fits(adapter_plan(config()), config())


BAD: list[tuple[str, dict[str, object]]] = [
    ("null_bins", {"null_bins": 64}),
    ("bins", {"bins": [pb.Bin(bin_id="a", texts=["a"])]}),
    ("release", {"adapter": {"release": 0}}),
    ("release", {"adapter": {"max_staleness": 1}}),
    ("rank", {"adapter": {"rank": 65}}),
    ("modules", {"adapter": {"modules": ["lm_head"]}}),
    ("modules", {"adapter": {"modules": ["q_proj", "q_proj"]}}),
    ("dimension", {"adapter": {"dimension": adapters.MAX_DIMENSION + 1}}),
    ("clip_norm", {"adapter": {"clip_norm": math.nan}}),
    ("clip_norm", {"adapter": {"clip_norm": -1.0}}),
    ("steps", {"adapter": {"steps": 10**9}}),
    ("batch_size", {"adapter": {"batch_size": 65}}),
    ("sequence_length", {"adapter": {"sequence_length": 1}}),
    ("learning_rate", {"adapter": {"learning_rate": math.inf}}),
    ("users_per_agent", {"adapter": {"users_per_agent": 0}}),
]


@pytest.mark.parametrize(("why", "change"), BAD)
def test_a_plan_that_no_device_could_follow_within_reason_is_refused(why: str, change: dict[str, object]) -> None:
    plan = round_plan(adapter_plan(config()))
    for field, value in change.items():
        if isinstance(value, dict):
            plan.adapter.MergeFrom(pb.AdapterPlan())
            for inner, wanted in value.items():
                if isinstance(wanted, list):
                    plan.adapter.ClearField(inner)
                    getattr(plan.adapter, inner).extend(wanted)
                else:
                    setattr(plan.adapter, inner, wanted)
        elif isinstance(value, list):
            getattr(plan, field).extend(value)
        else:
            setattr(plan, field, value)
    with pytest.raises(EbbflowError) as caught:
        adapters.check_adapter(plan)
    assert caught.value.metadata["why"] == why
    with pytest.raises(EbbflowError):
        check_plan(plan)


def test_a_plan_whose_noise_is_that_of_another_scale_is_refused() -> None:
    plan = round_plan(adapter_plan(config()))
    plan.adapter.scale -= 1
    with pytest.raises(EbbflowError) as caught:
        check_plan(plan)
    assert caught.value.metadata["why"] == "sensitivity"


def test_a_plan_for_a_student_of_another_shape_is_refused() -> None:
    plan = adapter_plan(config())
    plan.dimension -= 1
    with pytest.raises(EbbflowError, match="has not"):
        adapters.check_fits(plan, config())


@given(st.floats(0.1, 100), st.integers(1, 10**5), st.integers(1, 500), st.floats(0.1, 10))
def test_the_agents_needed_are_as_many_as_reach_the_signal(unit: float, size: int, users: int, wanted: float) -> None:
    needed = adapters.agents_needed(unit, size, users, wanted)
    assert adapters.best_signal_to_noise(unit, size, users, needed) >= wanted * (1 - 1e-9)
    assert needed == 1 or adapters.best_signal_to_noise(unit, size, users, needed - 1) < wanted * (1 + 1e-9)


def test_the_arithmetic_is_that_of_the_published_table() -> None:
    """Devices for a signal as strong as the noise at sigma 1.19 and one user each: 1,450 at 1,024 values and so on."""
    for size, needed in ((1_024, 1_450), (8_192, 11_601), (65_536, 92_806)):
        assert adapters.agents_needed(1.19**2, size, 1) == pytest.approx(needed, rel=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0, 8.0, 64.0])
def test_the_scale_is_the_finest_for_which_noise_can_be_made(epsilon: float) -> None:
    unit = variance_of(calibrate(epsilon, 1e-6, 4))
    scale = adapters.choose_scale(unit)
    calibrate(epsilon, 1e-6, 4, scale**2)
    if scale < adapters.MAX_SCALE:
        with pytest.raises(EbbflowError):
            calibrate(epsilon, 1e-6, 4, (scale + 1) ** 2)


def test_so_strict_a_policy_that_no_scale_is_fine_enough_is_refused() -> None:
    with pytest.raises(EbbflowError, match="more noise than the sampler makes"):
        adapters.choose_scale(Fraction(10**6))
