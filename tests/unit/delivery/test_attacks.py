"""What a hostile server, or a thief of keys, can do to a device: nothing but keep it from updating."""

import datetime as dt
from collections.abc import Callable, Iterator

import pytest
from delivery_world import World
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

from ebbflow.cloud.release import repository
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.edge.delivery.clock import TrustClock
from ebbflow.edge.delivery.trust import TrustClient

WEIGHTS = "student/faq/2.int8.safetensors"


@pytest.fixture
def served(world: World) -> Iterator[World]:
    """A device serves release 1; release 2 is published. Whatever happens, 1 keeps serving and 2 never does."""
    world.publish(1)
    world.device().install(1)
    world.publish(2)
    yield world
    assert world.device().serving() == 1


def refused(world: World, number: int = 2, silence_s: float = 30.0) -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        world.device(silence_s=silence_s).install(number)
    return caught.value


def file(world: World, path: str) -> str:
    return world.student().targets[path].hashes["sha256"]


def replacing(sha256: str, change: Callable[[bytes], bytes]) -> Callable[[str, Iterator[bytes]], Iterator[bytes]]:
    """Makes the server change each chunk of one blob."""

    def answer(asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        return (change(chunk) if asked == sha256 else chunk for chunk in chunks)

    return answer


def flip(chunk: bytes) -> bytes:
    return bytes([chunk[0] ^ 1]) + chunk[1:]


@pytest.mark.parametrize("path", [WEIGHTS, "student/faq/2.manifest.json"])
def test_a_tampered_file(served: World, path: str) -> None:
    served.faults.answer = replacing(file(served, path), flip)
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


@pytest.mark.parametrize("path", [WEIGHTS, "student/faq/2.manifest.json"])
def test_endless_data(served: World, path: str) -> None:
    sha256 = file(served, path)

    def answer(asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from chunks
        while asked == sha256:
            yield b"x" * 100_000

    served.faults.answer = answer
    error = refused(served)
    assert error.reason is Reason.ARTEFACT_UNTRUSTED
    assert int(error.metadata["fetched_bytes"]) < served.student().targets[WEIGHTS].length + 300_000


def test_a_file_that_is_too_short(served: World) -> None:
    served.faults.answer = replacing(file(served, WEIGHTS), lambda chunk: chunk[: len(chunk) // 2])
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_a_file_that_is_empty(served: World) -> None:
    served.faults.answer = lambda _asked, _chunks: iter([])
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_silence(served: World) -> None:
    served.faults.stall_after = 0
    error = refused(served, silence_s=0.3)
    assert error.reason is Reason.DEADLINE_EXCEEDED
    served.faults.released.set()


def test_a_trickle_is_as_good_as_silence(served: World) -> None:
    sha256 = file(served, WEIGHTS)

    def answer(asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        if asked != sha256:
            yield from chunks
            return
        while not served.faults.released.wait(0.05):
            yield b"x"

    served.faults.answer = answer
    assert refused(served, silence_s=0.4).reason is Reason.DEADLINE_EXCEEDED
    served.faults.released.set()


@pytest.mark.parametrize("name", ["timestamp.json", "3.snapshot.json", "3.student.json"])
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff" * 100, b"x" * 6_000_000], ids=["empty", "object", "junk", "endless"]
)
def test_metadata_that_is_no_metadata(served: World, name: str, data: bytes) -> None:
    served.faults.metadata[name] = data
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


@pytest.mark.parametrize("name", ["timestamp.json", "3.snapshot.json", "3.student.json"])
def test_tampered_metadata(served: World, name: str) -> None:
    served.faults.metadata[name] = served.file(name).replace(b'"version":3', b'"version":9')
    assert served.faults.metadata[name] != served.file(name)
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_rollback_to_an_older_timestamp(served: World) -> None:
    old = served.file("timestamp.json")
    served.publish(3)
    served.device().trust.refresh()
    served.faults.metadata["timestamp.json"] = old
    assert refused(served, 3).reason is Reason.ARTEFACT_UNTRUSTED


def test_rollback_to_an_older_list_with_stolen_online_keys(served: World) -> None:
    served.device().trust.refresh()
    served.forge(Metadata[Targets].from_bytes(served.file("2.student.json")).signed, "distiller", "gate")
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_mix_and_match_of_two_states(served: World) -> None:
    served.faults.metadata["3.student.json"] = served.file("2.student.json")
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED
    served.faults.metadata = {"3.snapshot.json": served.file("2.snapshot.json")}
    with pytest.raises(EbbflowError) as caught:
        served.device("new").install(2)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED


def test_freeze_stops_installing_and_never_serving(served: World) -> None:
    device = served.device("frozen")
    device.install(1)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=2)
    device = served.device("frozen", clock=TrustClock(served.folder / "c", system=lambda: later))
    with pytest.raises(EbbflowError) as caught:
        device.install(2)
    assert caught.value.reason is Reason.METADATA_EXPIRED
    assert device.serving() == 1
    assert set(device.trust.feedback_keys()) == {served.signers["feedback"].public_key.keyid}


def test_a_device_without_a_clock_takes_the_clouds_time(served: World) -> None:
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    clock = TrustClock(served.folder / "c", system=lambda: epoch)
    clock.hear(dt.datetime.now(dt.UTC) + dt.timedelta(days=2))
    with pytest.raises(EbbflowError) as caught:
        served.device("new", clock=clock).install(2)
    assert caught.value.reason is Reason.METADATA_EXPIRED


def evil_list(world: World) -> Targets:
    """A list of releases whose weights are the attacker's, otherwise in order."""
    student = world.student()
    evil = world.blobs.put([b"evil weights"])
    custom = {"custom": roles.custom("faq", 2, "int8")}
    student.targets[WEIGHTS] = TargetFile(evil.size_bytes, {"sha256": evil.sha256}, WEIGHTS, custom)
    student.version += 1
    return student


@pytest.mark.parametrize(
    "stolen",
    [
        (),
        ("distiller",),
        ("gate",),
        ("distiller", "online"),
        ("gate", "feedback"),
        ("distiller", "root-1"),
        ("online",),
    ],
)
def test_stolen_keys_that_are_not_both_of_distiller_and_gate(served: World, stolen: tuple[str, ...]) -> None:
    served.forge(evil_list(served), *stolen)
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_an_attackers_own_keys(served: World) -> None:
    for name in ("distiller", "gate", "online"):
        served.signers[name] = CryptoSigner.generate_ed25519()
    served.forge(evil_list(served), "distiller", "gate")
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_one_signature_under_two_names(served: World) -> None:
    twice = repository.signed(evil_list(served), served.signers["distiller"])
    metadata = Metadata[Targets].from_bytes(twice)
    signature = next(iter(metadata.signatures.values()))
    gate = served.signers["gate"].public_key.keyid
    metadata.signatures[gate] = type(signature)(gate, signature.signature)
    served.forge(evil_list(served), "distiller")
    served.faults.metadata["4.student.json"] = metadata.to_bytes()
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_a_file_signed_as_another_one(served: World) -> None:
    student = served.student()
    student.targets[WEIGHTS].unrecognized_fields["custom"]["release"] = 1
    student.version += 1
    served.forge(student, "distiller", "gate")
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_a_list_that_drops_the_student_from_the_snapshot(served: World) -> None:
    snapshot = Metadata[Snapshot].from_bytes(served.file("3.snapshot.json")).signed
    del snapshot.meta["student.json"]
    served.faults.metadata["3.snapshot.json"] = repository.signed(snapshot, served.signers["online"])
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def next_root(world: World, *signers: str) -> Root:
    """Serves root 2, which replaces the online key, signed by these keys."""
    root = Metadata[Root].from_bytes(world.root).signed
    new = CryptoSigner.generate_ed25519()
    for role in (roles.SNAPSHOT, roles.TIMESTAMP):
        root.revoke_key(world.signers["online"].public_key.keyid, role)
        root.add_key(new.public_key, role)
    root.version = 2
    world.faults.metadata["2.root.json"] = repository.signed(root, *(world.signers[name] for name in signers))
    world.signers["online"] = new
    return root


def test_one_root_key_cannot_replace_the_others(served: World) -> None:
    next_root(served, "root-1")
    served.forge(served.student(), "distiller", "gate")
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED


def test_two_root_keys_shut_stolen_online_keys_out(served: World) -> None:
    next_root(served, "root-1", "root-3")
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED  # the thief still signs with the old key
    student = served.student()
    student.version += 1
    served.forge(student, "distiller", "gate")
    served.device("other").install(2)


def test_a_fast_forwarded_timestamp_is_healed_by_a_new_online_key(served: World) -> None:
    timestamp = Metadata[Timestamp].from_bytes(served.file("timestamp.json")).signed
    timestamp.version = 2**31
    served.faults.metadata["timestamp.json"] = repository.signed(timestamp, served.signers["online"])
    served.device().trust.refresh()
    del served.faults.metadata["timestamp.json"]
    assert refused(served).reason is Reason.ARTEFACT_UNTRUSTED
    next_root(served, "root-1", "root-2")
    student = served.student()
    student.version += 1
    served.forge(student, "distiller", "gate")
    served.device().trust.refresh()


def test_a_device_that_pinned_another_root_trusts_nothing(served: World) -> None:
    other = Root(expires=dt.datetime.now(dt.UTC) + dt.timedelta(days=9), consistent_snapshot=True)
    key = CryptoSigner.generate_ed25519()
    for role in (roles.ROOT, roles.TARGETS, roles.SNAPSHOT, roles.TIMESTAMP):
        other.add_key(key.public_key, role)
    device = served.device()
    trust = TrustClient(served.folder / "else", repository.signed(other, key), device.source)
    with pytest.raises(EbbflowError) as caught:
        trust.refresh()
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED
