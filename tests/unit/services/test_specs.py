"""Requests and policies as specifications of rollouts."""

import datetime as dt

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from hypothesis import example, given
from hypothesis import strategies as st

from ebbflow.api.v1 import resources_pb2
from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1.student_pb2 import RolloutPolicy
from ebbflow.cloud.registry.tables import OnHalt, Student
from ebbflow.cloud.rollout import wire
from ebbflow.cloud.services import specs
from ebbflow.cloud.services.installations import full_bytes
from ebbflow.common.errors import EbbflowError, Reason

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
DURATIONS = st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=st.integers(-(2**31), 2**31 - 1))
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
PHASES = st.builds(
    pb.Phase,
    share=NUMBERS,
    success_share=NUMBERS,
    failure_share=NUMBERS,
    min_answers=st.integers(0, 2**32 - 1),
    soak=DURATIONS,
    silence_limit=DURATIONS,
    count=st.integers(0, 2**32 - 1),
    selector=st.text(max_size=20),
    max_probe_rise=NUMBERS,
    max_acceptance_drop=NUMBERS,
)
WINDOWS = st.builds(
    pb.MaintenanceWindow,
    weekdays=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    start=st.text(max_size=6) | st.just("22:30"),
    duration=DURATIONS | st.just(Duration(seconds=60)),
    time_zone=st.text(max_size=12) | st.sampled_from(["", "Europe/Berlin", "../../etc/passwd", "/etc/localtime"]),
)
POLICIES = st.builds(
    RolloutPolicy,
    phases=st.lists(PHASES, max_size=3),
    windows=st.lists(WINDOWS, max_size=2),
    spread=DURATIONS | st.just(Duration(seconds=60)),
    on_halt=st.integers(-1, 4),
    kept_releases=st.integers(0, 2**32 - 1),
)


def student(policy: RolloutPolicy) -> Student:
    return Student(
        id="faq",
        teacher="",
        architecture={},
        corpus_sha256="0" * 64,
        topics=[],
        privacy_policy={},
        selector="",
        create_time=NOW,
        rollout_policy=MessageToDict(policy),
    )


@example(RolloutPolicy(spread=Duration(seconds=1, nanos=-1)))
@given(POLICIES)
def test_whatever_comes_is_a_policy_or_refused_by_a_field(policy: RolloutPolicy) -> None:
    try:
        specs.check_policy(policy)
    except EbbflowError as error:
        assert error.reason is Reason.INVALID_REQUEST  # noqa: PT017 - both outcomes are expected
        assert error.metadata["field"]  # noqa: PT017
        return
    found = specs.of(pb.Rollout(release="students/faq/releases/1"), student(policy), "admins/ada")
    assert [wire.window_message(window).start for window in found.windows] == [each.start for each in policy.windows]
    assert len(found.phases) == len(policy.phases)
    assert found.spread_s == policy.spread.ToTimedelta().total_seconds()


@pytest.mark.parametrize(
    ("asked", "policy", "expected"),
    [
        (pb.ON_HALT_UNSPECIFIED, pb.ON_HALT_UNSPECIFIED, OnHalt.HOLD),
        (pb.ON_HALT_UNSPECIFIED, pb.ON_HALT_ROLL_BACK, OnHalt.ROLL_BACK),
        (pb.ON_HALT_HOLD, pb.ON_HALT_ROLL_BACK, OnHalt.HOLD),
        (pb.ON_HALT_ROLL_BACK, pb.ON_HALT_HOLD, OnHalt.ROLL_BACK),
    ],
)
def test_what_the_request_says_goes_before_the_policy(
    asked: pb.OnHalt.ValueType, policy: pb.OnHalt.ValueType, expected: OnHalt
) -> None:
    wanted = pb.Rollout(release="students/faq/releases/1", on_halt=asked)
    assert specs.of(wanted, student(RolloutPolicy(on_halt=policy)), "admins/ada").on_halt is expected


TARGETS = {
    f"path/{kind}": {"sha256": "0" * 64, "size_bytes": size, "kind": kind}
    for kind, size in {"manifest": 1, "tokenizer": 20, "int8": 300, "int4": 150}.items()
}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (resources_pb2.PRECISION_INT8, 321),
        (resources_pb2.PRECISION_INT4, 171),
        (resources_pb2.PRECISION_BF16, 21),
        (resources_pb2.PRECISION_UNSPECIFIED, 21),
    ],
)
def test_a_full_download_is_manifest_tokenizer_and_variant(
    precision: resources_pb2.Precision.ValueType, expected: int
) -> None:
    assert full_bytes(TARGETS, precision) == expected
