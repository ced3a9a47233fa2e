"""Distillations."""

from collections.abc import Sequence

from ebbflow.api.v1 import distillation_pb2 as pb
from ebbflow.cloud.distillation import private_account
from ebbflow.cloud.registry.tables import Distillation, DistillationState
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names

STATES = {
    DistillationState.QUEUED: pb.Distillation.STATE_QUEUED,
    DistillationState.RUNNING: pb.Distillation.STATE_RUNNING,
    DistillationState.SUCCEEDED: pb.Distillation.STATE_SUCCEEDED,
    DistillationState.FAILED: pb.Distillation.STATE_FAILED,
    DistillationState.CANCELLED: pb.Distillation.STATE_CANCELLED,
}


def distillation(row: Distillation) -> pb.Distillation:
    """A distillation; the hash of its private texts stays here."""
    return pb.Distillation(
        name=names.make("distillations", row.id),
        student=names.make("students", row.student_id),
        state=STATES[row.state],
        recipe=from_json(row.recipe, pb.Recipe),
        base_release=names.release(row.student_id, row.base_release) if row.base_release else "",
        round=names.make("rounds", row.round_id) if row.round_id else "",
        mixture=row.mixture,
        step=row.step,
        loss=row.loss,
        tokens_per_second=row.tokens_per_second,
        eta_time=timestamp(row.eta_time),
        attempt=row.attempt,
        release=names.release(row.student_id, row.release_number) if row.release_number else "",
        error=row.error,
        create_time=timestamp(row.create_time),
        update_time=timestamp(row.update_time),
        population=row.population,
        population_share=row.population_share,
        adapter_round=names.make("rounds", row.adapter_round_id) if row.adapter_round_id else "",
        private_training=from_json(row.private_training, pb.PrivateTraining) if row.private_corpus_sha256 else None,
        private_corpus_delete_time=timestamp(row.private_corpus_delete_time),
    )


def account(runs: Sequence[private_account.Run]) -> pb.PrivateAccount:
    """What runs on the same private texts cost together. Takes a tenth of a second for each."""
    total = private_account.together(run.training for run in runs)
    listed = [names.make("distillations", run.name) for run in runs]
    return pb.PrivateAccount(distillations=listed, epsilon=total.epsilon, delta=total.delta)
