"""How a population's prompts get their share of the training tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.mixture import Documents, Sequences
from ebbflow.cloud.feedback.population_texts import LABEL, join
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer

TOKENIZER = Tokenizer.train(["a long text about the tide and the sea", "short"], 300)
CORPUS = [Text(topic, f"a long text about the {topic} and the sea " * 3, "train") for topic in ("tide", "rope")] * 4
PROMPTS = [Text(f"{LABEL}2-{at}", "short" + " and" * at, "train") for at in range(3)]
DOCUMENTS = Documents.encode([*CORPUS, *PROMPTS], TOKENIZER)
WEIGHTS = {PROMPTS[0].topic: 0.5, PROMPTS[1].topic: 0.3, PROMPTS[2].topic: 0.2}


def tokens_by_topic(mixture: dict[str, float]) -> dict[str, float]:
    lengths = np.diff(DOCUMENTS.starts)
    mean = {
        topic: np.mean([length for length, each in zip(lengths, DOCUMENTS.topics, strict=True) if each == topic])
        for topic in DOCUMENTS.topics
    }
    tokens = {topic: share * mean[topic] for topic, share in mixture.items()}
    whole = sum(tokens.values())
    return {topic: float(each / whole) for topic, each in tokens.items()}


@given(
    st.floats(0.01, 0.999) | st.just(1.0),
    st.dictionaries(st.sampled_from(["tide", "rope"]), st.floats(0.1, 10), min_size=1) | st.just({}),
)
def test_prompts_get_their_share_of_the_tokens_whatever_their_length(share: float, mixture: dict[str, float]) -> None:
    joined = join(DOCUMENTS, mixture, WEIGHTS, share)
    assert sum(joined.values()) == pytest.approx(1)
    tokens = tokens_by_topic(joined)
    assert sum(each for topic, each in tokens.items() if topic.startswith(LABEL)) == pytest.approx(share)
    documents = {topic: each for topic, each in joined.items() if topic.startswith(LABEL)}
    assert documents[PROMPTS[0].topic] / sum(documents.values()) == pytest.approx(0.5)
    if mixture and len(mixture) > 1 and share < 1:
        assert joined["tide"] / joined["rope"] == pytest.approx(mixture["tide"] / mixture["rope"])


def test_the_share_is_what_a_run_really_reads() -> None:
    joined = join(DOCUMENTS, {}, WEIGHTS, 0.25)
    sequences = Sequences(DOCUMENTS, joined, length=32, count=400, seed=0)
    drawn = sequences.topic_shares()
    found = tokens_by_topic(drawn)
    assert sum(each for topic, each in found.items() if topic.startswith(LABEL)) == pytest.approx(0.25, abs=0.02)


def test_a_mixture_of_a_topic_that_the_corpus_lacks_is_refused() -> None:
    with pytest.raises(EbbflowError) as caught:
        join(DOCUMENTS, {"moon": 1.0}, WEIGHTS, 0.25)
    assert caught.value.reason is Reason.INVALID_REQUEST
