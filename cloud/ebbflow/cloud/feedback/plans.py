"""Makes a round's plan out of a student's policy and bins, and signs it."""

import datetime as dt
import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message
from securesystemslib.signer import Signer

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import corpus
from ebbflow.cloud.release import keys
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import adapters
from ebbflow.common.privacy.calibration import calibrate
from ebbflow.common.privacy.plans import MAX_BINS, MAX_TEXTS_PER_BIN, MIN_NULL_BINS, check_plan
from ebbflow.common.privacy.vector import plan_sensitivity_squared
from ebbflow.common.privacy.windows import window_name

TEXT_CHARACTERS = 240
TEXTS = 1_500
"""Texts of a plan at most, which keeps it far below the limit of a message: bins share them when there are many."""
DEFAULT_MAX_USERS = 1000
DEFAULT_NEAR_MICRO = 300_000
"""Least cosine that counts as near, in millionths."""


class PlanSigner:
    """Signs plans with the key that the TUF targets role delegates "feedback" to."""

    def __init__(self, signer: Signer) -> None:
        """Takes any signer of securesystemslib."""
        self._signer = signer

    @classmethod
    def load(cls, path: Path) -> "PlanSigner":
        """Reads the key from a PEM file such as "keys/feedback.pem".

        Raises:
            EbbflowError: NOT_INITIALISED, FILE_CORRUPT.
        """
        return cls(keys.load(path.parent, path.stem))

    @property
    def key_id(self) -> str:
        """Id of the key."""
        return str(self._signer.public_key.keyid)

    def sign(self, plan: pb.RoundPlan) -> pb.SignedPlan:
        """Serialises a plan and signs these very bytes."""
        data, signature, key_id = self._sign(plan)
        return pb.SignedPlan(plan=data, signature=signature, key_id=key_id)

    def sign_policy(self, document: pb.PolicyDocument) -> pb.SignedPolicy:
        """Serialises a policy and signs these very bytes."""
        data, signature, key_id = self._sign(document)
        return pb.SignedPolicy(document=data, signature=signature, key_id=key_id)

    def _sign(self, message: Message) -> tuple[bytes, bytes, str]:
        data = message.SerializeToString(deterministic=True)
        signature = self._signer.sign(data)
        return data, bytes.fromhex(signature.signature), signature.keyid


def texts_per_bin(topics: int) -> int:
    """Returns how many texts describe each topic at most: the more they are, the more votes land where they belong."""
    return min(MAX_TEXTS_PER_BIN, max(1, TEXTS // topics))


def read_bins(blobs: BlobStore, corpus_sha256: str, topics: Sequence[str]) -> list[pb.Bin]:
    """Makes one bin of each topic, with public texts of the corpus: its "bin" split, else its "train".

    Where there are too many, those with the smallest hashes are taken, so that a corpus in some order does not show one
    side of a topic alone.

    Reads the whole corpus as a stream; call it before the transaction that opens the round.

    Raises:
        EbbflowError: BLOB_NOT_FOUND, CORPUS_INVALID; STATE_CONFLICT if there are more topics than a plan can hold, or
            none.
    """
    if not 1 <= len(topics) <= MAX_BINS:
        message = f"a round needs 1 to {MAX_BINS} topics, and the student's corpus has {len(topics)}"
        raise EbbflowError(Reason.STATE_CONFLICT, message)
    most = texts_per_bin(len(topics))
    proper, spare = ({topic: _Shelf(most) for topic in topics} for _ in range(2))
    shelves = {"bin": proper, "train": spare}
    for text in corpus.stream(blobs, corpus_sha256):
        shelf = shelves.get(text.split, {}).get(text.topic)
        if shelf is not None:
            shelf.add(text.text[:TEXT_CHARACTERS])
    texts = {topic: proper[topic].texts or spare[topic].texts for topic in topics}
    return [pb.Bin(bin_id=topic, texts=texts[topic]) for topic in topics if texts[topic]]


class _Shelf:
    """The texts of a topic with the smallest hashes: a fair choice of them, whatever their order."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[int, str]] = []  # largest hash first

    def add(self, text: str) -> None:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        heapq.heappush(self._heap, (-int.from_bytes(digest), text))
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)

    @property
    def texts(self) -> list[str]:
        return [text for _, text in sorted(self._heap, reverse=True)]


@dataclass(frozen=True)
class Timing:
    """When a round takes batches, and what they are about.

    Attributes:
        now: when it opens.
        duration: how long batches are taken.
        lookback: how far back interactions may lie.
    """

    now: dt.datetime
    duration: dt.timedelta
    lookback: dt.timedelta


def make_plan(
    round_id: str,
    student_id: str,
    signed_policy: pb.SignedPolicy,
    bins: Sequence[pb.Bin],
    timing: Timing,
    *,
    metrics: Sequence[pb.Metric] = (),
    max_users: int = DEFAULT_MAX_USERS,
    measure: "pb.RoundPlan.Measure.ValueType" = pb.RoundPlan.MEASURE_UNSPECIFIED,
    near_micro: int = DEFAULT_NEAR_MICRO,
    adapter: pb.AdapterPlan | None = None,
) -> pb.RoundPlan:
    """Makes a plan whose noise gives the policy's epsilon, and checks it as agents will.

    With an `adapter` it asks for updates of that adapter and for no votes, so that `bins` and `metrics` are empty.

    Raises:
        EbbflowError: INVALID_REQUEST if the policy or the timing is out of range, PLAN_INVALID if the bins are.
    """
    policy = pb.PolicyDocument.FromString(signed_policy.document).policy
    longest = dt.timedelta(days=policy.window_days)
    for field, value in (("duration", timing.duration), ("lookback", timing.lookback)):
        if not dt.timedelta() < value <= longest:
            message = f"{field} must be above zero and at most {policy.window_days} days, a window of the policy"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field=field)
    end = timing.now + timing.duration
    plan = pb.RoundPlan(
        round=names.make("rounds", round_id),
        student=names.make("students", student_id),
        bins=bins,
        null_bins=adapters.MIN_NULL_BINS if adapter else MIN_NULL_BINS,
        metrics=metrics,
        policy=policy,
        window=window_name(end, policy.window_days),
        max_users=max_users,
        signed_policy=signed_policy,
        adapter=adapter,
        measure=measure,
        near_micro=near_micro if any(metric.kind == pb.Metric.KIND_NEAR for metric in metrics) else 0,
    )
    sensitivity = plan_sensitivity_squared(plan)
    plan.mechanism.CopyFrom(calibrate(policy.epsilon, policy.delta, policy.rounds_per_window, sensitivity))
    plan.start_time.FromDatetime(timing.now - timing.lookback)
    plan.end_time.FromDatetime(end)
    check_plan(plan)
    return plan
