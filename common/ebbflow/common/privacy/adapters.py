"""Adapter updates: which values of a student change, what one user may change of them, and when a sum says anything.

For some linear layers W [outputs, inputs] of the student a change B·A is learnt. A [rank, inputs] is made from a public
seed and never trained, so that the changes of many users add up: sum(B)·A is the sum of the changes (Sun et al.,
"Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024). The values of an update are the matrices
B [outputs, rank], row by row, one layer after the other in the student's order.

Neither torch nor numpy is needed here.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import GRID, variance_of
from ebbflow.common.privacy.gaussian import MAX_VARIANCE
from ebbflow.common.privacy.vector import AdapterContribution
from ebbflow.common.student.config import StudentConfig

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers that can change, by the last part of their names."""
MAX_DIMENSION = 1 << 16
"""Most values of an adapter: noise on more would drown any fleet, and a batch of them takes 200 KB."""
MIN_NULL_BINS = 256
"""So many find noise of sigma/1.4 in one batch: an adapter's values would be the cheapest place to save noise."""
MIN_SCALE = 16
MAX_SCALE = 1000
MIN_SIGNAL_TO_NOISE = 1.0
"""Below it most of the average is noise, even if all users pull in one direction with all their strength."""


@dataclass(frozen=True)
class Slot:
    """One layer's matrix B within the values of an adapter."""

    name: str
    """The layer's Hugging Face name, such as "model.layers.0.self_attn.q_proj"."""
    outputs: int
    inputs: int
    begin: int
    """Where its values begin."""
    end: int


def slots(config: StudentConfig, modules: Collection[str], rank: int) -> list[Slot]:
    """Returns where each layer's values are, in the student's order.

    Args:
        config: shape of the student.
        modules: the layers that change, of `MODULES`.
        rank: inner width of the change.
    """
    found: list[Slot] = []
    begin = 0
    for tensor, shape in config.tensor_shapes().items():
        name, _, kind = tensor.rpartition(".")
        if kind == "weight" and name.rpartition(".")[2] in modules:
            outputs, inputs = shape
            found.append(Slot(name, outputs, inputs, begin, begin + outputs * rank))
            begin += outputs * rank
    return found


def dimension_of(config: StudentConfig, modules: Collection[str], rank: int) -> int:
    """Number of values of an adapter."""
    return max((slot.end for slot in slots(config, modules, rank)), default=0)


def _within(value: float, least: float, most: float) -> bool:
    return math.isfinite(value) and least <= value <= most


def check_adapter(plan: pb.RoundPlan) -> None:
    """Refuses an adapter plan that no device could follow within reason, or whose numbers do not fit together.

    Whether `dimension` is that of the student, only those who know the student can check: `check_fits`.

    Raises:
        EbbflowError: PLAN_INVALID, with one word in `metadata["why"]`.
    """
    adapter = plan.adapter
    modules = list(adapter.modules)
    limits = (
        ("bins", not plan.bins and not plan.metrics, "a round of adapter updates has neither bins nor metrics"),
        ("null_bins", plan.null_bins >= MIN_NULL_BINS, f"{MIN_NULL_BINS} null bins are the least"),
        ("release", adapter.release >= 1 and adapter.max_staleness < adapter.release, "the releases make no sense"),
        ("rank", 1 <= adapter.rank <= 64, "the rank must be 1 to 64"),  # noqa: PLR2004 - said in words beside it
        ("modules", _are_modules(modules), "the layers must be some of " + ", ".join(MODULES)),
        ("dimension", 1 <= adapter.dimension <= MAX_DIMENSION, f"1 to {MAX_DIMENSION} values are possible"),
        ("clip_norm", _within(adapter.clip_norm, 1e-6, 1e3), "clip_norm must be 1e-6 to 1000"),
        ("scale", MIN_SCALE <= adapter.scale <= MAX_SCALE, f"the scale must be {MIN_SCALE} to {MAX_SCALE}"),
        ("steps", 1 <= adapter.steps <= 256, "there must be 1 to 256 steps"),  # noqa: PLR2004
        ("batch_size", 1 <= adapter.batch_size <= 64, "the batch size must be 1 to 64"),  # noqa: PLR2004
        ("sequence_length", 2 <= adapter.sequence_length <= 1024, "sequences must be 2 to 1024 tokens"),  # noqa: PLR2004
        ("learning_rate", _within(adapter.learning_rate, 1e-6, 1e3), "the learning rate must be 1e-6 to 1000"),
        ("users_per_agent", 1 <= adapter.users_per_agent <= plan.max_users, "users_per_agent must be 1 to max_users"),
    )
    for why, holds, message in limits:
        if not holds:
            raise EbbflowError(Reason.PLAN_INVALID, message, why=why)


def _are_modules(modules: Sequence[str]) -> bool:
    return bool(modules) and len(set(modules)) == len(modules) and set(modules) <= set(MODULES)


def check_fits(adapter: pb.AdapterPlan, config: StudentConfig) -> None:
    """Refuses a plan whose values are not those of a student of this shape.

    Raises:
        EbbflowError: PLAN_INVALID.
    """
    if dimension_of(config, adapter.modules, adapter.rank) != adapter.dimension:
        message = f"the student has not {adapter.dimension} values to change"
        raise EbbflowError(Reason.PLAN_INVALID, message, why="dimension")


def quantise(change: Sequence[float], clip_norm: float, scale: int) -> AdapterContribution:
    """Clips one user's change to `clip_norm` and rounds it towards zero to steps of clip_norm / scale.

    Rounding towards zero makes no value larger, so that the norm of the whole numbers is at most `scale`. A change that
    is not finite adds nothing: one user's numbers must not decide whether the device reports.

    Args:
        change: trained values.
        clip_norm: largest L2 norm.
        scale: whole number that `clip_norm` becomes.
    """
    norm = math.hypot(*change)
    if not math.isfinite(norm):
        return AdapterContribution((0,) * len(change))
    factor = scale / max(norm, clip_norm)
    values = [math.trunc(value * factor) for value in change]
    while sum(value * value for value in values) > scale * scale:  # a float's last bit; one more step down is enough
        factor = math.nextafter(factor, 0.0) * (1 - 1e-9)
        values = [math.trunc(value * factor) for value in change]
    return AdapterContribution(tuple(values))


def choose_scale(unit_variance: Fraction) -> int:
    """Returns the finest scale for which the sampler makes the noise.

    Args:
        unit_variance: variance of the noise for a sensitivity of 1.

    Raises:
        EbbflowError: INVALID_REQUEST if even the coarsest needs more noise than the sampler makes.
    """
    # A list gets a twelfth besides what goes by its sensitivity (`composition.variance_for`).
    most = MAX_VARIANCE - Fraction(1, 12) - Fraction(2, GRID)
    scale = min(MAX_SCALE, math.isqrt(math.floor(most / (unit_variance + Fraction(1, 12)))))
    if scale < MIN_SCALE:
        message = "adapter updates under so strict a policy need more noise than the sampler makes"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="adapter")
    return scale


def best_signal_to_noise(unit_variance: float, dimension: int, users_per_agent: int, agents: int) -> float:
    """Norm of the average over that of its noise, if all users pull in one direction with all their strength.

    Each agent adds noise to its values once, however many users it has: the sum of U·M users' changes has at most the
    norm U·M (in units of the clip norm), that of the noise is sigma·sqrt(M·dimension).
    """
    return users_per_agent * math.sqrt(agents / (unit_variance * dimension))


def agents_needed(
    unit_variance: float, dimension: int, users_per_agent: int, signal_to_noise: float = MIN_SIGNAL_TO_NOISE
) -> int:
    """How many agents an average needs whose norm is `signal_to_noise` times that of its noise, in the best case."""
    return max(1, math.ceil(signal_to_noise**2 * unit_variance * dimension / users_per_agent**2))


def unit_variance_of(plan: pb.RoundPlan) -> Fraction:
    """Variance of a plan's noise for a sensitivity of 1."""
    return variance_of(plan.mechanism) / plan.mechanism.sensitivity_squared
