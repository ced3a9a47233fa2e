"""Who says no leaves nothing and has no vote; who is paused keeps everything and has no vote."""

import datetime as dt
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback.consent import Consent, Words
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)
Admit = Callable[..., AdmittedPlan]


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([[text.count(name) for name in ("files", "dates", "networks")] for text in texts], float)


def ask(store: FeedbackStore, user: str | None, now: dt.datetime) -> str:
    return store.record_interaction("faq", "students/faq/releases/1", user, "files", "an answer", now=now - DAY)


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[FeedbackStore]:
    (tmp_path / "strict").mkdir()
    store = FeedbackStore(tmp_path / "strict" / "agent.db", consent=Consent.REQUIRED)
    yield store
    store.close()


def test_a_no_ends_recording_and_voting(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    before = ask(store, "ada", now)
    ask(store, "ben", now)
    store.set_consent("ada", allowed=False)
    refused = ask(store, "ada", now)
    assert store.count() == (2, 2)
    assert len(store.contributions(admitted(), embed)) == 1
    for interaction in (before, refused):
        with pytest.raises(EbbflowError) as caught:
            store.record_outcome(interaction, rpb.OUTCOME_ACCEPTED)
        assert caught.value.reason is Reason.INTERACTION_NOT_FOUND
    store.set_consent("ada", allowed=True)
    assert len(store.contributions(admitted(), embed)) == 2


def test_where_a_yes_is_required_nothing_is_kept_before_it(
    strict: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    for user in ("ada", "ben", None):
        ask(strict, user, now)
    assert strict.count() == (0, 0)
    strict.set_consent("ada", allowed=True)
    strict.set_consent(None, allowed=True)
    for user in ("ada", "ben", None):
        ask(strict, user, now)
    assert strict.count() == (2, 2)
    assert len(strict.contributions(admitted(), embed)) == 2


def test_a_pause_stops_votes_and_forgets_nothing(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    ask(store, "ada", now)
    store.set_paused("ada", paused=True)
    ask(store, "ada", now)
    assert store.count() == (2, 1)
    assert store.contributions(admitted(), embed) == []
    store.set_paused("ada", paused=False)
    assert len(store.contributions(admitted(), embed)) == 1


@pytest.mark.parametrize("then", ["purge", "purge and ask", "refuse", "pause", "nothing"])
def test_who_is_gone_when_the_report_is_made_is_not_in_it(
    store: FeedbackStore,
    admitted: Admit,
    now: dt.datetime,
    monkeypatch: pytest.MonkeyPatch,
    then: str,
) -> None:
    """To compute what users add takes minutes; what a user says meanwhile counts."""
    summed: list[int] = []

    def look(plan: pb.RoundPlan, users: Collection[Contribution]) -> list[int]:
        summed.append(len(users))
        return privatise(plan, users)

    monkeypatch.setattr("ebbflow.edge.feedback.release.privatise", look)
    ask(store, "ada", now)
    ask(store, "ben", now)
    plan = admitted()
    contributions = store.contributions(plan, embed)
    assert len(contributions) == 2
    if then.startswith("purge"):
        store.purge_user("ada")
    if then == "purge and ask":
        ask(store, "ada", now)
    if then == "refuse":
        store.set_consent("ada", allowed=False)
    if then == "pause":
        store.set_paused("ada", paused=True)
    store.release_batch(plan, contributions, lambda _: b"", now)
    assert summed == [2 if then == "nothing" else 1]


def test_a_purge_keeps_the_word(store: FeedbackStore, now: dt.datetime) -> None:
    ask(store, "ada", now)
    store.set_consent("ada", allowed=False)
    assert store.purge_user("ada") == 1
    ask(store, "ada", now)
    assert store.count() == (0, 0)


def test_words_survive_a_restart_and_are_counted(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    store.set_consent("ada", allowed=False)
    store.set_consent("ben", allowed=True)
    store.set_paused("ben", paused=True)
    store.close()
    store = FeedbackStore(tmp_path / "agent.db")
    assert store.words() == Words(allowed=1, refused=1, paused=1)
    ask(store, "ada", now)
    assert store.count() == (0, 0)
    store.close()


def test_user_keys_are_not_written_with_their_words(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    store.set_consent("anna@example.org", allowed=False)
    for file in tmp_path.iterdir():
        assert b"anna@example" not in file.read_bytes(), file
    store.close()


USERS = ("ada", "ben", "cara", None)
ACTS = st.lists(
    st.tuples(st.sampled_from(["ask", "yes", "no", "pause", "resume", "purge"]), st.sampled_from(USERS)), max_size=24
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(ACTS, st.sampled_from(Consent))
def test_nobody_votes_who_may_not(
    tmp_path_factory: pytest.TempPathFactory,
    admitted: Admit,
    now: dt.datetime,
    acts: list[tuple[str, str | None]],
    rule: Consent,
) -> None:
    store = FeedbackStore(tmp_path_factory.mktemp("consent") / "agent.db", consent=rule)
    kept, said, paused = dict.fromkeys(USERS, 0), dict[str | None, bool](), set[str | None]()
    for act, user in acts:
        match act:
            case "ask":
                ask(store, user, now)
                kept[user] += said.get(user, rule is Consent.ASSUMED)
            case "yes" | "no":
                store.set_consent(user, allowed=act == "yes")
                said[user] = act == "yes"
            case "pause" | "resume":
                store.set_paused(user, paused=act == "pause")
                (paused.add if act == "pause" else paused.discard)(user)
            case _:
                assert store.purge_user(user) == kept[user]
                kept[user] = 0
    voting = [user for user in USERS if kept[user] and said.get(user, rule is Consent.ASSUMED) and user not in paused]
    assert len(store.contributions(admitted(), embed)) == len(voting)
    assert store.count() == (sum(kept.values()), sum(map(bool, kept.values())))
    store.close()
