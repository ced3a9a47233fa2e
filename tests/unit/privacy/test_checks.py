"""Every way in which a batch can break its plan has a word of its own."""

import hashlib
import uuid
from collections.abc import Callable

import adapter_world
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.checks import MAX_BATCH_BYTES, Refusal, check_batch, parse_batch
from ebbflow.common.privacy.gaussian import SAMPLER, DiscreteGaussian, tail
from ebbflow.common.privacy.vector import layout_of


@pytest.fixture
def batch(plan: pb.RoundPlan) -> pb.FeedbackBatch:
    return pb.FeedbackBatch(
        batch_id=str(uuid.uuid4()),
        round=plan.round,
        plan_sha256=digest(plan),
        mechanism=plan.mechanism,
        noisy=DiscreteGaussian(variance_of(plan.mechanism)).sample(layout_of(plan).length),
        sampler=SAMPLER,
    )


def digest(plan: pb.RoundPlan) -> bytes:
    return hashlib.sha256(plan.SerializeToString(deterministic=True)).digest()


def refusal_of(check: Callable[[], object]) -> str:
    with pytest.raises(EbbflowError) as caught:
        check()
    assert caught.value.reason is Reason.BATCH_REFUSED
    return caught.value.metadata["why"]


def test_a_correct_batch_passes(plan: pb.RoundPlan, batch: pb.FeedbackBatch) -> None:
    check_batch(plan, digest(plan), parse_batch(batch.SerializeToString(deterministic=True)))


BROKEN: dict[str, tuple[Callable[[pb.FeedbackBatch], object], Refusal]] = {
    "other plan": (lambda batch: setattr(batch, "plan_sha256", b"other"), Refusal.PLAN_MISMATCH),
    "variance": (lambda batch: setattr(batch.mechanism, "sigma_squared_numerator", 1), Refusal.MECHANISM_MISMATCH),
    "sensitivity": (lambda batch: setattr(batch.mechanism, "sensitivity_squared", 1), Refusal.MECHANISM_MISMATCH),
    "cost": (lambda batch: setattr(batch.mechanism, "rho_nano", 1), Refusal.MECHANISM_MISMATCH),
    "sampler": (lambda batch: setattr(batch, "sampler", "numpy"), Refusal.SAMPLER),
    "a release in a round of votes": (lambda batch: setattr(batch, "base_release", 1), Refusal.BASE_RELEASE),
    "too long": (lambda batch: batch.noisy.append(0), Refusal.LENGTH),
    "empty": (lambda batch: batch.ClearField("noisy"), Refusal.LENGTH),
    "too large": (lambda batch: batch.noisy.__setitem__(0, 10**6), Refusal.VALUE_RANGE),
    "too small": (lambda batch: batch.noisy.__setitem__(0, -(10**6)), Refusal.VALUE_RANGE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_batch_that_breaks_its_plan_is_refused(plan: pb.RoundPlan, batch: pb.FeedbackBatch, name: str) -> None:
    break_, why = BROKEN[name]
    break_(batch)
    assert refusal_of(lambda: check_batch(plan, digest(plan), batch)) == why


def test_a_batch_without_any_negative_value_is_refused(plan: pb.RoundPlan, batch: pb.FeedbackBatch) -> None:
    batch.noisy[:] = [abs(value) for value in batch.noisy]
    assert refusal_of(lambda: check_batch(plan, digest(plan), batch)) == Refusal.NO_NEGATIVES


def test_values_up_to_the_limits_pass_and_beyond_do_not(plan: pb.RoundPlan, batch: pb.FeedbackBatch) -> None:
    reach = tail(variance_of(plan.mechanism))
    limits = {0: 50 + reach, 6: 2 * 50 + reach, 7: reach, -1: reach}  # a vote, the metric of cap 2, null bins
    for cell, limit in limits.items():
        batch.noisy[cell] = limit
    check_batch(plan, digest(plan), batch)
    for cell, limit in limits.items():
        batch.noisy[cell] = limit + 1
        assert refusal_of(lambda: check_batch(plan, digest(plan), batch)) == Refusal.VALUE_RANGE
        batch.noisy[cell] = limit


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"\xff\xff", Refusal.MALFORMED, id="garbage"),
        pytest.param(b"\x00" * (MAX_BATCH_BYTES + 1), Refusal.MALFORMED, id="huge"),
        pytest.param(b"\x7a\x03raw", Refusal.UNKNOWN_FIELDS, id="unknown"),
        pytest.param(b"", Refusal.BATCH_ID, id="empty"),
    ],
)
def test_what_is_not_a_batch_is_refused(data: bytes, why: Refusal) -> None:
    assert refusal_of(lambda: parse_batch(data)) == why


def test_raw_data_smuggled_beside_the_schema_is_refused(batch: pb.FeedbackBatch) -> None:
    data = batch.SerializeToString(deterministic=True)
    assert refusal_of(lambda: parse_batch(data + b"\x7a\x05users")) == Refusal.UNKNOWN_FIELDS
    inner = batch.mechanism.SerializeToString() + b"\x7a\x05users"
    assert refusal_of(lambda: parse_batch(data + b"\x22" + bytes([len(inner)]) + inner)) == Refusal.UNKNOWN_FIELDS


@pytest.mark.parametrize("batch_id", ["", "7", "not-a-uuid", "C0FFEE00-0000-4000-8000-000000000000"])
def test_an_id_that_is_no_uuid_is_refused(batch: pb.FeedbackBatch, batch_id: str) -> None:
    batch.batch_id = batch_id
    assert refusal_of(lambda: parse_batch(batch.SerializeToString(deterministic=True))) == Refusal.BATCH_ID


@pytest.mark.parametrize(("release", "taken"), [(0, True), (4, True), (3, True), (2, False), (5, False)])
def test_updates_to_releases_that_the_plan_does_not_take_are_refused(release: int, taken: bool) -> None:
    adapter = adapter_world.adapter_plan(adapter_world.config(), release=4, max_staleness=1)
    plan = adapter_world.round_plan(adapter)
    batch = pb.FeedbackBatch(
        batch_id=str(uuid.uuid4()),
        plan_sha256=digest(plan),
        mechanism=plan.mechanism,
        noisy=DiscreteGaussian(variance_of(plan.mechanism)).sample(adapter.dimension + 256),
        sampler=SAMPLER,
        base_release=release,
    )
    parsed = parse_batch(batch.SerializeToString(deterministic=True))
    if taken:
        check_batch(plan, digest(plan), parsed)
    else:
        assert refusal_of(lambda: check_batch(plan, digest(plan), parsed)) == Refusal.BASE_RELEASE


def test_the_largest_update_is_read() -> None:
    batch = pb.FeedbackBatch(batch_id=str(uuid.uuid4()), noisy=[-14_000] * (65_536 + 1024), sampler=SAMPLER)
    data = batch.SerializeToString(deterministic=True)
    assert len(parse_batch(data).noisy) == 66_560
    assert len(data) < MAX_BATCH_BYTES


@given(st.binary(max_size=300))
def test_no_bytes_whatever_are_read_as_more_than_their_schema(data: bytes) -> None:
    try:
        batch = parse_batch(data)
    except EbbflowError as error:
        assert error.metadata["why"] in {Refusal.MALFORMED, Refusal.UNKNOWN_FIELDS, Refusal.BATCH_ID}  # noqa: PT017
    else:
        assert batch.SerializeToString(deterministic=True) == data
