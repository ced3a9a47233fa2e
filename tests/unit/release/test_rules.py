"""What a version of the list of releases may change, tried with everything that two parties could propose."""

import datetime as dt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.metadata import TargetFile, Targets

from ebbflow.cloud.release import rules
from ebbflow.cloud.release.rules import Facts
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.targets import path_of

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
STUDENTS = ("faq", "ops")


def empty() -> Targets:
    fields: dict[str, dict[str, int]] = {roles.MIN_RELEASE: {}, roles.HIGHEST: {}}
    return Targets(expires=NOW + roles.LIFETIMES[roles.STUDENT], unrecognized_fields=fields)


def files(student_id: str, number: int) -> dict[str, dict[str, Any]]:
    kinds = ("manifest", "tokenizer", "int8")
    return {path_of(student_id, number, kind): {"sha256": "e" * 64, "size_bytes": 9, "kind": kind} for kind in kinds}


def listing(*numbers: int, student_id: str = "faq") -> Targets:
    made = empty()
    for number in numbers:
        made = rules.add_release(made, student_id, number, files(student_id, number), NOW)
    return made


def refused(base: Targets, proposed: Targets, facts: Facts | None = None) -> str:
    with pytest.raises(EbbflowError) as caught:
        rules.check(base, proposed, NOW, facts)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED
    return str(caught.value)


def gone(*numbers: int) -> Facts:
    return Facts(withdrawn=frozenset(("faq", number) for number in numbers))


def test_a_revoked_release_leaves_whole_and_nothing_else_does() -> None:
    base = listing(1, 2, 3)
    proposed = rules.amend(base, gone(2), NOW)
    assert proposed
    change = rules.check(base, proposed, NOW, gone(2))
    assert change.student_id is None
    assert change.removed == frozenset({("faq", 2)})
    assert not change.raised
    assert rules.releases_of(proposed) == {("faq", 1), ("faq", 3)}
    assert "nobody has taken back" in refused(base, proposed)
    assert "nobody has taken back" in refused(base, proposed, gone(1))
    path = path_of("faq", 2, "int8")
    proposed.targets[path] = base.targets[path]
    assert "a part of a release" in refused(base, proposed, gone(2))


def test_a_release_that_was_taken_back_never_returns() -> None:
    base = rules.amend(listing(1, 2, 3), gone(3), NOW)
    assert base
    for facts in (gone(3), Facts()):  # whatever the registry says by then
        with pytest.raises(EbbflowError, match=r"taken back|highest ever"):
            rules.add_release(base, "faq", 3, files("faq", 3), NOW, facts)
    rules.add_release(base, "faq", 4, files("faq", 4), NOW, gone(3))


def test_the_memory_of_what_there_was_cannot_be_wiped() -> None:
    base = rules.amend(listing(1, 2, 3), gone(3), NOW)
    assert base
    for highest in ({}, {"faq": 2}, {"faq": 9}, {"faq": 3, "ops": 1}):
        proposed = rules.renew(base, NOW)
        proposed.unrecognized_fields[roles.HIGHEST] = highest
        assert "which releases there were" in refused(base, proposed)


def test_a_list_of_before_that_memory_knows_by_what_it_holds() -> None:
    base = listing(1, 4)
    del base.unrecognized_fields[roles.HIGHEST]
    assert rules.highest_releases(base) == {"faq": 4}
    assert rules.highest_releases(rules.renew(base, NOW)) == {"faq": 4}


@pytest.mark.parametrize(
    ("wish", "least", "right"),
    [(3, 2, True), (3, 3, True), (2, 3, False), (9, 4, False), (3, 0, False), (0, 2, False), (2, 1, True)],
)
def test_min_release_rises_as_far_as_an_owner_wants_and_a_release_remains(wish: int, least: int, right: bool) -> None:
    base, facts = listing(1, 2, 3), Facts(wishes={"faq": wish})
    proposed = rules.renew(base, NOW)
    proposed.unrecognized_fields[roles.MIN_RELEASE] = {"faq": least}
    if right:
        assert rules.check(base, proposed, NOW, facts).raised == ({"faq": least} if least > 1 else {})
    else:
        assert "min_release" in refused(base, proposed, facts)


def test_a_wish_beyond_what_there_is_waits() -> None:
    base = listing(1, 2)
    assert rules.amend(base, Facts(wishes={"faq": 3}), NOW) is None
    with_third = rules.add_release(base, "faq", 3, files("faq", 3), NOW)
    amended = rules.amend(with_third, Facts(wishes={"faq": 3}), NOW)
    assert amended
    assert rules.min_releases(amended) == {"faq": 3}
    assert rules.amend(amended, Facts(wishes={"faq": 3}), NOW) is None


def test_what_was_signed_as_packed_stays_as_it_was() -> None:
    base = listing(1, 2)
    proposed = rules.renew(base, NOW)
    proposed.targets[path_of("faq", 1, "int8")] = TargetFile(8, {"sha256": "e" * 64}, "x")
    assert "already published" in refused(base, proposed)


numbers = st.integers(1, 6)
releases = st.tuples(st.sampled_from(STUDENTS), numbers)
steps = st.one_of(
    st.tuples(st.just("add"), releases),
    st.tuples(st.just("revoke"), releases),
    st.tuples(st.just("wish"), releases),
    st.tuples(st.just("return"), releases),
    st.tuples(st.just("lower"), releases),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=25))
def test_over_any_history_nothing_returns_and_nothing_sinks(history: list[tuple[str, tuple[str, int]]]) -> None:
    base, withdrawn, wishes = empty(), set[tuple[str, int]](), dict[str, int]()
    ever: set[tuple[str, int]] = set()
    removed: set[tuple[str, int]] = set()
    for verb, (student_id, number) in history:
        facts = Facts(frozenset(withdrawn), dict(wishes))
        before, least = rules.releases_of(base), rules.min_releases(base)
        proposed: Targets | None = None
        if verb == "add":
            try:
                proposed = rules.add_release(base, student_id, number, files(student_id, number), NOW, facts)
            except EbbflowError:
                highest = max((n for of, n in ever if of == student_id), default=0)
                assert number <= highest or (student_id, number) in withdrawn
        elif verb == "revoke":
            withdrawn.add((student_id, number))
            facts = Facts(frozenset(withdrawn), dict(wishes))
            proposed = rules.amend(base, facts, NOW)
        elif verb == "wish":
            wishes[student_id] = max(number, wishes.get(student_id, 0))
            facts = Facts(frozenset(withdrawn), dict(wishes))
            proposed = rules.amend(base, facts, NOW)
        else:  # a thief of one key, with the registry on his side
            hostile = rules.renew(base, NOW)
            if verb == "return" and (student_id, number) in removed:
                for path, file in files(student_id, number).items():
                    custom = {"custom": roles.custom(student_id, number, file["kind"])}
                    hostile.targets[path] = TargetFile(9, {"sha256": "e" * 64}, path, custom)
                refused(base, hostile, Facts())
            elif verb == "lower" and least.get(student_id, 0) > number:
                hostile.unrecognized_fields[roles.MIN_RELEASE] = {**least, student_id: number}
                refused(base, hostile, Facts(frozenset(withdrawn), {student_id: number}))
        if proposed is None:
            continue
        change = rules.check(base, proposed, NOW, facts)
        after = rules.releases_of(proposed)
        assert change.removed == before - after
        assert not (after - before) & ever
        assert all(rules.min_releases(proposed)[of] >= value for of, value in least.items())
        ever |= after
        removed |= before - after
        base = proposed
    assert not rules.releases_of(base) & removed
