"""How many agents a canary needs. Arithmetic only.

Of n agents on which a fault strikes independently with rate p, at least one shows it with probability 1 - (1 - p)^n.
"""

import math

CONFIDENCE = 0.95


def agents_needed(rate: float, confidence: float = CONFIDENCE) -> int:
    """Agents of which at least one shows a fault, with the given confidence.

    Args:
        rate: share of all agents that the fault strikes, above 0 to 1.
        confidence: probability of seeing it, above 0 and below 1.

    Raises:
        ValueError: if either is out of range.
    """
    if not 0 < rate <= 1 or not 0 < confidence < 1:
        raise ValueError(f"rate {rate} or confidence {confidence} is out of range")
    if rate == 1:
        return 1
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-rate) - 1e-9))


def detectable_rate(agents: int, confidence: float = CONFIDENCE) -> float:
    """The lowest rate of a fault that so many agents show at least once, with the given confidence.

    Args:
        agents: how many take part; without any, nothing can be seen and the answer is 1.
        confidence: probability of seeing it, above 0 and below 1.

    Raises:
        ValueError: if either is out of range.
    """
    if agents < 0 or not 0 < confidence < 1:
        raise ValueError(f"{agents} agents or confidence {confidence} is out of range")
    return -math.expm1(math.log1p(-confidence) / agents) if agents else 1.0
