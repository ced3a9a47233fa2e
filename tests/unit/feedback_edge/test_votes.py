"""One vote for each user, and nobody's vote depends on anybody else."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback import votes
from ebbflow.edge.feedback.interactions import Interaction

BINS = [pb.Bin(bin_id=name, texts=[name]) for name in ("files", "dates", "networks")]
OFFSET = 50.0  # embeddings share a large common part, as those of real models do


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    rows = []
    for text in texts:
        if "engine" in text:
            raise RuntimeError("cannot embed")
        row = [OFFSET + text.count(name) + 0.1 * text.count(name[:2]) for name in ("files", "dates", "networks")]
        strange = [float("nan")] * 3 if "infinite" in text else [0.0] * 3
        rows.append(strange if "infinite" in text or "broken" in text else row)
    return np.array(rows)


def prompts_of(ids: Sequence[str]) -> dict[str, str]:
    return {id_: id_ for id_ in ids}


def test_texts_go_to_the_nearest_bin_despite_a_common_offset() -> None:
    bins = votes.Bins(BINS, embed)
    assert [bins.nearest(f"about {name}") for name in ("files", "dates", "networks")] == [0, 1, 2]


def test_a_text_without_an_embedding_has_no_vote_and_stops_nobody() -> None:
    users = {
        b"a": [Interaction("broken", b"a")],
        b"b": [Interaction("infinite", b"b")],
        b"c": [Interaction("dates", b"c")],
    }
    found = votes.contributions_of(pb.RoundPlan(bins=BINS), users, prompts_of, embed)
    assert found == [Contribution(1)]


def test_what_fails_is_nobodys_missing_vote_but_no_report() -> None:
    """Who keeps the device busy would otherwise decide whose votes are counted."""
    users = {bytes([at]): [Interaction(text, bytes([at]))] for at, text in enumerate(("dates", "engine", "files"))}
    with pytest.raises(RuntimeError):
        votes.contributions_of(pb.RoundPlan(bins=BINS), users, prompts_of, embed)


def test_an_interaction_that_vanished_meanwhile_has_no_vote() -> None:
    users = {b"a": [Interaction("dates", b"a")]}
    assert votes.contributions_of(pb.RoundPlan(bins=BINS), users, lambda _: {}, embed) == []


@pytest.mark.parametrize(
    ("outcome", "failed"),
    [
        (rpb.OUTCOME_UNSPECIFIED, False),
        (rpb.OUTCOME_ACCEPTED, False),
        (rpb.OUTCOME_EDITED, True),
        (rpb.OUTCOME_REJECTED, True),
        (rpb.OUTCOME_REGENERATED, True),
    ],
)
def test_edited_rejected_and_regenerated_count_as_failed(outcome: rpb.Outcome.ValueType, failed: bool) -> None:
    users = {b"a": [Interaction("dates", b"a", outcome)]}
    assert votes.contributions_of(pb.RoundPlan(bins=BINS), users, prompts_of, embed) == [Contribution(1, failed)]


def test_metrics_count_the_users_whole_window() -> None:
    metrics = [pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=5), pb.Metric(kind=pb.Metric.KIND_FAILED, cap=5)]
    outcomes = [rpb.OUTCOME_ACCEPTED] * 3 + [rpb.OUTCOME_REJECTED, rpb.OUTCOME_UNSPECIFIED]
    users = {b"a": [Interaction("dates", b"a", outcome) for outcome in outcomes]}
    [contribution] = votes.contributions_of(pb.RoundPlan(bins=BINS, metrics=metrics), users, prompts_of, embed)
    assert contribution.metrics == (3, 1)


def test_a_user_is_near_where_the_vote_reaches_the_plans_cosine() -> None:
    texts = ["files", "files and some dates", "nothing of the kind"]
    nearest = [votes.Bins(BINS, embed).find(text) for text in texts]
    cosines = [each.cosine for each in nearest if each]
    assert 1 >= cosines[0] > cosines[1] > cosines[2]
    metrics = [pb.Metric(kind=pb.Metric.KIND_FAILED, cap=1), pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1)]
    plan = pb.RoundPlan(bins=BINS, metrics=metrics, near_micro=int((cosines[0] + cosines[1]) / 2 * 1_000_000))
    users = {text.encode(): [Interaction(text, text.encode())] * 3 for text in texts}
    found = votes.contributions_of(plan, users, prompts_of, embed)
    assert [contribution.metrics for contribution in found] == [(0, 1), (0, 0), (0, 0)]


def test_a_text_that_says_nothing_has_no_vote() -> None:
    def silent(texts: Sequence[str]) -> npt.NDArray[np.float64]:
        return np.array(
            [[0.0] * 3 if text == "silence" else row for text, row in zip(texts, embed(texts), strict=True)]
        )

    users = {b"a": [Interaction("silence", b"a")], b"b": [Interaction("dates", b"b")]}
    assert votes.contributions_of(pb.RoundPlan(bins=BINS), users, prompts_of, silent) == [Contribution(1)]


def test_the_vote_is_picked_uniformly() -> None:
    interactions = [Interaction(str(i), b"a") for i in range(4)]
    picked = Counter(votes.pick_one(interactions).id for _ in range(4000))
    assert set(picked) == {"0", "1", "2", "3"}
    assert all(850 < count < 1150 for count in picked.values())


@given(st.lists(st.sampled_from(["files", "dates", "networks", "broken"]), min_size=1, max_size=8), st.data())
def test_removing_a_user_removes_at_most_that_users_vote(topics: list[str], data: st.DataObject) -> None:
    users = {bytes([i]): [Interaction(topic, bytes([i]))] for i, topic in enumerate(topics)}
    gone = data.draw(st.sampled_from(sorted(users)))
    fewer = {user: rows for user, rows in users.items() if user != gone}
    plan = pb.RoundPlan(bins=BINS)
    with_ = Counter(votes.contributions_of(plan, users, prompts_of, embed))
    without = Counter(votes.contributions_of(plan, fewer, prompts_of, embed))
    assert not without - with_
    assert (with_ - without).total() <= 1


def test_texts_are_embedded_one_by_one() -> None:
    sizes = []

    def watched(texts: Sequence[str]) -> npt.NDArray[np.float64]:
        sizes.append(len(texts))
        return embed(texts)

    users = {bytes([i]): [Interaction("dates", bytes([i]))] for i in range(5)}
    votes.contributions_of(pb.RoundPlan(bins=BINS), users, prompts_of, watched)
    assert sizes == [1] * (len(BINS) + 5)


def test_grouping_keeps_every_interaction() -> None:
    rows = [Interaction(str(i), bytes([i % 3])) for i in range(10)]
    users = votes.by_user(rows)
    assert sorted(users) == [b"\x00", b"\x01", b"\x02"]
    assert sum(map(len, users.values())) == 10


def test_without_users_there_are_no_contributions() -> None:
    assert votes.contributions_of(pb.RoundPlan(bins=BINS), {}, prompts_of, embed) == []
