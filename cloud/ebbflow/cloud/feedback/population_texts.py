"""A generation's prompts as training texts: each has a topic of its own, so that a mixture can give it its share.

Imports no torch.
"""

from collections.abc import Mapping

import numpy as np
from sqlalchemy.orm import Session

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.mixture import Documents, shares
from ebbflow.cloud.feedback.population import find_ready, prompts_of

DEFAULT_SHARE = 0.25
"""Share of the training tokens that a population gets where nobody says it."""
LABEL = "\x1fpopulation/"
"""Begins the topic of every prompt; no topic of a corpus can begin so by accident."""


def texts(session: Session, student_id: str, generation: int) -> list[Text]:
    """Returns a generation's prompts as training texts, each under a topic of its own.

    Raises:
        EbbflowError: POPULATION_NOT_FOUND; STATE_CONFLICT if it is not ready.
    """
    prompts = prompts_of(find_ready(session, student_id, generation))
    return [Text(LABEL + prompt.prompt_id, prompt.text, "train") for prompt in prompts]


def weights(session: Session, student_id: str, generation: int) -> dict[str, float]:
    """Returns the share of each prompt among the generation's, by the topic that `texts` gives it; they sum to 1.

    Raises:
        EbbflowError: as `texts`.
    """
    prompts = prompts_of(find_ready(session, student_id, generation))
    whole = sum(prompt.weight for prompt in prompts)
    return {LABEL + prompt.prompt_id: prompt.weight / whole for prompt in prompts if prompt.weight > 0}


def join(
    documents: Documents, mixture: Mapping[str, float], prompts: Mapping[str, float], share: float
) -> dict[str, float]:
    """Returns the mixture of documents by which a population gets its share of the training tokens.

    A mixture counts documents, so a population of short prompts needs more of them.

    Args:
        documents: the corpus' training texts and those of the population, encoded together.
        mixture: weights of the corpus' topics; empty leaves the corpus' own proportions.
        prompts: `weights` of the population.
        share: of the training tokens, above 0 and at most 1.

    Raises:
        EbbflowError: as `mixture.shares`.
    """
    corpus = shares(mixture, [topic for topic in documents.topics if not topic.startswith(LABEL)])
    mean = _mean_tokens(documents)
    of_corpus = sum(weight * mean[topic] for topic, weight in corpus.items())
    of_prompts = sum(weight * mean[label] for label, weight in prompts.items())
    part = share * of_corpus / (share * of_corpus + (1 - share) * of_prompts)
    return {topic: (1 - part) * weight for topic, weight in corpus.items() if part < 1} | {
        label: part * weight for label, weight in prompts.items()
    }


def _mean_tokens(documents: Documents) -> dict[str, float]:
    lengths, found = np.diff(documents.starts), dict[str, list[int]]()
    for topic, length in zip(documents.topics, lengths, strict=True):
        found.setdefault(topic, []).append(int(length))
    return {topic: sum(each) / len(each) for topic, each in found.items()}
