"""The manifest: what a release is, as one small file of canonical JSON that the signed metadata lists.

Canonical means: ASCII with escapes, keys sorted, no blanks, floats in their shortest form. One manifest has exactly one
encoding, so that whoever packs a release twice gets the same hash twice.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.roles import PRECISIONS
from ebbflow.common.trust.targets import variant_path

FORMAT = 1
MAX_BYTES = 1 << 20
"""Longest manifest that is read."""
MAX_PROBE_TOKENS = 1 << 16
"""Most tokens in all probe sequences together."""
_MAX_TOKEN_ID = 1 << 31
_MAX_SIZE_BYTES = 1 << 48
_KEPT = "kept_bf16"


@dataclass(frozen=True)
class ManifestVariant:
    """One precision of the release."""

    target: str
    """Target path of the weights."""
    size_bytes: int
    probe_loss: float
    """Loss on the probe in nats per predicted token, as measured when the release was packed."""


@dataclass(frozen=True)
class Probe:
    """Token sequences whose loss a device measures before it commits to a release."""

    token_ids: tuple[tuple[int, ...], ...]
    tolerance: float
    """Largest difference from the signed loss that passes, in nats per token."""

    def mean(self, losses: Sequence[float]) -> float:
        """Joins the losses of the sequences (nats per token, in order) into one: the mean over predicted tokens."""
        weights = [len(sequence) - 1 for sequence in self.token_ids]
        return math.fsum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


@dataclass(frozen=True)
class Manifest:
    """What a release is."""

    student: str
    """Student id, such as "faq"."""
    release: int
    """Number of the release."""
    config: Mapping[str, Any]
    """The student's configuration in Hugging Face form."""
    variants: Mapping[str, ManifestVariant]
    """By precision."""
    probe: Probe
    kept_bf16: tuple[str, ...] = ()
    """Matrices that every precision keeps in bfloat16, by their names, sorted; the weights say the same."""

    def to_json(self) -> bytes:
        """Encodes the manifest.

        Raises:
            EbbflowError: FILE_CORRUPT if the manifest breaks one of the rules that `from_json` checks.
        """
        fields: dict[str, Any] = {
            "format": FORMAT,
            "student": self.student,
            "release": self.release,
            "config": dict(self.config),
            "variants": {precision: vars(variant) for precision, variant in self.variants.items()},
            "probe": {"token_ids": [list(s) for s in self.probe.token_ids], "tolerance": self.probe.tolerance},
        }
        if self.kept_bf16:
            fields[_KEPT] = list(self.kept_bf16)
        try:
            data = _canonical(fields)
        except (TypeError, ValueError, RecursionError) as error:
            raise EbbflowError(Reason.FILE_CORRUPT, "the manifest holds values that JSON has no form for") from error
        Manifest.from_json(data)
        return data

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Decodes a manifest and checks every rule.

        Raises:
            EbbflowError: FILE_CORRUPT if it is too long, not canonical, of another format, or breaks a rule.
        """
        _require(len(data) <= MAX_BYTES, f"is longer than {MAX_BYTES} bytes")
        fields = _decode(data)
        _require(fields.get("format") == FORMAT, f"is not of format {FORMAT}")
        optional = {_KEPT} & fields.keys()
        _keys(fields, {"format", "student", "release", "config", "variants", "probe"} | optional, "the manifest")
        student, release = fields["student"], fields["release"]
        _require(isinstance(student, str), "names no student")
        _require(_is_int(release, 1, 10**10), "has no release number")
        _require(isinstance(fields["config"], dict), "has no configuration")
        variants = _variants(fields["variants"], student, release)
        return cls(student, release, fields["config"], variants, _probe(fields), _kept(fields) if optional else ())


def _variants(value: Any, student: str, release: int) -> dict[str, ManifestVariant]:
    _require(isinstance(value, dict) and len(value) > 0 and set(value) <= set(PRECISIONS), "has no known variants")
    return {precision: _variant(entry, student, release, precision) for precision, entry in value.items()}


def _variant(entry: Any, student: str, release: int, precision: str) -> ManifestVariant:
    _keys(entry, {"target", "size_bytes", "probe_loss"}, f"variant {precision}")
    try:
        path = variant_path(student, release, precision)
    except EbbflowError:
        path = ""
    _require(path != "" and entry["target"] == path, f"lists another release's file as {precision}")
    _require(_is_int(entry["size_bytes"], 1, _MAX_SIZE_BYTES), f"has no size of {precision}")
    _require(_is_float(entry["probe_loss"]) and entry["probe_loss"] >= 0, f"has no probe loss of {precision}")
    return ManifestVariant(entry["target"], entry["size_bytes"], entry["probe_loss"])


def _probe(fields: dict[str, Any]) -> Probe:
    probe = fields["probe"]
    _keys(probe, {"token_ids", "tolerance"}, "the probe")
    sequences = probe["token_ids"]
    _require(isinstance(sequences, list) and len(sequences) > 0, "has no probe sequences")
    _require(all(isinstance(s, list) and len(s) >= 2 for s in sequences), "has a probe sequence below two tokens")  # noqa: PLR2004
    _require(sum(map(len, sequences)) <= MAX_PROBE_TOKENS, f"has more than {MAX_PROBE_TOKENS} probe tokens")
    _require(all(_is_int(t, 0, _MAX_TOKEN_ID) for s in sequences for t in s), "has a probe token that is no token id")
    _require(_is_float(probe["tolerance"]) and probe["tolerance"] > 0, "has no probe tolerance")
    return Probe(tuple(tuple(sequence) for sequence in sequences), probe["tolerance"])


def _kept(fields: dict[str, Any]) -> tuple[str, ...]:
    names = fields[_KEPT]
    _require(isinstance(names, list) and all(isinstance(name, str) for name in names), "names no kept matrices")
    _require(len(names) > 0 and names == sorted(set(names)), "names kept matrices twice, unsorted or not at all")
    return tuple(names)


def _decode(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
        canonical = _canonical(fields) == data
    except (ValueError, RecursionError) as error:
        raise EbbflowError(Reason.FILE_CORRUPT, "the manifest is not JSON") from error
    _require(canonical, "is not in canonical form")
    _require(isinstance(fields, dict), "is no object")
    return dict(fields)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _keys(value: Any, keys: set[str], what: str) -> None:
    _require(isinstance(value, dict) and set(value) == keys, f"has other fields in {what} than it should")


def _is_int(value: Any, low: int, below: int) -> bool:
    return type(value) is int and low <= value < below


def _is_float(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise EbbflowError(Reason.FILE_CORRUPT, f"the manifest {problem}")
