"""What escalating pays: quality against the share of questions that leave the device. No IO."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

BINS = 10


@dataclass(frozen=True)
class Asked:
    """One question: how sure the student was, and who answers it rightly."""

    confidence: float
    mean: float
    """Confidence by all tokens of the answer rather than by the least sure tenth."""
    student_right: bool
    teacher_right: bool


def quality(asked: Sequence[Asked], share: float) -> float:
    """Share of right answers if that share of the questions, the least sure first, goes to the teacher."""
    ranked = sorted(asked, key=lambda each: each.confidence)
    count = round(share * len(ranked))
    right = sum(each.teacher_right for each in ranked[:count]) + sum(each.student_right for each in ranked[count:])
    return right / len(ranked)


def at_threshold(asked: Sequence[Asked], threshold: float) -> tuple[float, float]:
    """Share that leaves the device under a threshold, and the share of right answers then."""
    share = sum(each.confidence < threshold for each in asked) / len(asked)
    return share, quality(asked, share)


def random_quality(asked: Sequence[Asked], share: float) -> float:
    """The same if chance decides who goes."""
    return (1 - share) * quality(asked, 0.0) + share * quality(asked, 1.0)


def best_quality(asked: Sequence[Asked], share: float) -> float:
    """The same for who knows beforehand where the teacher helps."""
    return quality([replace(each, confidence=each.student_right - each.teacher_right) for each in asked], share)


def by_mean(asked: Sequence[Asked]) -> list[Asked]:
    """The same questions, each judged by all tokens of its answer."""
    return [replace(each, confidence=each.mean) for each in asked]


def gained(asked: Sequence[Asked]) -> float:
    """Area between the curve and chance as a share of that between the best and chance: 1 is perfect, 0 chance."""
    shares = np.linspace(0, 1, 101)
    ours, chance, best = (
        np.trapezoid([curve(asked, share) for share in shares], shares)
        for curve in (quality, random_quality, best_quality)
    )
    return float((ours - chance) / (best - chance))


def calibration_error(said: npt.NDArray[np.float64], hits: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error over ten bins: how far off what is said is from what is true, on average."""
    places = np.minimum((said * BINS).astype(int), BINS - 1)
    gaps = [
        abs(said[places == bin_].mean() - hits[places == bin_].mean()) * (places == bin_).sum()
        for bin_ in range(BINS)
        if (places == bin_).any()
    ]
    return float(sum(gaps) / len(said))
