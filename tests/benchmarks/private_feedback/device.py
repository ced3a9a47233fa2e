"""What a round costs a device: its CPU, and the bytes up and down, on the real store."""

import datetime as dt
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from private_feedback.fleet import USERS
from private_feedback.requests import Requests
from private_feedback.rounds import NOW, SIGNER, make_bins, plan_of

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.common.identity import keys
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.feedback.plans import Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

REQUESTS_PER_USER = 50
REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """Of one round on one agent."""

    bytes_up: int
    bytes_down: int
    cpu_s: float


def measure(requests: Requests, tokenizer: Tokenizer) -> Cost:
    """Answers a round about all intents with 20 users of 50 requests each; the median of five fresh stores."""
    plan = plan_of(make_bins(requests.public, lambda request: request.intent), 4.0)
    signed = PlanSigner(SIGNER).sign(plan)
    costs = [_answer(requests, tokenizer, signed) for _ in range(REPEATS)]
    return Cost(costs[0][0], signed.ByteSize(), statistics.median(cpu_s for _, cpu_s in costs))


def _answer(requests: Requests, tokenizer: Tokenizer, signed: pb.SignedPlan) -> tuple[int, float]:
    """Returns the bytes of the batch, and the CPU seconds from the plan to the stored batch."""
    key = keys.generate_key()
    with tempfile.TemporaryDirectory() as folder:
        store = FeedbackStore(Path(folder) / "agent.db")
        _use(store, requests)
        begin_s = time.process_time()
        admitted = admit(signed, {SIGNER.public_key.keyid: SIGNER.public_key}, Ceiling(), NOW)
        texts = [text for bin_ in admitted.plan.bins for text in bin_.texts]
        contributions = store.contributions(admitted, Lexicon(texts, tokenizer.encode, tokenizer.size))
        batch = store.release_batch(admitted, contributions, lambda data: keys.sign(key, data), NOW)
        cpu_s = time.process_time() - begin_s
        store.close()
    if len(contributions) != USERS:
        raise RuntimeError(f"{len(contributions)} of {USERS} users voted")
    return len(batch), cpu_s


def _use(store: FeedbackStore, requests: Requests) -> None:
    """What users did in the week before."""
    for number in range(USERS * REQUESTS_PER_USER):
        asked = requests.asked[number % len(requests.asked)].text
        at = NOW - dt.timedelta(minutes=1 + number)
        id_ = store.record_interaction(
            "assistant", "students/assistant/releases/1", f"user {number % USERS}", asked, "answer", now=at
        )
        if number % 4 == 0:
            store.record_outcome(id_, rpb.OUTCOME_REJECTED)
