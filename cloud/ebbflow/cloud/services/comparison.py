"""What changed between two releases of a student, and what it costs to move."""

import asyncio
from collections.abc import Mapping
from typing import Any

from ebbflow.api.v1 import release_pb2 as pb
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.registry.tables import Json, Release
from ebbflow.cloud.release import neighbours
from ebbflow.cloud.release.deltas import Found
from ebbflow.cloud.services import deltas
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert.common import from_json
from ebbflow.cloud.services.convert.releases import PRECISIONS
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.manifest import Manifest

MOST_VALUE = 80
"""Characters of a setting that are shown."""


async def compare(cloud: Cloud, base: Release, target: Release, limit_s: float) -> pb.CompareReleasesResponse:
    """Compares two releases; builds the deltas between them unless they are there.

    Raises:
        EbbflowError: DEADLINE_EXCEEDED if they are not built within `limit_s`: they go on, so asking again helps.
            BLOB_NOT_FOUND or FILE_CORRUPT if a file of a release is no longer there or damaged.
    """
    pairs = neighbours.pairs_between(base, target)
    changed = {kind: pair for kind, pair in pairs.items() if pair.base_sha256 != pair.target_sha256}
    futures = await deltas.wait_for(cloud, list(changed.values()), limit_s)
    found = dict(zip(changed, map(_result, futures), strict=True))
    configuration = await cloud.in_thread(cloud.files, lambda: _configuration(cloud.blobs, base, target))
    return pb.CompareReleasesResponse(
        variants=[_variant(kind, target, found.get(kind)) for kind in PRECISIONS if kind in pairs],
        tensors=_tensors(found["int8"].statistics) if "int8" in found else [],
        tokenizer_changed=_sha256(base, "tokenizer") != _sha256(target, "tokenizer"),
        configuration=configuration,
        base_card=from_json(base.card, pb.EvaluationCard),
        target_card=from_json(target.card, pb.EvaluationCard),
    )


def _result(future: "asyncio.Future[Found]") -> Found:
    if not future.done():
        message = "the differences are still being computed; ask again in a moment"
        raise EbbflowError(Reason.DEADLINE_EXCEEDED, message)
    return future.result()


def _variant(kind: str, target: Release, found: Found | None) -> pb.VariantChange:
    """What it costs to move; None means that both releases have the same file."""
    size_bytes = next(int(file["size_bytes"]) for file in target.targets.values() if file["kind"] == kind)
    return pb.VariantChange(
        precision=PRECISIONS[kind],
        full_bytes=size_bytes,
        delta_bytes=found.size_bytes if found and found.sha256 else 0,
        # Files without a delta have nothing in common.
        changed_share=found.statistics.get("changed_share", 1.0) if found else 0.0,
    )


def _tensors(statistics: Json) -> list[pb.TensorChange]:
    tensors: Mapping[str, Json] = statistics.get("tensors", {})
    changes = [
        pb.TensorChange(
            tensor=name,
            changed_share=tensor["changed_share"],
            rescaled_share=tensor["rescaled_share"],
            rms_steps=tensor["rms_steps"],
        )
        for name, tensor in tensors.items()
    ]
    return sorted(changes, key=lambda change: (-change.rms_steps, -change.changed_share, change.tensor))


def _configuration(blobs: BlobStore, base: Release, target: Release) -> list[str]:
    old, new = (_settings(Manifest.from_json(blobs.read(_sha256(row, "manifest")))) for row in (base, target))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in keys]


def _settings(manifest: Manifest) -> dict[str, Any]:
    """The student's configuration, and which of its matrices no precision codes."""
    return {**manifest.config, **({"kept_bf16": ", ".join(manifest.kept_bf16)} if manifest.kept_bf16 else {})}


def _shown(config: Mapping[str, Any], key: str) -> str:
    return str(config[key])[:MOST_VALUE] if key in config else "not set"


def _sha256(release: Release, kind: str) -> str:
    return next(str(file["sha256"]) for file in release.targets.values() if file["kind"] == kind)
