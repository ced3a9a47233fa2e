"""Adapter updates by the code that ships: what a round of them brings, and where it is refused."""

import copy
import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from private_feedback.fleet import USERS
from private_feedback.rounds import NOW, SIGNER
from private_feedback.students import School

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.distillation.mixture import encode_documents
from ebbflow.cloud.feedback import adapters
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import AdapterContribution
from ebbflow.common.student.model import Student
from ebbflow.edge.feedback.adapters import Trainer

Demand = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What came of a round of adapter updates.

    Attributes:
        agents: of the fleet, with 20 users each.
        epsilon: of a window of four rounds.
        refusal: why the cloud opened no round; empty if it did.
        nats_before: of the student that serves, per token of what the fleet will ask.
        nats: of the student with the noisy average; None where there is none.
        nats_without_noise: of the student with the average as it is.
        signal_to_noise: of the average.
        informative: whether the cloud uses it.
        cpu_s: of one agent, for training.
        bytes_up: of one agent's batch.
    """

    agents: int
    epsilon: float
    nats_before: float
    refusal: str = ""
    nats: float | None = None
    nats_without_noise: float | None = None
    signal_to_noise: float | None = None
    informative: bool = False
    cpu_s: float | None = None
    bytes_up: int | None = None


def play(
    school: School, base: Student, demand_I: Demand, texts: Sequence[Sequence[str]], epsilon: float, release: int = 1
) -> Found:
    """Plays one round.

    Args:
        school: measures students.
        base: the student that serves.
        demand_I: what the fleet asks.
        texts: what each user has typed, user after user and agent after agent.
        epsilon: of the policy.
        release: number of the student's release; seeds the adapter.
    """
    agents, before = len(texts) // USERS, school.nats_per_token(school.nats(base), demand_I)
    try:
        plan = _plan(base, epsilon, agents, release)
    except EbbflowError as error:
        if error.reason is not Reason.SIGNAL_TOO_WEAK:
            raise
        return Found(agents, epsilon, before, refusal=str(error))
    begin_s = time.process_time()
    trainer = Trainer(copy.deepcopy(base), plan.adapter)
    changes = [trainer.change(encode_documents(school.tokenizer, mine)) for mine in texts]
    cpu_s = (time.process_time() - begin_s) / agents
    average, bytes_up = _release(plan, changes)

    def after(values: npt.NDArray[np.floating]) -> float:
        student = copy.deepcopy(base)
        adapters.apply(student, values.astype("<f4").tobytes(), plan.adapter)
        return school.nats_per_token(school.nats(student), demand_I)

    exact = np.sum([change.values for change in changes], axis=0) / len(changes)
    return Found(
        agents=agents,
        epsilon=epsilon,
        nats_before=before,
        nats=after(average.values),
        nats_without_noise=after(exact * (plan.adapter.clip_norm / plan.adapter.scale)),
        signal_to_noise=average.signal_to_noise,
        informative=adapters.is_informative(average.signal_to_noise, plan.adapter.dimension),
        cpu_s=cpu_s,
        bytes_up=bytes_up,
    )


def _plan(base: Student, epsilon: float, agents: int, release: int) -> pb.RoundPlan:
    policy = complete_policy(pb.PrivacyPolicy(epsilon=epsilon, allow_adapters=True))
    settings = round_pb2.AdapterSettings(users_per_agent=USERS)
    adapter = adapters.make_adapter_plan(settings, release, base.config, policy, agents)
    document = pb.PolicyDocument(student="students/assistant", version=1, policy=policy)
    timing = Timing(NOW, dt.timedelta(days=1), dt.timedelta(days=7))
    return make_plan("r1", "assistant", PlanSigner(SIGNER).sign_policy(document), [], timing, adapter=adapter)


def _release(plan: pb.RoundPlan, changes: Sequence[AdapterContribution]) -> tuple[adapters.Average, int]:
    """The average of what agents send, and the bytes of one of them."""
    reports = [privatise(plan, changes[begin : begin + USERS]) for begin in range(0, len(changes), USERS)]
    size = pb.FeedbackBatch(noisy=reports[0]).ByteSize()
    values = (np.array(report[: plan.adapter.dimension], np.int64) for report in reports)
    updates = [adapters.Update(str(agent), plan.adapter.release, row) for agent, row in enumerate(values)]
    return adapters.average_of(plan, updates), size
