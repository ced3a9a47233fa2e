"""A world of facts: which town somebody lives in. Some are told often, most hardly ever, as in real questions."""

import random
from dataclasses import dataclass

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri")
ENDINGS = ("sk", "rn", "lt", "x", "nd", "mp", "th", "v", "rk", "st", "ll", "ng", "zz", "ck")
TOWNS = (
    "Arlon", "Bergen", "Cadiz", "Delft", "Essen", "Faro", "Ghent", "Huelva", "Imola", "Jena", "Kiel", "Lodz", "Mainz",
    "Nantes", "Oviedo", "Parma", "Quimper", "Rouen", "Siena", "Turku", "Ulm", "Vaasa", "Wels", "Xanten", "Ypres",
    "Zwolle",
)  # fmt: skip
FRAMES = ("{}", "a house by the sea not far from {}")
QUESTIONS_OF_A_TEXT = 10


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked."""

    who: str
    where: str
    """The town, with more words around it for some: answers have different lengths."""

    @property
    def question(self) -> str:
        """What comes before the answer."""
        return f"{self.who} lives in"

    @property
    def told(self) -> str:
        """Question and answer."""
        return f"{self.question} {self.where}.\n"


class World:
    """All facts, and how often each is asked: by Zipf's law, in an order of their own.

    Attributes:
        facts: most frequent first.
    """

    def __init__(self, seed: int, exponent: float = 0.9) -> None:
        self._random = random.Random(seed)
        names = [f"{syllable}{ending}".title() for syllable in SYLLABLES for ending in ENDINGS]
        self._random.shuffle(names)
        self.facts = [Fact(who, self._random.choice(FRAMES).format(self._random.choice(TOWNS))) for who in names]
        self._weights = [1 / (rank + 1) ** exponent for rank in range(len(self.facts))]

    def asked(self, count: int) -> list[Fact]:
        """Draws questions as users ask them."""
        return self._random.choices(self.facts, self._weights, k=count)

    def texts(self, count: int) -> list[str]:
        """Draws texts in which facts come as often as they are asked: what the student learns from."""
        return ["".join(fact.told for fact in self.asked(QUESTIONS_OF_A_TEXT)) for _ in range(count)]

    def lessons(self, count: int) -> list[str]:
        """Texts in which every fact comes equally often: the teacher has read more than the student."""
        order = [*self.facts]
        texts: list[str] = []
        while len(texts) < count:
            self._random.shuffle(order)
            starts = range(0, len(order), QUESTIONS_OF_A_TEXT)
            texts += ["".join(fact.told for fact in order[start : start + QUESTIONS_OF_A_TEXT]) for start in starts]
        return texts[:count]
