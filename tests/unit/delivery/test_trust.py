"""The device's view of the signed metadata."""

import datetime as dt
import os

import pytest
from delivery_world import World

from ebbflow.cloud.release import publish, repository
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.delivery.clock import TrustClock


def test_keys_of_plans_come_from_the_signed_targets(world: World) -> None:
    trust = world.device().trust
    trust.refresh()
    found = trust.feedback_keys()
    expected = world.signers["feedback"].public_key
    assert found == {expected.keyid: expected}


def test_what_was_verified_is_there_after_a_restart_without_the_network(world: World) -> None:
    world.publish(3)
    world.device().trust.refresh()
    world.stop()
    trust = world.device().trust
    assert trust.min_release("faq") == 3
    assert trust.min_release("unheard-of") == 1
    assert trust.feedback_keys()


def test_before_the_first_refresh_nothing_is_known(world: World) -> None:
    trust = world.device().trust
    for ask in (trust.feedback_keys, lambda: trust.min_release("faq")):
        with pytest.raises(EbbflowError) as caught:
            ask()
        assert caught.value.reason is Reason.METADATA_NOT_FOUND
    with pytest.raises(EbbflowError) as caught:
        trust.target("student/faq/1.int8.safetensors")
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json", "student.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_torn_cache_heals(world: World, name: str, keep: float) -> None:
    world.publish(1)
    device = world.device()
    device.trust.refresh()
    path = device.folder / "trust" / name
    os.truncate(path, int(keep * path.stat().st_size))
    if name in {"targets.json", "student.json"}:
        with pytest.raises(EbbflowError) as caught:
            device.trust.min_release("faq")
        assert caught.value.reason is Reason.METADATA_NOT_FOUND
    device.trust.refresh()
    assert device.trust.min_release("faq") == 1
    assert device.trust.target("student/faq/1.int8.safetensors").length > 0


def test_a_swapped_cache_is_not_believed(world: World) -> None:
    world.publish(2)
    device = world.device()
    device.trust.refresh()
    path = device.folder / "trust" / "student.json"
    path.write_bytes(path.read_bytes().replace(b'"min_release":{"faq":2}', b'"min_release":{"faq":1}'))
    with pytest.raises(EbbflowError) as caught:
        device.trust.min_release("faq")
    assert caught.value.reason is Reason.METADATA_NOT_FOUND


def test_a_refresh_that_finds_nothing_new_reads_one_file(world: World) -> None:
    world.publish(1)
    world.device().trust.refresh()
    asked: list[str] = []

    class Counting(dict[str, bytes]):
        def get(self, key: str, default: object = None) -> None:  # type: ignore[override]
            asked.append(key)

    world.faults.metadata = Counting()
    world.device().trust.refresh()
    assert asked == ["2.root.json", "timestamp.json"]


def test_a_refresh_that_fails_leaves_what_the_one_before_has_verified(world: World) -> None:
    world.publish(1)
    trust = world.device().trust
    trust.refresh()
    world.stop()
    with pytest.raises(EbbflowError):
        trust.refresh()
    assert trust.target("student/faq/1.int8.safetensors").length > 0


def test_metadata_that_is_signed_anew_in_time_never_expires(world: World) -> None:
    world.publish(1)
    now = world.now
    for _ in range(8):
        now += dt.timedelta(days=4)
        for hours in (0, 1):
            with world.registry.transaction() as session:
                proposal = publish.propose(session, world.signers["distiller"], now)
                if proposal:
                    publish.approve(session, world.signers["gate"], proposal, now=now)
                publish.publish(session, world.signers["online"], now)
                publish.refresh_online(session, world.signers["online"], now + hours * dt.timedelta(hours=1))
        clock = TrustClock(world.folder / "clock", system=lambda now=now: now)  # type: ignore[misc]
        world.device(clock=clock).trust.refresh()
    assert world.device().trust.min_release("faq") == 1
    with world.registry.reading() as session:
        assert repository.verified_student(session).version > 4
