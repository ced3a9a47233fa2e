"""Releases and their files."""

from collections.abc import Mapping
from typing import Any

from ebbflow.api.v1 import release_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.cloud.registry.tables import Release, ReleaseState
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names

STATES = {
    ReleaseState.PACKED: pb.Release.STATE_PACKED,
    ReleaseState.PROPOSED: pb.Release.STATE_PROPOSED,
    ReleaseState.PUBLISHED: pb.Release.STATE_PUBLISHED,
    ReleaseState.REJECTED: pb.Release.STATE_REJECTED,
    ReleaseState.REVOKED: pb.Release.STATE_REVOKED,
    ReleaseState.RETIRED: pb.Release.STATE_RETIRED,
}
PRECISIONS = {
    "bf16": resources_pb2.PRECISION_BF16,
    "int8": resources_pb2.PRECISION_INT8,
    "int4": resources_pb2.PRECISION_INT4,
}
"""Kinds of targets that are weights, in the order in which variants are told."""
KINDS = {precision: kind for kind, precision in PRECISIONS.items()}


def release(row: Release) -> pb.Release:
    """A release."""
    artefacts = {file["kind"]: _artefact(path, file) for path, file in row.targets.items()}
    return pb.Release(
        name=names.release(row.student_id, row.number),
        state=STATES[row.state],
        distillation=names.make("distillations", row.distillation_id),
        variants=[
            resources_pb2.Variant(precision=precision, artefact=artefacts[kind])
            for kind, precision in PRECISIONS.items()
            if kind in artefacts
        ],
        manifest=artefacts.get("manifest"),
        card=from_json(row.card, pb.EvaluationCard) if row.card else None,
        reason=row.reason,
        create_time=timestamp(row.create_time),
    )


def variants(targets: Mapping[str, Any]) -> dict["resources_pb2.Precision.ValueType", int]:
    """Size in bytes of each precision in column `targets`."""
    sizes = {file["kind"]: int(file["size_bytes"]) for file in targets.values()}
    return {precision: sizes[kind] for kind, precision in PRECISIONS.items() if kind in sizes}


def _artefact(path: str, file: Mapping[str, Any]) -> resources_pb2.Artefact:
    return resources_pb2.Artefact(
        target_path=path, sha256=bytes.fromhex(file["sha256"]), size_bytes=int(file["size_bytes"])
    )
