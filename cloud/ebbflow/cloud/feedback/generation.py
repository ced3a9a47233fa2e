"""Makes a generation of prompts: the first out of public texts, later ones out of a round's votes. No IO, no torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ebbflow.api.v1.population_pb2 import Population, Prompt
from ebbflow.cloud.feedback.evolution import Brood, Rows, Votes, breed, by_topic, family_weights, remember
from ebbflow.cloud.feedback.pool import Pool, Space
from ebbflow.cloud.feedback.population import prompt_id
from ebbflow.cloud.feedback.variations import ABLE_SHARE, ATTEMPTS, MOST_LIKE, TRIAL, Judge, Verdict, shortfall

EXAMPLES = 3
"""Public texts that a teacher sees beside the prompt that it is to vary."""
TEACHER_SHARE = 0.75
"""Share of the new prompts that the teacher is asked for; the others are public texts like their parents, because what
is public may be nearer to what users ask than anything that a teacher thinks of."""
_SEEDS = 2**63
"""How many seeds torch takes."""
_EVEN_SHARE = 0.5
"""Share of the strangers that are drawn from all topics evenly."""


@dataclass(frozen=True)
class Wish:
    """One variation that is asked of a teacher.

    Attributes:
        text: the prompt to vary.
        topic: its topic.
        examples: public texts like it, of its topic.
        manner: one of the teacher's manners.
    """

    text: str
    topic: str
    examples: Sequence[str]
    manner: str


class Variator(Protocol):
    """A teacher that varies prompts."""

    @property
    def manners(self) -> Sequence[str]:
        """Ways in which it can be asked; which of them it understands is tried out."""

    @property
    def vocabulary_size(self) -> int:
        """Number of its tokens."""

    def encode(self, text: str) -> Sequence[int]:
        """Returns the tokens of a text."""

    def vary(self, wishes: Sequence[Wish], most_tokens: int, seed: int) -> list[str]:
        """Writes one text for each wish; an empty one where it found no end within `most_tokens`."""


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        generation: its number.
        size: number of prompts.
        seed: of every random choice.
    """

    generation: int
    size: int
    seed: int


@dataclass
class _Cradle:
    """The prompts of the next generation so far, and their families among the one before."""

    order: Order
    prompts: list[Prompt] = field(default_factory=list)
    families: list[int | None] = field(default_factory=list)

    def add(self, text: str, topic: str, parent: str = "", family: int | None = None) -> None:
        id_ = prompt_id(self.order.generation, len(self.prompts))
        self.prompts.append(Prompt(prompt_id=id_, text=text, topic=topic, parent=parent))
        self.families.append(family)

    @property
    def texts(self) -> set[str]:
        return {prompt.text for prompt in self.prompts}

    def weigh(self, weights: Sequence[float]) -> None:
        for prompt, weight in zip(self.prompts, weights, strict=True):
            prompt.weight = weight


def first(pool: Pool, order: Order, weights: Mapping[str, float]) -> list[Prompt]:
    """Makes a generation of public texts.

    Args:
        pool: what to draw from.
        order: what is asked for; fewer prompts come back where there are not so many texts.
        weights: share by topic; empty gives every topic the same.
    """
    shares = dict(weights) or dict.fromkeys(pool.topics, 1.0)
    cradle = _Cradle(order)
    for at in pool.draw_by_topic(shares, order.size, (), np.random.default_rng([order.seed, 3])):
        cradle.add(pool.texts[at].text, pool.texts[at].topic)
    counts = Counter(prompt.topic for prompt in cradle.prompts)
    whole = sum(shares[topic] for topic in counts)
    cradle.weigh([shares[prompt.topic] / counts[prompt.topic] / whole for prompt in cradle.prompts])
    return cradle.prompts


def following(
    pool: Pool, space: Space, order: Order, before: Sequence[Prompt], votes: Votes, variator: Variator | None
) -> Population:
    """Makes a generation out of the votes on the one before.

    Args:
        pool: public texts.
        space: how texts are likened.
        order: what is asked for.
        before: the prompts that were voted on.
        votes: what the round says of them.
        variator: the teacher; None does without.

    Returns:
        A message with prompts, method and reason; the reason is empty if the teacher made the new prompts.
    """
    scores, cradle = remember(votes.scores(), before), _Cradle(order)
    brood = breed(scores, order.size, order.seed)
    for at in brood.elites:
        cradle.add(before[at].text, before[at].topic, before[at].prompt_id, at)
    rows_NE = space.rows([prompt.text for prompt in before])
    nursery = _Nursery(pool, space, order, before, rows_NE)
    slots = [at for at, count in brood.litters.items() for _ in range(count)]
    rng = np.random.default_rng([order.seed, 6])
    asked = sorted(rng.permutation(len(slots))[: math.ceil(len(slots) * TEACHER_SHARE)].tolist())
    born, reason = nursery.by_teacher([slots[slot] for slot in asked], variator) if variator else ({}, "")
    born = {asked[number]: text for number, text in born.items()}
    for slot, at in enumerate(slots):
        if (text := born.get(slot)) is not None:
            cradle.add(text, before[at].topic, before[at].prompt_id, at)
    nursery.by_public_texts([at for slot, at in enumerate(slots) if slot not in born], cradle)
    _add_strangers(pool, cradle, brood, by_topic(scores, [prompt.topic for prompt in before]))
    cradle.weigh(family_weights(scores, cradle.families))
    method = Population.METHOD_TEACHER if born else Population.METHOD_PUBLIC_TEXTS
    return Population(prompts=cradle.prompts, method=method, reason="" if born else reason)


def _add_strangers(pool: Pool, cradle: _Cradle, brood: Brood, scores: Mapping[str, float]) -> None:
    """Fills up with public texts: half by what the topics' votes say, half evenly."""
    order, topics, whole = cradle.order, list(dict.fromkeys(pool.topics)), sum(scores.values())
    voted = {topic: scores.get(topic, 0.0) / whole if whole > 0 else 0.0 for topic in topics}
    weights = {topic: _EVEN_SHARE / len(topics) + (1 - _EVEN_SHARE) * voted[topic] for topic in topics}
    count = max(brood.strangers, order.size - len(cradle.prompts))
    for at in pool.draw_by_topic(weights, count, cradle.texts, np.random.default_rng([order.seed, 4])):
        cradle.add(pool.texts[at].text, pool.texts[at].topic)


class _Nursery:
    """Makes new prompts out of old ones."""

    def __init__(self, pool: Pool, space: Space, order: Order, before: Sequence[Prompt], rows_NE: Rows) -> None:
        self._pool, self._space, self._order, self._before, self._rows_NE = pool, space, order, before, rows_NE

    def by_teacher(self, slots: Sequence[int], variator: Variator) -> tuple[dict[int, str], str]:
        """Asks the teacher for one text for each slot, which names its parent.

        Returns:
            Texts by slot, of those that came out well; none, and the reason, if the teacher is too weak.
        """
        if not slots:
            return {}, "no prompt was to be varied"
        known = [prompt.text for prompt in self._before]
        judge = Judge(
            [text.text for text in self._pool.texts],
            self._pool.rows_NE,
            variator.encode,
            variator.vocabulary_size,
            known,
        )
        asking = _Asking(self, variator, judge, slots)
        manners = variator.manners
        trial = [at % len(slots) for at in range(max(len(slots), TRIAL * len(manners)))]
        for at, manner in enumerate(manners):
            asking.ask(trial[at :: len(manners)], manner)
        best = max(manners, key=asking.good_share)
        if asking.good_share(best) < ABLE_SHARE:
            return {}, shortfall(asking.verdicts[best])
        for _ in range(ATTEMPTS - 1):
            asking.ask([slot for slot in range(len(slots)) if slot not in asking.born], best)
        return asking.born, ""

    def wish(self, at: int, manner: str) -> Wish:
        """What to ask of the teacher for a prompt of the generation before."""
        prompt = self._before[at]
        near = self._pool.neighbours(self._rows_NE[at], prompt.topic, EXAMPLES + 1)
        return Wish(prompt.text, prompt.topic, [text for text in near if text != prompt.text][:EXAMPLES], manner)

    def judge(self, judge: Judge, at: int, text: str, kept_KE: Sequence[Rows]) -> tuple[Verdict, Rows]:
        """Says whether a text is a good variation of a prompt and unlike those that were kept."""
        row_E = self._space.rows([text])[0]
        verdict = judge.judge(text, row_E, self._rows_NE[at])
        others = np.stack([*kept_KE, *self._rows_NE])
        if verdict is Verdict.GOOD and float((others @ row_E).max()) > MOST_LIKE:
            verdict = Verdict.COPY
        return verdict, row_E

    @property
    def seed(self) -> int:
        """Seed of the generation."""
        return self._order.seed

    def by_public_texts(self, parents: Sequence[int], cradle: _Cradle) -> None:
        """Draws a public text like its parent for each."""
        rng = np.random.default_rng([self._order.seed, 5])
        for at in parents:
            taken = cradle.texts | {prompt.text for prompt in self._before}
            for drawn in self._pool.draw_near(self._rows_NE[at], 1, taken, rng):
                found = self._pool.texts[drawn]
                cradle.add(found.text, found.topic, self._before[at].prompt_id, at)


class _Asking:
    """What a teacher was asked, and how well it did.

    Attributes:
        born: good texts by slot.
        verdicts: on all texts by manner.
    """

    def __init__(self, nursery: _Nursery, variator: Variator, judge: Judge, slots: Sequence[int]) -> None:
        self._nursery, self._variator, self._judge, self._slots = nursery, variator, judge, slots
        self.born: dict[int, str] = {}
        self.verdicts: dict[str, Counter[Verdict]] = {manner: Counter() for manner in variator.manners}
        self._kept: list[Rows] = []
        self._asked = 0

    def good_share(self, manner: str) -> float:
        """Share of the texts in a manner that are good."""
        verdicts = self.verdicts[manner]
        return verdicts[Verdict.GOOD] / max(1, verdicts.total())

    def ask(self, slots: Sequence[int], manner: str) -> None:
        """Asks for a text for each of some slots, and keeps the good ones."""
        if not slots:
            return
        wishes = [self._nursery.wish(self._slots[slot], manner) for slot in slots]
        self._asked += 1
        seed = (self._nursery.seed * 1_000 + self._asked) % _SEEDS
        written = self._variator.vary(wishes, self._judge.most_tokens, seed)
        for slot, text in zip(slots, written, strict=True):
            verdict, row_E = self._nursery.judge(self._judge, self._slots[slot], text, self._kept)
            self.verdicts[manner][verdict] += 1
            if verdict is Verdict.GOOD and slot not in self.born:
                self.born[slot] = text
                self._kept.append(row_E)
                self._judge.keep(text)
