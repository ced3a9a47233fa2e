"""What a release has cost those whose texts and requests shaped it, counted through the releases that it grew from."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from ebbflow.cloud.distillation import private_account
from ebbflow.cloud.registry.tables import Distillation, Release


@dataclass(frozen=True)
class Costs:
    """Epsilons of a release, for its card."""

    feedback_epsilon: float = 0.0
    """Per user and window; windows do not add up here, the largest policy behind the release counts."""
    training_epsilon: float = 0.0
    """Of all private training behind the release, for a text that was in all of it."""
    training_delta: float = 0.0


def costs(session: Session, job: Distillation) -> Costs:
    """Adds up private training along the chain of base releases, the job's own included."""
    trainings = []
    at: Distillation | None = job
    while at is not None:
        if at.private_corpus_sha256:
            trainings.append(private_account.read(at.private_training))
        at = _before(session, at)
    total = private_account.together(trainings)
    return Costs(job.feedback_epsilon, total.epsilon, total.delta)


def _before(session: Session, job: Distillation) -> Distillation | None:
    base = session.get(Release, (job.student_id, job.base_release)) if job.base_release else None
    return session.get(Distillation, base.distillation_id) if base else None
