"""What one new version of the list of releases may change. Decisions without IO.

The distiller writes a version with `add_release`, `amend` or `renew`; gate and server look at it with `check`, which
trusts nothing that the distiller says about it.
"""

import datetime as dt
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


Number = tuple[str, int]
"""A release: student id and number."""


@dataclass(frozen=True)
class Facts:
    """What the registry says that a version may follow from."""

    withdrawn: frozenset[Number] = frozenset()
    """Releases that are revoked or retired."""
    wishes: Mapping[str, int] = field(default_factory=dict)
    """Lowest release that an owner wants to allow, by student id."""


@dataclass(frozen=True)
class Change:
    """What a proposal changes. One that changes nothing only moves the expiry."""

    student_id: str | None
    """Of the new release, if there is one."""
    number: int | None
    files: Mapping[str, ReleaseFile]
    """By kind: "manifest", "tokenizer" and the precisions."""
    removed: frozenset[Number] = frozenset()
    """Releases that the list no longer holds."""
    raised: Mapping[str, int] = field(default_factory=dict)
    """The new `min_release`, by student id, where it rises."""


def add_release(
    base: Targets,
    student_id: str,
    number: int,
    files: Mapping[str, Mapping[str, Any]],
    now: dt.datetime,
    facts: Facts | None = None,
) -> Targets:
    """Returns the next version, with one more release.

    Args:
        base: the published version.
        student_id: the release's student.
        number: the release's number.
        files: column `targets` of the release.
        now: the time.
        facts: what the registry says.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if that would break a rule of `check`.
    """
    added = {}
    for path, file in files.items():
        custom = roles.custom(student_id, number, file["kind"])
        added[path] = TargetFile(file["size_bytes"], {"sha256": file["sha256"]}, path, {"custom": custom})
    lowest = {student_id: number, **min_releases(base)}
    highest = {**highest_releases(base), student_id: number}
    proposed = _next(base, {**base.targets, **added}, lowest, highest, now)
    check(base, proposed, now, facts)
    return proposed


def amend(base: Targets, facts: Facts, now: dt.datetime) -> Targets | None:
    """Returns the next version, without what is withdrawn, with the wanted `min_release`; None if it is so already."""
    kept = {path: file for path, file in base.targets.items() if _release_of(path) not in facts.withdrawn}
    lowest = min_releases(base)
    wanted = {
        student_id: number
        for student_id, number in facts.wishes.items()
        if lowest.get(student_id, number) < number <= _newest(kept, student_id)
    }
    if len(kept) == len(base.targets) and not wanted:
        return None
    return _next(base, kept, {**lowest, **wanted}, highest_releases(base), now)


def renew(base: Targets, now: dt.datetime) -> Targets:
    """Returns the next version, which differs in its expiry only."""
    return _next(base, dict(base.targets), min_releases(base), highest_releases(base), now)


def check(base: Targets, proposed: Targets, now: dt.datetime, facts: Facts | None = None) -> Change:
    """Returns what `proposed` changes, if it is allowed to.

    Allowed are, beside a later expiry: at most one new release, with manifest, tokenizer and at least one precision,
    and a number above any that its student ever had; the removal of whole releases that are withdrawn; a `min_release`
    that rises to what an owner wants and not above the student's newest remaining release, or begins at a student's
    first release.

    Raises:
        EbbflowError: METADATA_STALE if it does not follow `base` or has expired; ARTEFACT_UNTRUSTED if it changes more.
    """
    facts = facts or Facts()
    if proposed.version != base.version + 1:
        message = f"version {proposed.version} of the releases does not follow {base.version}"
        raise EbbflowError(Reason.METADATA_STALE, message)
    if proposed.expires <= now:
        raise EbbflowError(Reason.METADATA_STALE, f"version {proposed.version} of the releases waited too long")
    if proposed.expires > now + LIFETIMES[roles.STUDENT] + CLOCK_SKEW:
        _refuse("would hold for longer than a signature may")
    if proposed.delegations is not None or set(proposed.unrecognized_fields) != {roles.MIN_RELEASE, roles.HIGHEST}:
        _refuse("carries more than releases")
    if any(proposed.targets.get(path, file) != file for path, file in base.targets.items()):
        _refuse("changes a release that was already published")
    removed = _removed(base, proposed, facts)
    student_id, number, files = _added(base, proposed)
    _check_new(base, proposed, facts, student_id, number)
    return Change(student_id, number, files, removed, _raised(base, proposed, facts, student_id, number))


def min_releases(student: Targets) -> dict[str, int]:
    """The lowest release that a device may install, by student id.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the field is not of that form.
    """
    return _numbers(student, roles.MIN_RELEASE)


def highest_releases(student: Targets) -> dict[str, int]:
    """The highest release that was ever listed, by student id; lists of before that field tell by what they hold.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the field is not of that form.
    """
    found = _numbers(student, roles.HIGHEST) if roles.HIGHEST in student.unrecognized_fields else {}
    for student_id, number in map(_release_of, student.targets):
        found[student_id] = max(found.get(student_id, 0), number)
    return found


def releases_of(student: Targets) -> frozenset[Number]:
    """The releases that a list holds."""
    return frozenset(map(_release_of, student.targets))


def _numbers(student: Targets, name: str) -> dict[str, int]:
    value = student.unrecognized_fields.get(name)
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        _refuse(f"has no {name}")
    return dict(value)


def _release_of(path: str) -> Number:
    parsed = parse_path(path)
    return parsed.student_id, parsed.number


def _newest(paths: Iterable[str], student_id: str) -> int:
    return max((number for of, number in map(_release_of, paths) if of == student_id), default=0)


def _removed(base: Targets, proposed: Targets, facts: Facts) -> frozenset[Number]:
    gone = frozenset(_release_of(path) for path in base.targets if path not in proposed.targets)
    if not gone <= facts.withdrawn:
        _refuse("drops a release that nobody has taken back")
    if any(_release_of(path) in gone for path in base.targets if path in proposed.targets):
        _refuse("drops a part of a release")
    return gone


def _check_new(base: Targets, proposed: Targets, facts: Facts, student_id: str | None, number: int | None) -> None:
    highest = highest_releases(base)
    if student_id is not None and number is not None:
        if (student_id, number) in facts.withdrawn:
            _refuse("adds a release that was taken back")
        if number <= highest.get(student_id, 0):
            _refuse(
                f"adds release {number} of {student_id}, which is not above {highest[student_id]}, its highest ever"
            )
        highest[student_id] = number
    if _numbers(proposed, roles.HIGHEST) != highest:
        _refuse("forgets which releases there were")


def _raised(
    base: Targets, proposed: Targets, facts: Facts, student_id: str | None, number: int | None
) -> dict[str, int]:
    before, after = min_releases(base), min_releases(proposed)
    if student_id is not None and number is not None:
        before.setdefault(student_id, number)
    raised = {of: least for of, least in after.items() if least != before.get(of)}
    for of, least in raised.items():
        newest = _newest(proposed.targets, of)
        if of not in before or not before[of] < least <= min(facts.wishes.get(of, 0), newest):
            _refuse("changes min_release otherwise than an owner wants")
    if set(after) != set(before):
        _refuse("changes min_release otherwise than an owner wants")
    return raised


def _next(
    base: Targets,
    targets: dict[str, TargetFile],
    min_release: dict[str, int],
    highest: dict[str, int],
    now: dt.datetime,
) -> Targets:
    return Targets(
        version=base.version + 1,
        expires=now + LIFETIMES[roles.STUDENT],
        targets=targets,
        unrecognized_fields={roles.MIN_RELEASE: min_release, roles.HIGHEST: highest},
    )


def _added(base: Targets, proposed: Targets) -> tuple[str | None, int | None, dict[str, ReleaseFile]]:
    files = {}
    releases = set()
    for path, file in proposed.targets.items():
        if path in base.targets:
            continue
        parsed = _parsed(path, file)
        releases.add((parsed.student_id, parsed.number))
        files[parsed.kind] = ReleaseFile(path, file.hashes["sha256"], file.length)
    if not releases:
        return None, None, {}
    student_id, number = releases.pop()
    if releases:
        _refuse("adds more than one release")
    if any(path.startswith(f"student/{student_id}/{number}.") for path in base.targets):
        _refuse("adds files to a release that was already published")
    if not {"manifest", "tokenizer"} < set(files):
        _refuse("adds a release without manifest, tokenizer or weights")
    return student_id, number, files


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
