"""A cloud that serves artefacts over TLS and can misbehave, and devices that install from it. For tests of delivery."""

import datetime as dt
import io
import math
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from delivery_device import VOCABULARY, Device, start_device
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from ebbflow.api.v1 import artefact_pb2, artefact_pb2_grpc
from ebbflow.client.endpoint import Endpoint
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Release, ReleaseState, Student
from ebbflow.cloud.release import keys, publish, repository
from ebbflow.common.codes import delta
from ebbflow.common.errors import EbbflowError
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr
from ebbflow.common.rpc.errors import to_status
from ebbflow.common.rpc.options import ServerOptions
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of, variant_path
from ebbflow.edge.delivery.clock import TrustClock

PROBE = Probe(((1, 2, 3, 4, 5), (6, 7, 8)), 0.01)


def weights_of(number: int, padding_bytes: int, logit: float = 0.0) -> bytes:
    """A bigram model whose loss on any sequence is log(VOCABULARY), in a file as long as wanted."""
    noise = np.random.default_rng(number).integers(0, 256, padding_bytes, dtype=np.uint8)
    file = io.BytesIO()
    table_VV = np.full((VOCABULARY, VOCABULARY), logit, np.float32)
    np.savez(file, table=table_VV, number=np.int64(number), noise=noise)
    return file.getvalue()


@dataclass
class Faults:
    """How the server misbehaves, and what it saw."""

    cuts: list[int] = field(default_factory=list)
    """Breaks each of the next blob calls after so many bytes."""
    stall_after: int | None = None
    """Falls silent in every blob call after so many bytes."""
    answer: Callable[[str, Iterator[bytes]], Iterator[bytes]] | None = None
    """Replaces the chunks of a blob."""
    metadata: dict[str, bytes] = field(default_factory=dict)
    """Replaces metadata files."""
    refuse: EbbflowError | None = None
    """Raised by every call."""
    no_deltas: EbbflowError | None = None
    """Raised by FindDeltas."""
    deltas: Callable[[list[artefact_pb2.Delta]], list[artefact_pb2.Delta]] = lambda deltas: deltas
    """Replaces what FindDeltas answers."""
    questions: list[list[str]] = field(default_factory=list)
    """Bases of each question for deltas."""
    piece_bytes: int = 1 << 12
    """Longest message with bytes of a blob."""
    blob_bytes: int = 0
    offsets: list[int] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


class Artefacts(artefact_pb2_grpc.ArtefactServiceServicer):
    """ArtefactService over a registry and a blob store."""

    def __init__(self, world: "World") -> None:
        self.world = world

    def ReadMetadata(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        faults = self.world.faults
        try:
            if faults.refuse:
                raise faults.refuse
            data = faults.metadata.get(request.file_name)
            if data is None:
                with self.world.registry.reading() as session:
                    data = repository.read_metadata(session, request.file_name)
        except EbbflowError as error:
            context.abort_with_status(to_status(error))
            return
        for begin in range(0, len(data), 1 << 16):
            yield artefact_pb2.ReadMetadataResponse(chunk=data[begin : begin + (1 << 16)])

    def ReadBlob(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        faults = self.world.faults
        faults.offsets.append(request.offset_bytes)
        cut, sent = faults.cuts.pop(0) if faults.cuts else None, 0
        try:
            chunks = self.world.blobs.open(request.sha256.hex(), request.offset_bytes)
        except EbbflowError as error:
            context.abort_with_status(to_status(error))
            return
        for chunk in faults.answer(request.sha256.hex(), chunks) if faults.answer else chunks:
            longest = min(request.max_chunk_bytes or 1 << 20, faults.piece_bytes)
            for begin in range(0, len(chunk), longest):
                if cut is not None and sent >= cut:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                if faults.stall_after is not None and sent >= faults.stall_after:
                    faults.released.wait(20)
                    return
                piece = chunk[begin : begin + longest]
                sent += len(piece)
                faults.blob_bytes += len(piece)
                yield artefact_pb2.ReadBlobResponse(chunk=piece)

    def FindDeltas(self, request: Any, context: Any) -> Any:  # noqa: N802
        faults = self.world.faults
        faults.questions.append([base.hex() for base in request.base_sha256])
        if faults.no_deltas:
            context.abort_with_status(to_status(faults.no_deltas))
        found = [self.world.delta(base.hex(), request.target_sha256.hex()) for base in request.base_sha256]
        deltas = sorted((delta for delta in found if delta), key=lambda delta: delta.size_bytes)
        return artefact_pb2.FindDeltasResponse(deltas=faults.deltas(deltas))

    def WriteBlob(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "devices do not write")


class World:
    """A cloud with all of its keys."""

    def __init__(self, folder: Path, registry: Registry, blobs: LocalBlobStore) -> None:
        self.folder, self.registry, self.blobs = folder, registry, blobs
        self.now = dt.datetime.now(dt.UTC)
        keys.create(folder / "keys")
        self.signers: dict[str, CryptoSigner] = {name: keys.load(folder / "keys", name) for name in keys.NAMES}
        self.authority = Authority.create(folder / "authority")
        self.faults = Faults()
        self.devices: list[Device] = []
        with registry.transaction() as session:
            repository.initialise(session, folder / "keys", self.now)
            self.root = repository.trust_root(session)
        self.port = 0
        self._server = self._serve(0)

    def close(self) -> None:
        for device in self.devices:
            device.channel.close()
        self.stop()

    def stop(self) -> None:
        self.faults.released.set()
        self._server.stop(0).wait(60)

    def restart(self) -> None:
        """Starts the server again on the port that it had."""
        self._server = self._serve(self.port)

    def device(self, name: str = "device", silence_s: float = 30.0, clock: TrustClock | None = None) -> Device:
        """Starts (again) the device of that name."""
        device = start_device(self.folder / name, self.endpoint(), self.root, silence_s, clock)
        self.devices.append(device)
        return device

    def endpoint(self) -> Endpoint:
        """How a device with a certificate reaches the server."""
        key = generate_key()
        issued = self.authority.issue_agent(make_csr(key), "kiosk-1")
        address = f"localhost:{self.port}"
        return Endpoint(address, self.authority.certificate_pem, issued.certificate_pem, key_to_pem(key))

    def pack(
        self,
        number: int,
        student_id: str = "faq",
        *,
        padding_bytes: int = 300_000,
        change: Callable[[dict[str, bytes]], None] = lambda files: None,
        weights: bytes = b"",
        manifest: Callable[[int], Manifest] | None = None,
    ) -> None:
        """Makes a release as a worker would; `change` may spoil its files, by kind."""
        weights = weights or weights_of(number, padding_bytes)
        made = manifest(len(weights)) if manifest else a_manifest(number, student_id, len(weights))
        files = {"int8": weights, "tokenizer": b'{"tokenizer": 1}', "manifest": made.to_json()}
        change(files)
        targets = {}
        for kind, data in files.items():
            blob = self.blobs.put([data])
            entry = {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "kind": kind}
            targets[path_of(student_id, number, kind)] = entry
        self._insert(student_id, number, targets)

    def publish(self, number: int, student_id: str = "faq", **options: Any) -> None:
        """Packs, signs and publishes a release."""
        self.pack(number, student_id, **options)
        with self.registry.transaction() as session:
            proposal = publish.propose(session, self.signers["distiller"], self.now)
            assert proposal
            publish.approve(session, self.signers["gate"], proposal, now=self.now)
            assert publish.publish(session, self.signers["online"], self.now)

    def delta(self, base: str, target: str) -> artefact_pb2.Delta | None:
        """Builds the delta between two blobs; None if there is none."""
        paths = [self.folder / f"{sha256}.blob" for sha256 in (base, target)]
        for path, sha256 in zip(paths, (base, target), strict=True):
            path.write_bytes(b"".join(self.blobs.open(sha256, 0)))
        try:
            delta.encode(paths[0], paths[1], out := self.folder / "delta")
        except EbbflowError:
            return None
        blob = self.blobs.put([out.read_bytes()])
        return artefact_pb2.Delta(
            base_sha256=bytes.fromhex(base),
            sha256=bytes.fromhex(blob.sha256),
            size_bytes=blob.size_bytes,
            format=delta.FORMAT,
        )

    def file(self, name: str) -> bytes:
        """A metadata file as it is served now."""
        with self.registry.reading() as session:
            return repository.read_metadata(session, name)

    def forge(self, student: Targets, *names: str) -> None:
        """Serves another list of releases, signed by these keys, as a server could that has the online key."""
        snapshot = Metadata[Snapshot].from_bytes(self.file(f"{self._version('snapshot')}.snapshot.json")).signed
        timestamp = Metadata[Timestamp].from_bytes(self.file("timestamp.json")).signed
        content = repository.signed(student, *(self.signers[name] for name in names))
        snapshot.version += 1
        snapshot.meta["student.json"] = MetaFile.from_data(student.version, content, ["sha256"])
        signed = repository.signed(snapshot, self.signers["online"])
        timestamp.version += 1
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, signed, ["sha256"])
        self.faults.metadata |= {
            f"{student.version}.student.json": content,
            f"{snapshot.version}.snapshot.json": signed,
            "timestamp.json": repository.signed(timestamp, self.signers["online"]),
        }

    def student(self) -> Targets:
        """The published list of releases."""
        with self.registry.reading() as session:
            return repository.verified_student(session)

    def _version(self, role: str) -> int:
        with self.registry.reading() as session:
            row = repository.newest(session, role)
            assert row
            return row.version

    def _serve(self, port: int) -> grpc.Server:
        key_pem, chain_pem = self.authority.issue_server(["localhost"])
        credentials = grpc.ssl_server_credentials(
            [(key_pem, chain_pem)], root_certificates=self.authority.certificate_pem, require_client_auth=True
        )
        server = grpc.server(futures.ThreadPoolExecutor(8), options=ServerOptions().pairs())
        artefact_pb2_grpc.add_ArtefactServiceServicer_to_server(Artefacts(self), server)
        self.port = server.add_secure_port(f"localhost:{port}", credentials)
        server.start()
        return server

    def _insert(self, student_id: str, number: int, targets: dict[str, Any]) -> None:
        with self.registry.transaction() as session:
            if session.get(Student, student_id) is None:
                session.add(
                    Student(
                        id=student_id,
                        teacher="",
                        architecture={},
                        corpus_sha256="0" * 64,
                        topics=[],
                        privacy_policy={},
                        selector="",
                        create_time=self.now,
                    )
                )
                session.flush()
            session.add(
                Distillation(
                    id=f"{student_id}-{number}",
                    student_id=student_id,
                    state=DistillationState.SUCCEEDED,
                    recipe={},
                    mixture={},
                    base_release=None,
                    round_id=None,
                    create_time=self.now,
                    update_time=self.now,
                )
            )
            session.flush()
            session.add(
                Release(
                    student_id=student_id,
                    number=number,
                    distillation_id=f"{student_id}-{number}",
                    state=ReleaseState.PACKED,
                    targets=targets,
                    create_time=self.now,
                )
            )


def a_manifest(number: int, student_id: str, size_bytes: int, probe_loss: float = math.log(VOCABULARY)) -> Manifest:
    """The manifest of a bigram release."""
    variant = ManifestVariant(variant_path(student_id, number, "int8"), size_bytes, probe_loss)
    return Manifest(student_id, number, {"vocab_size": VOCABULARY}, {"int8": variant}, PROBE)
