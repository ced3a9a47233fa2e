import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.mixture import Documents, Sequences, pad, shares
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer

BEGIN, END = 1, 2


def _documents(lengths_by_topic: dict[str, list[int]]) -> Documents:
    """Documents of distinct tokens between BEGIN and END."""
    tokens: list[int] = []
    starts, topics, next_token = [0], [], 10
    for topic, lengths in lengths_by_topic.items():
        for length in lengths:
            tokens += [BEGIN, *range(next_token, next_token + length), END]
            next_token += length
            starts.append(len(tokens))
            topics.append(topic)
    return Documents(np.array(tokens, np.int32), np.array(starts, np.int64), topics, BEGIN)


SMALL = _documents({"a": [3, 5, 1], "b": [7, 2]})


def test_documents_begin_and_end_as_the_tokenizer_says() -> None:
    tokenizer = Tokenizer.train(["tides come", "tides go"], 300)
    documents = Documents.encode([Text("sea", "tides", "train"), Text("land", "go", "train")], tokenizer)
    first = documents.tokens[documents.starts[0] : documents.starts[1]].tolist()
    assert first == [tokenizer.bos_id, *tokenizer.encode("tides"), tokenizer.eos_id]
    assert (documents.topics, documents.begin_id) == (["sea", "land"], tokenizer.bos_id)


@given(
    length=st.integers(1, 40),
    count=st.integers(1, 60),
    seed=st.integers(0, 2**63),
    mixture=st.sampled_from([{}, {"a": 1.0}, {"a": 0.2, "b": 0.8}]),
)
def test_sequences_are_windows_of_one_stream_of_whole_documents(
    length: int, count: int, seed: int, mixture: dict[str, float]
) -> None:
    sequences = Sequences(SMALL, mixture, length=length, count=count, seed=seed)
    tokens, ignored = sequences.batch(0, count)
    stream = [*tokens[:, :-1].flatten().tolist(), int(tokens[-1, -1])]
    assert tokens.shape == (count, length + 1)
    assert (tokens[1:, 0] == tokens[:-1, -1]).all()
    assert (ignored == (tokens == BEGIN)).all()
    known = {tuple(SMALL.tokens[a:b].tolist()) for a, b in zip(SMALL.starts, SMALL.starts[1:], strict=False)}
    cuts = [0, *[i + 1 for i, token in enumerate(stream) if token == END]]
    pieces = [tuple(stream[a:b]) for a, b in itertools.pairwise(cuts)]
    assert all(piece in known for piece in pieces)


@given(first=st.integers(0, 30), count=st.integers(1, 9), seed=st.integers(0, 100))
def test_any_sequence_can_be_read_alone(first: int, count: int, seed: int) -> None:
    sequences = Sequences(SMALL, {}, length=7, count=40, seed=seed)
    whole, _ = sequences.batch(0, 40)
    part, _ = sequences.batch(first, count)
    assert (part == whole[first : first + count]).all()


def test_the_seed_decides_the_order() -> None:
    one, same, other = (Sequences(SMALL, {}, length=50, count=2, seed=seed).batch(0, 2)[0] for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_every_document_of_a_topic_is_seen_once_before_any_is_seen_again() -> None:
    documents = _documents({"a": [1] * 50})
    tokens, _ = Sequences(documents, {}, length=150, count=3, seed=5).batch(0, 3)
    passes = tokens[:, :150].tolist()
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("weights", [{"a": 3.0, "b": 1.0}, {"a": 0.05, "b": 0.95}])
def test_documents_are_drawn_with_the_shares_of_the_mixture(weights: dict[str, float]) -> None:
    sequences = Sequences(SMALL, weights, length=100, count=100, seed=0)
    total = sum(weights.values())
    for topic, share in sequences.topic_shares().items():
        assert share == pytest.approx(weights[topic] / total, abs=0.005)


def test_without_a_mixture_the_corpus_keeps_its_proportions() -> None:
    assert shares({}, ["a", "a", "a", "b"]) == {"a": 0.75, "b": 0.25}


def test_a_topic_of_no_weight_is_left_out() -> None:
    assert shares({"a": 2.0, "b": 0.0}, ["a", "b"]) == {"a": 1.0}


@pytest.mark.parametrize(
    "mixture", [{"a": -1.0, "b": 2.0}, {"a": float("nan")}, {"a": float("inf")}, {"a": 0.0}, {"unknown": 1.0}]
)
def test_an_impossible_mixture_is_refused(mixture: dict[str, float]) -> None:
    with pytest.raises(EbbflowError) as caught:
        shares(mixture, ["a", "b"])
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_padding_and_beginnings_are_not_predicted() -> None:
    tokens, ignored = pad([[1, 7, 8, 2], [1, 9]], BEGIN, 0)
    assert tokens.tolist() == [[1, 7, 8, 2], [1, 9, 0, 0]]
    assert ignored.tolist() == [[True, False, False, False], [True, False, True, True]]
