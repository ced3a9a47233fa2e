"""Public texts, drawn by topic and by likeness."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.feedback import pool as pools
from ebbflow.cloud.feedback.pool import Pool, Space

KINDS = ("tide", "wave", "ship", "salt")


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    rows = [[text.count(kind) + 5.0 for kind in KINDS] + [0.01 * (len(text) % 7)] for text in texts]
    return np.asarray(rows)


def pool_of(counts: dict[str, int]) -> Pool:
    texts = [Text(kind, f"{kind} {'x' * at}", "train") for kind, count in counts.items() for at in range(count)]
    space = Space(embed, [text.text for text in texts])
    return Pool(texts, space.rows([text.text for text in texts]))


def test_a_sample_leaves_out_what_is_measured_on_copies_and_what_is_too_long() -> None:
    texts = [
        Text("a", "one", "train"),
        Text("a", "two", "gate"),
        Text("a", "one", "bin"),
        Text("b", "x" * 2001, "train"),
        Text("b", "three", "bin"),
    ]
    assert [text.text for text in pools.sample(texts, 0)] == ["one", "three"]


def test_a_sample_has_as_many_texts_of_a_small_topic_as_of_a_large_one() -> None:
    texts = [Text("large", f"l{at}", "train") for at in range(500)]
    texts += [Text("small", f"s{at}", "train") for at in range(30)]
    found = pools.sample(texts, 0, 60)
    assert Counter(text.topic for text in found) == {"large": 30, "small": 30}
    assert [texts.index(text) for text in found] == sorted(texts.index(text) for text in found)
    assert pools.sample(texts, 1, 60) != found


def test_likeness_ignores_what_all_texts_share() -> None:
    space = Space(embed, list(KINDS))
    rows = space.rows(["tide", "tide tide", "wave"])
    assert float(rows[0] @ rows[1]) > 0.9
    assert float(rows[0] @ rows[2]) < 0.1


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(KINDS), st.integers(1, 12), min_size=1),
    st.integers(0, 40),
    st.integers(0, 2**32),
    st.data(),
)
def test_texts_are_drawn_once_by_topic_until_there_are_none(
    counts: dict[str, int], count: int, seed: int, data: st.DataObject
) -> None:
    pool = pool_of(counts)
    taken = set(data.draw(st.lists(st.sampled_from([text.text for text in pool.texts]))))
    weights = dict.fromkeys(list(counts)[: len(counts) // 2 + 1], 1.0)
    drawn = pool.draw_by_topic(weights, count, taken, np.random.default_rng(seed))
    free = [text for text in pool.texts if text.topic in weights and text.text not in taken]
    assert len(drawn) == len(set(drawn)) == min(count, len(free))
    assert all(pool.texts[at] in free for at in drawn)


def test_topics_are_drawn_in_proportion_to_their_weight() -> None:
    pool = pool_of(dict.fromkeys(KINDS, 50))
    drawn = pool.draw_by_topic({"tide": 0.75, "ship": 0.25}, 40, (), np.random.default_rng(0))
    assert Counter(pool.texts[at].topic for at in drawn) == {"tide": 30, "ship": 10}


def test_texts_drawn_near_another_are_like_it_and_not_taken() -> None:
    pool = pool_of(dict.fromkeys(KINDS, 20))
    row_E = pool.rows_NE[0]
    drawn = pool.draw_near(row_E, 8, {pool.texts[0].text}, np.random.default_rng(0))
    assert len(set(drawn)) == 8
    assert 0 not in drawn
    cosines_N = pool.rows_NE @ row_E
    assert cosines_N[drawn].mean() > cosines_N.mean() + 0.3
    assert sum(pool.texts[at].topic == "tide" for at in drawn) >= 6


def test_prompts_of_a_topic_stand_for_its_clusters() -> None:
    texts = [Text("sea", kind + "y" * at, "train") for kind in KINDS for at in range(10)]
    space = Space(embed, [text.text for text in texts])
    pool = Pool(texts, space.rows([text.text for text in texts]))
    for seed in range(10):
        drawn = pool.draw_by_topic({"sea": 1.0}, 4, (), np.random.default_rng(seed))
        assert {texts[at].text.rstrip("y") for at in drawn} == set(KINDS)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_copies_in_all_but_name_are_still_drawn(count: int) -> None:
    texts = [Text("sea", f"tide {'a' * 7 * at}", "train") for at in range(5)]
    space = Space(embed, [text.text for text in texts])
    pool = Pool(texts, space.rows([text.text for text in texts]))
    assert len(set(pool.draw_by_topic({"sea": 1.0}, count, (), np.random.default_rng(0)))) == count
