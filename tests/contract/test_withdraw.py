"""Releases that are taken back, from an owner's call to the signed list, on every database."""

import datetime as dt
from typing import Any

import pytest

from ebbflow.api.v1 import release_pb2 as pb
from ebbflow.api.v1.release_pb2_grpc import ReleaseServiceStub
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Assignment, Pin, Release, ReleaseState, Rollout, RolloutState, Student
from ebbflow.cloud.release import keys, publish, repository, rules, withdraw
from ebbflow.common.errors import EbbflowError, Reason

Plane = Any


def signed_list(plane: Plane) -> tuple[set[int], dict[str, int]]:
    """Numbers of the releases that the signed list holds, and its min_release."""
    with plane.registry.reading() as session:
        student = repository.verified_student(session)
    return {number for _, number in rules.releases_of(student)}, rules.min_releases(student)


def publish_all(plane: Plane, *numbers: int) -> None:
    for number in numbers:
        plane.release(number, state=ReleaseState.PACKED, content=f"weights {number}".encode())
        go_round(plane)


def go_round(plane: Plane) -> None:
    """Distiller, gate and server each do what is theirs."""
    plane.sign()
    with plane.registry.transaction() as session:
        assert publish.publish(session, plane.cloud.online_signer, now())


def state(plane: Plane, number: int) -> ReleaseState:
    with plane.registry.reading() as session:
        found: ReleaseState = session.get_one(Release, ("faq", number)).state
        return found


def desired(plane: Plane, agent_id: str) -> int | None:
    with plane.registry.reading() as session:
        found: int | None = session.get_one(Assignment, (agent_id, "faq")).desired_number
        return found


async def test_a_revoked_release_leaves_devices_at_once_and_the_list_after_two_signatures(plane: Plane) -> None:
    plane.student()
    plane.agent("kiosk-1")
    publish_all(plane, 1, 2)
    stub = ReleaseServiceStub(plane.admin().channel)
    for number in (1, 2):
        plane.roll_out("faq", number)
        plane.serve("kiosk-1", "faq", number)
        with plane.registry.transaction() as session:
            for row in session.query(Rollout):
                row.state = RolloutState.SUCCEEDED
    assert desired(plane, "kiosk-1") == 2
    request = pb.RevokeReleaseRequest(name="students/faq/releases/2", reason="it insults people")
    answer = (await stub.RevokeRelease(request)).release
    assert (answer.state, answer.reason) == (pb.Release.STATE_REVOKED, "it insults people")
    assert desired(plane, "kiosk-1") == 1
    assert signed_list(plane) == ({1, 2}, {"faq": 1})
    go_round(plane)
    assert signed_list(plane) == ({1}, {"faq": 1})
    again = await stub.RevokeRelease(pb.RevokeReleaseRequest(name=request.name, reason="once more"))
    assert again.release == answer
    with plane.registry.transaction() as session:
        assert publish.propose(session, keys.load(plane.cloud.settings.paths.keys, "distiller")) is None
    with pytest.raises(EbbflowError) as caught:
        plane.roll_out("faq", 2)
    assert caught.value.reason is Reason.RELEASE_REVOKED


async def test_a_release_that_is_revoked_while_it_is_evaluated_is_never_published(plane: Plane) -> None:
    plane.student()
    publish_all(plane, 1)
    stub = ReleaseServiceStub(plane.admin().channel)
    for number, gate_has_signed in ((2, False), (3, True)):
        plane.release(number, state=ReleaseState.PACKED, content=b"next")
        signer = keys.load(plane.cloud.settings.paths.keys, "distiller")
        with plane.registry.transaction() as session:
            proposal = publish.propose(session, signer)
            assert proposal
            if gate_has_signed:
                publish.approve(session, keys.load(plane.cloud.settings.paths.keys, "gate"), proposal)
        name = f"students/faq/releases/{number}"
        await stub.RevokeRelease(pb.RevokeReleaseRequest(name=name, reason="wrong corpus"))
        if not gate_has_signed:
            with plane.registry.reading() as session, pytest.raises(EbbflowError) as caught:
                publish.open_proposal(session)
            assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED
            with plane.registry.transaction() as session:
                publish.reject(session, str(caught.value))
        else:
            with plane.registry.transaction() as session, pytest.raises(EbbflowError):
                publish.publish(session, plane.cloud.online_signer, now())
            with plane.registry.transaction() as session:
                assert publish.propose(session, signer) is None  # withdraws it
                assert repository.newest(session, "student", published=False) is None
        assert state(plane, number) is ReleaseState.REVOKED
        assert signed_list(plane)[0] == {1}


async def test_a_revocation_does_not_wait_for_an_evaluation(plane: Plane) -> None:
    plane.student()
    publish_all(plane, 1, 2)
    plane.release(3, state=ReleaseState.PACKED)
    signer = keys.load(plane.cloud.settings.paths.keys, "distiller")
    with plane.registry.transaction() as session:
        waiting = publish.propose(session, signer)
        assert waiting
        assert waiting.change.number == 3
    stub = ReleaseServiceStub(plane.admin().channel)
    await stub.RevokeRelease(pb.RevokeReleaseRequest(name="students/faq/releases/2", reason="no"))
    with plane.registry.transaction() as session:
        urgent = publish.propose(session, signer)
        assert urgent
        assert urgent.change.number is None
        assert urgent.change.removed == frozenset({("faq", 2)})
        with pytest.raises(EbbflowError) as caught:
            publish.approve(session, keys.load(plane.cloud.settings.paths.keys, "gate"), waiting)
        assert caught.value.reason is Reason.METADATA_STALE
        publish.approve(session, keys.load(plane.cloud.settings.paths.keys, "gate"), urgent)
        assert publish.publish(session, plane.cloud.online_signer, now())
    go_round(plane)
    assert signed_list(plane) == ({1, 3}, {"faq": 1})


async def test_raising_min_release_forbids_and_drops_what_lies_below(plane: Plane) -> None:
    plane.student()
    publish_all(plane, 1, 2, 3)
    stub = ReleaseServiceStub(plane.admin().channel)
    request = pb.RaiseMinReleaseRequest(name="students/faq/releases/2")
    assert (await stub.RaiseMinRelease(request)).name == request.name
    assert state(plane, 1) is ReleaseState.RETIRED
    go_round(plane)
    assert signed_list(plane) == ({2, 3}, {"faq": 2})
    lower = pb.RaiseMinReleaseRequest(name="students/faq/releases/1")
    assert (await stub.RaiseMinRelease(lower)).name == request.name
    assert signed_list(plane)[1] == {"faq": 2}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("students/faq/releases/9", Reason.RELEASE_NOT_FOUND),
        ("students/faq/releases/2", Reason.RELEASE_NOT_PUBLISHED),
        ("students/faq/releases/3", Reason.RELEASE_REVOKED),
        ("faq", Reason.INVALID_REQUEST),
    ],
)
async def test_min_release_rises_to_published_releases_only(plane: Plane, name: str, reason: Reason) -> None:
    plane.student()
    publish_all(plane, 1)
    plane.release(2, state=ReleaseState.PACKED)
    plane.release(3, state=ReleaseState.REVOKED)
    with pytest.raises(EbbflowError) as caught:
        await ReleaseServiceStub(plane.admin().channel).RaiseMinRelease(pb.RaiseMinReleaseRequest(name=name))
    assert caught.value.reason is reason


async def test_a_revocation_says_why(plane: Plane) -> None:
    plane.student()
    publish_all(plane, 1)
    stub = ReleaseServiceStub(plane.admin().channel)
    with pytest.raises(EbbflowError) as caught:
        await stub.RevokeRelease(pb.RevokeReleaseRequest(name="students/faq/releases/1", reason=" "))
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_what_nobody_uses_is_retired_beyond_what_the_policy_keeps(plane: Plane) -> None:
    plane.student()
    plane.agent("serves-1")
    plane.agent("pinned-to-2")
    publish_all(plane, 1, 2, 3, 4, 5, 6)
    with plane.registry.transaction() as session:
        session.get_one(Student, "faq").rollout_policy = {"keptReleases": 2}
        session.add(Assignment(agent_id="serves-1", student_id="faq", serving_number=1, desired_number=6))
        session.add(
            Pin(
                agent_id="pinned-to-2",
                student_id="faq",
                release_number=2,
                reason="",
                create_time=dt.datetime.now(dt.UTC),
            )
        )
    with plane.registry.transaction() as session:
        assert withdraw.retire(session) == 2
    with plane.registry.transaction() as session:
        assert withdraw.retire(session) == 0
    go_round(plane)
    assert signed_list(plane) == ({1, 2, 5, 6}, {"faq": 1})
    assert [state(plane, number) for number in (3, 4)] == [ReleaseState.RETIRED] * 2
    with plane.registry.transaction() as session:
        session.get_one(Student, "faq").rollout_policy = {}
        assert withdraw.retire(session) == 0
