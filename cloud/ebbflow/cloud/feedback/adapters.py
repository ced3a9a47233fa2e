"""Rounds of adapter updates: their plan, the average of what devices sent, and its way into a student's weights."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.registry.tables import Release
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import adapters
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.trust.manifest import Manifest

if TYPE_CHECKING:
    from ebbflow.common.student.model import Student

RANKS = (4, 2, 1)
"""Ranks that are tried where nobody says one."""
LOUD = 2.0
"""The largest rank is taken whose signal is so loud at best: a larger one learns more, a smaller one is heard sooner.

Measured (docs/how-to/learn-from-adapters.md): below it rank 1 gains more than rank 4, above it less.
"""
DEFAULT_MODULES = ("o_proj", "down_proj")
DEFAULT_CLIP_NORM = 1.0
DEFAULT_STEPS = 8
DEFAULT_BATCH_SIZE = 4
DEFAULT_SEQUENCE_LENGTH = 64
DEFAULT_LEARNING_RATE = 1.0

USERS_SPREAD = 2
"""An agent may have this many times the users that its operator expects before its update is cut."""
SIGMAS = 6.0
"""Standard deviations by which the norm of correct noise may exceed its mean: once in a thousand million batches."""
ORDINARY = 0.75
"""Share of the updates of a round that cannot all be hostile together."""
SIGNIFICANT = 5.0
"""Standard deviations from which the norm of the average tells more than noise."""


def config_of(session: Session, blobs: BlobStore, student_id: str, number: int) -> StudentConfig:
    """Returns the shape of a release, from its manifest.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND, BLOB_NOT_FOUND, FILE_CORRUPT.
    """
    release = session.get(Release, (student_id, number))
    found = [file["sha256"] for file in release.targets.values() if file["kind"] == "manifest"] if release else []
    if not found:
        message = f"there is no release students/{student_id}/releases/{number}"
        raise EbbflowError(Reason.RELEASE_NOT_FOUND, message)
    return StudentConfig.from_hf(dict(Manifest.from_json(blobs.read(found[0])).config))


def make_adapter_plan(
    settings: round_pb2.AdapterSettings, release: int, config: StudentConfig, policy: pb.PrivacyPolicy, cohort: int
) -> pb.AdapterPlan:
    """Completes what an operator asked for, and refuses a round that could say nothing.

    The round's mechanism is then `calibrate(epsilon, delta, rounds, sensitivity_squared=scale²)` of the policy, with
    `adapters.MIN_NULL_BINS` null bins.

    Args:
        settings: what to train; zeros take the defaults.
        release: number of the newest release, whose weights change.
        config: shape of that release, from `config_of`.
        policy: the student's complete policy.
        cohort: how many agents will answer.

    Raises:
        EbbflowError: STATE_CONFLICT if the policy does not allow adapters; INVALID_REQUEST if the student has no such
            layers or too many values would change; SIGNAL_TOO_WEAK, with the number of agents that are needed.
    """
    if not policy.allow_adapters:
        message = "the student's privacy policy does not allow adapter updates; its owner must sign one that does"
        raise EbbflowError(Reason.STATE_CONFLICT, message)
    unit_variance = variance_of(calibrate(policy.epsilon, policy.delta, policy.rounds_per_window))
    modules, users = list(settings.modules) or list(DEFAULT_MODULES), settings.users_per_agent or 1
    rank = settings.rank or _rank(config, modules, float(unit_variance), users, cohort)
    plan = pb.AdapterPlan(
        release=release,
        max_staleness=min(settings.max_staleness, release - 1),
        seed=release,  # anything public does; the next release has other matrices A and so learns in other directions
        rank=rank,
        modules=modules,
        dimension=_dimension(config, modules, rank),
        clip_norm=settings.clip_norm or DEFAULT_CLIP_NORM,
        scale=adapters.choose_scale(unit_variance),
        steps=settings.steps or DEFAULT_STEPS,
        batch_size=settings.batch_size or DEFAULT_BATCH_SIZE,
        sequence_length=settings.sequence_length or DEFAULT_SEQUENCE_LENGTH,
        learning_rate=settings.learning_rate or DEFAULT_LEARNING_RATE,
        users_per_agent=users,
    )
    _check_signal(plan, float(unit_variance), cohort)
    return plan


def _rank(config: StudentConfig, modules: Collection[str], unit_variance: float, users: int, cohort: int) -> int:
    """Returns the largest rank whose signal would be loud, otherwise the smallest."""
    for rank in RANKS:
        size = max(1, adapters.dimension_of(config, modules, rank))
        if size <= adapters.MAX_DIMENSION and adapters.best_signal_to_noise(unit_variance, size, users, cohort) >= LOUD:
            return rank
    return RANKS[-1]


def _dimension(config: StudentConfig, modules: Collection[str], rank: int) -> int:
    unknown = sorted(set(modules) - set(adapters.MODULES))
    if unknown:
        message = f"there are no layers {unknown[0]!r:.40}; choose from {', '.join(adapters.MODULES)}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="adapter.modules")
    dimension = adapters.dimension_of(config, modules, rank)
    if dimension > adapters.MAX_DIMENSION:
        message = f"{dimension} values would change, and {adapters.MAX_DIMENSION} are the most: lower rank or modules"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="adapter.rank")
    return dimension


def _check_signal(plan: pb.AdapterPlan, unit_variance: float, cohort: int) -> None:
    users = plan.users_per_agent
    needed = adapters.agents_needed(unit_variance, plan.dimension, users)
    if cohort >= needed:
        return
    best = adapters.best_signal_to_noise(unit_variance, plan.dimension, users, cohort)
    message = (
        f"{cohort} agents of {users} users cannot be heard above the noise on {plan.dimension} values: at best the"
        f" average has {best:.2g} times the norm of its noise; {needed} such agents are needed"
    )
    raise EbbflowError(Reason.SIGNAL_TOO_WEAK, message, agents=cohort, agents_needed=needed)


@dataclass(frozen=True)
class Update:
    """One agent's noisy update."""

    agent_id: str
    base_release: int
    values: npt.NDArray[np.int64]
    """[dimension]"""


@dataclass(frozen=True)
class Average:
    """What updates have in common."""

    values: npt.NDArray[np.float32]
    """The average change of one user, shrunk by what is noise; [dimension]."""
    signal_to_noise: float
    agents: int
    limited: int
    """Updates that were cut to the largest norm that one agent may have."""


def staleness_weight(staleness: int) -> float:
    """Weight of an update to a release so many behind the newest (Nguyen et al., "FedBuff", AISTATS 2022)."""
    return 1 / math.sqrt(1 + staleness)


def largest_norm(plan: pb.RoundPlan) -> float:
    """Norm beyond which an update is cut: that of correct noise and of twice the users that were expected.

    Of signal + noise the square is signal² + noise² + 2·signal·(the noise in the signal's direction).
    """
    dimension, variance = plan.adapter.dimension, float(variance_of(plan.mechanism))
    signal = USERS_SPREAD * plan.adapter.users_per_agent * plan.adapter.scale
    noise_squared = variance * (dimension + SIGMAS * math.sqrt(2 * dimension))
    return math.sqrt(signal**2 + noise_squared + 2 * signal * SIGMAS * math.sqrt(variance))


def average_of(plan: pb.RoundPlan, updates: Iterable[Update]) -> Average:
    """Averages updates: stale ones weigh less, none outweighs the others, noise is shrunk away.

    Shrinking is the positive-part estimator of James and Stein (1961) towards no change: post-processing, and free.

    Args:
        plan: the round's plan.
        updates: those that were kept, iterated twice; updates to releases that the plan does not take are left out.
    """
    adapter, dimension = plan.adapter, plan.adapter.dimension
    variance, total = float(variance_of(plan.mechanism)), np.zeros(plan.adapter.dimension)
    weights: list[float] = []
    cut: list[bool] = []
    for weight, values, too_long in _within_norm(plan, updates):
        total += weight * values
        weights.append(weight)
        cut.append(too_long)
    if not weights:
        return Average(np.zeros(dimension, np.float32), 0.0, 0, 0)
    direction = total / max(float(np.linalg.norm(total)), 1e-12)
    along = np.array([float(values @ direction) for _, values, _ in _within_norm(plan, updates)])
    excess = _excess(along, math.sqrt(variance))
    total -= float(np.dot(weights, excess)) * direction
    noise_norm = math.sqrt(variance * dimension * sum(weight * weight for weight in weights))
    ratio = float(np.linalg.norm(total)) / noise_norm
    kept = max(0.0, 1 - (1 - 2 / dimension) / ratio**2) if ratio > 0 else 0.0
    step = adapter.clip_norm / adapter.scale
    shrunk = total * (kept * step / (sum(weights) * adapter.users_per_agent))
    limited = int(np.count_nonzero(np.array(cut) | (excess != 0)))
    return Average(shrunk.astype(np.float32), ratio, len(weights), limited)


def _within_norm(
    plan: pb.RoundPlan, updates: Iterable[Update]
) -> Iterator[tuple[float, npt.NDArray[np.float64], bool]]:
    """Yields weight and values of the updates that the plan takes, cut to the largest norm, and whether one was cut."""
    adapter, most = plan.adapter, largest_norm(plan)
    for update in updates:
        staleness = adapter.release - update.base_release
        if update.base_release and 0 <= staleness <= adapter.max_staleness:
            norm = float(np.linalg.norm(update.values))
            values = update.values.astype(np.float64) * min(1.0, most / max(norm, 1.0))
            yield staleness_weight(staleness), values, norm > most


def _excess(along: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    """How far updates stand out in the direction of their sum.

    Along one line noise is small, so that an update which pushes the sum its own way shows there though its norm is
    that of any other. Allowed is what the middle update says, give or take the noise and the larger of two: as much
    again (a device may have twice the users), and what three of four stay within (many devices may have no users).
    """
    middle = float(np.median(along))
    spread = max(abs(middle), float(np.quantile(np.abs(along - middle), ORDINARY))) + SIGMAS * sigma
    return along - np.clip(along, middle - spread, middle + spread)


def is_informative(signal_to_noise: float, dimension: int) -> bool:
    """Whether an average's norm is larger than noise alone has but once in some hundred thousand rounds."""
    return signal_to_noise**2 > 1 + SIGNIFICANT * math.sqrt(2 / dimension)


def aggregate_updates(plan: pb.RoundPlan, average: Average, blobs: BlobStore) -> round_pb2.Aggregate:
    """Stores the average of a round's updates as a blob, and says what it is worth.

    Args:
        plan: the round's plan.
        average: from `updates.average_rows`.
        blobs: where it goes.

    Raises:
        EbbflowError: DISK_FULL.
    """
    blob = blobs.put([average.values.astype("<f4").tobytes()])
    return round_pb2.Aggregate(
        noise_std=math.sqrt(average.agents * variance_of(plan.mechanism)),
        informative=is_informative(average.signal_to_noise, plan.adapter.dimension),
        batches=average.agents,
        limited_batches=average.limited,
        adapter=round_pb2.AdapterAggregate(
            blob_sha256=bytes.fromhex(blob.sha256),
            release=plan.adapter.release,
            agents=average.agents,
            signal_to_noise=average.signal_to_noise,
            norm=float(np.linalg.norm(average.values)),
        ),
    )


def check_usable(aggregate: round_pb2.Aggregate) -> None:
    """Refuses the average of a round that says no more than noise.

    Raises:
        EbbflowError: SIGNAL_TOO_WEAK; STATE_CONFLICT if the round was not of adapter updates, or is not closed.
    """
    if not aggregate.HasField("adapter"):
        message = "the round has no adapter updates: it asked for votes, or is not closed"
        raise EbbflowError(Reason.STATE_CONFLICT, message)
    if not aggregate.informative:
        found = aggregate.adapter.signal_to_noise
        message = f"the round's average has {found:.2f} times the norm of noise: that is noise, and nothing to learn"
        raise EbbflowError(Reason.SIGNAL_TOO_WEAK, message)


def apply(student: "Student", average: bytes, plan: pb.AdapterPlan) -> None:
    """Adds an average change to a student's weights, no more of it than one user may change.

    Args:
        student: of the release that the plan names; changed in place.
        average: content of the aggregate's blob.
        plan: what was trained.

    Raises:
        EbbflowError: FILE_CORRUPT if the blob does not hold the plan's values; PLAN_INVALID if the student has another
            shape.
    """
    import torch

    from ebbflow.common.student.lora import merge

    adapters.check_fits(plan, student.config)
    if len(average) != 4 * plan.dimension:
        raise EbbflowError(Reason.FILE_CORRUPT, f"the average change does not hold {plan.dimension} values")
    values_D = torch.from_numpy(np.frombuffer(average, "<f4").astype(np.float32))
    if not bool(values_D.isfinite().all()):
        raise EbbflowError(Reason.FILE_CORRUPT, "the average change holds values that are not finite")
    norm = float(values_D.norm())
    merge(student, values_D * min(1.0, plan.clip_norm / max(norm, 1e-12)), plan.modules, plan.rank, plan.seed)
