"""What one new version of the list of releases may change. Decisions without IO.

The distiller writes a version with `add_release` or `renew`; gate and server look at it with `check`, which trusts
nothing that the distiller says about it.
"""

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tuf.api.metadata import TargetFile, Targets

from ebbflow.cloud.release.repository import LIFETIMES
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.targets import TargetPath, parse_path

_SHA256 = re.compile(r"[0-9a-f]{64}")

CLOCK_SKEW = dt.timedelta(hours=1)
"""How far the clocks of distiller and gate may differ."""


@dataclass(frozen=True)
class ReleaseFile:
    """One file of the release that a proposal adds."""

    path: str
    sha256: str
    """Lower-case hexadecimal."""
    size_bytes: int


@dataclass(frozen=True)
class Change:
    """What a proposal changes. Without a student it only moves the expiry."""

    student_id: str | None
    number: int | None
    files: Mapping[str, ReleaseFile]
    """By kind: "manifest", "tokenizer" and the precisions."""


def add_release(
    base: Targets, student_id: str, number: int, files: Mapping[str, Mapping[str, Any]], now: dt.datetime
) -> Targets:
    """Returns the next version, with one more release.

    Args:
        base: the published version.
        student_id: the release's student.
        number: the release's number.
        files: column `targets` of the release.
        now: the time.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if that would break a rule of `check`.
    """
    added = {}
    for path, file in files.items():
        custom = roles.custom(student_id, number, file["kind"])
        added[path] = TargetFile(file["size_bytes"], {"sha256": file["sha256"]}, path, {"custom": custom})
    min_release = dict(min_releases(base))
    min_release.setdefault(student_id, number)
    proposed = _next(base, {**base.targets, **added}, min_release, now)
    check(base, proposed, now)
    return proposed


def renew(base: Targets, now: dt.datetime) -> Targets:
    """Returns the next version, which differs in its expiry only."""
    return _next(base, dict(base.targets), dict(min_releases(base)), now)


def check(base: Targets, proposed: Targets, now: dt.datetime) -> Change:
    """Returns what `proposed` changes, if it is allowed to.

    Allowed is: nothing but a later expiry, or exactly one new release with manifest, tokenizer and at least one
    precision, whose student's `min_release` stays what it was, or begins at this release.

    Raises:
        EbbflowError: METADATA_STALE if it does not follow `base` or has expired; ARTEFACT_UNTRUSTED if it changes more.
    """
    if proposed.version != base.version + 1:
        message = f"version {proposed.version} of the releases does not follow {base.version}"
        raise EbbflowError(Reason.METADATA_STALE, message)
    if proposed.expires <= now:
        raise EbbflowError(Reason.METADATA_STALE, f"version {proposed.version} of the releases waited too long")
    if proposed.expires > now + LIFETIMES[roles.STUDENT] + CLOCK_SKEW:
        _refuse("would hold for longer than a signature may")
    if proposed.delegations is not None or set(proposed.unrecognized_fields) != {roles.MIN_RELEASE}:
        _refuse("carries more than releases")
    if any(proposed.targets.get(path) != file for path, file in base.targets.items()):
        _refuse("changes a release that was already published")
    change = _added(base, proposed)
    allowed = dict(min_releases(base))
    if change.student_id is not None:
        allowed.setdefault(change.student_id, change.number or 0)
    if min_releases(proposed) != allowed:
        _refuse("changes min_release")
    return change


def min_releases(student: Targets) -> dict[str, int]:
    """The lowest release that a device may install, by student id.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the field is not of that form.
    """
    value = student.unrecognized_fields.get(roles.MIN_RELEASE)
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        _refuse("has no min_release")
    return dict(value)


def _next(base: Targets, targets: dict[str, TargetFile], min_release: dict[str, int], now: dt.datetime) -> Targets:
    return Targets(
        version=base.version + 1,
        expires=now + LIFETIMES[roles.STUDENT],
        targets=targets,
        unrecognized_fields={roles.MIN_RELEASE: min_release},
    )


def _added(base: Targets, proposed: Targets) -> Change:
    files = {}
    releases = set()
    for path, file in proposed.targets.items():
        if path in base.targets:
            continue
        parsed = _parsed(path, file)
        releases.add((parsed.student_id, parsed.number))
        files[parsed.kind] = ReleaseFile(path, file.hashes["sha256"], file.length)
    if not releases:
        return Change(None, None, {})
    student_id, number = releases.pop()
    if releases:
        _refuse("adds more than one release")
    if any(path.startswith(f"student/{student_id}/{number}.") for path in base.targets):
        _refuse("adds files to a release that was already published")
    if not {"manifest", "tokenizer"} < set(files):
        _refuse("adds a release without manifest, tokenizer or weights")
    return Change(student_id, number, files)


def _parsed(path: str, file: TargetFile) -> TargetPath:
    try:
        parsed = parse_path(path)
    except EbbflowError:
        _refuse("lists a file that belongs to no release")
    if file.unrecognized_fields != {"custom": roles.custom(parsed.student_id, parsed.number, parsed.kind)}:
        _refuse("describes a file otherwise than its path does")
    if set(file.hashes) != {"sha256"} or not _SHA256.fullmatch(file.hashes["sha256"]):
        _refuse("names a file by another hash than SHA-256")
    return parsed


def _refuse(problem: str) -> NoReturn:
    raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the proposed list of releases {problem}")
