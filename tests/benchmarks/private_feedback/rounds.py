"""Rounds of bin reports by the code that ships: votes, noise, sums, and the mixture that follows."""

import datetime as dt
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from private_feedback.fleet import Fleet
from private_feedback.requests import Request, Requests
from securesystemslib.signer import CryptoSigner

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback.aggregate import aggregate, pool
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan, read_bins
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.shrinkage import shrink
from ebbflow.common.privacy.vector import Contribution, add_up, layout_of
from ebbflow.common.privacy.weights import weights
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.feedback.votes import Bins

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
SIGNER = CryptoSigner.generate_ed25519()

Mixture = dict[str, float]


def make_bins(public: Sequence[Request], topic_of: Callable[[Request], str]) -> list[pb.Bin]:
    """One bin of each topic, as the cloud makes them of a corpus."""
    lines = [json.dumps({"topic": topic_of(request), "text": request.text}).encode() for request in public]
    with tempfile.TemporaryDirectory() as folder:
        blobs = LocalBlobStore(Path(folder))
        corpus = blobs.put([b"\n".join(lines)]).sha256
        return read_bins(blobs, corpus, sorted({topic_of(request) for request in public}))


def plan_of(bins: Sequence[pb.Bin], epsilon: float) -> pb.RoundPlan:
    """The plan of a round at the default policy but for its epsilon."""
    document = pb.PolicyDocument(
        student="students/assistant", version=1, policy=complete_policy(pb.PrivacyPolicy(epsilon=epsilon))
    )
    timing = Timing(NOW, dt.timedelta(days=1), dt.timedelta(days=7))
    return make_plan("r1", "assistant", PlanSigner(SIGNER).sign_policy(document), bins, timing)


@dataclass(frozen=True)
class Outcome:
    """What the cloud makes of rounds."""

    mixture: Mixture
    informative: bool = True


@dataclass(frozen=True)
class Topics:
    """How requests are sorted into topics: by the device's lexicon, and by their labels."""

    bins: list[pb.Bin]
    voted: list[int | None]
    """Bin that the device finds for each request of `Requests.asked`."""
    failed: list[bool]
    """Whether the student that serves fails it."""
    truth_IK: npt.NDArray[np.float64]
    """One for the topic of each intent."""
    accuracy: float
    """Share of requests that the device sorts as their labels say."""

    @classmethod
    def sort(
        cls, requests: Requests, topic_of: Callable[[Request], str], tokenizer: Tokenizer, failed: list[bool]
    ) -> "Topics":
        """Sorts what is asked as agents do."""
        bins = make_bins(requests.public, topic_of)
        lexicon = Lexicon([text for bin_ in bins for text in bin_.texts], tokenizer.encode, tokenizer.size)
        nearest = Bins(bins, lexicon)
        voted = [nearest.nearest(request.text) for request in requests.asked]
        names = [bin_.bin_id for bin_ in bins]
        right = [
            vote is not None and names[vote] == topic_of(request)
            for vote, request in zip(voted, requests.asked, strict=True)
        ]
        topic = {request.intent: topic_of(request) for request in requests.public}
        truth_IK = np.array([[float(topic[intent] == name) for name in names] for intent in requests.intents])
        return cls(bins, voted, failed, truth_IK, sum(right) / len(right))

    def shares(self, demand_I: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What the topics' shares are by the labels."""
        found: npt.NDArray[np.float64] = demand_I @ self.truth_IK
        return found

    def contributions(self, votes: Sequence[int]) -> list[Contribution]:
        """One contribution for each of an agent's users."""
        sorted_ = ((self.voted[request], self.failed[request]) for request in votes)
        return [Contribution(bin_, failed) for bin_, failed in sorted_ if bin_ is not None]

    def private(self, fleet: Fleet, epsilon: float, rounds: int) -> Outcome:
        """So many rounds of a window with noise on every agent; where they tell noise alone they are not used."""
        plan = plan_of(self.bins, epsilon)
        found = pool(
            [
                aggregate(plan, (privatise(plan, self.contributions(votes)) for votes in agents))
                for agents in fleet.votes[:rounds]
            ]
        )
        if not found.informative:
            return self.even()
        return Outcome({bin_.bin_id: bin_.weight for bin_ in found.bins})

    def even(self) -> Outcome:
        """What is known without feedback."""
        return Outcome({bin_.bin_id: 1 / len(self.bins) for bin_ in self.bins}, informative=False)

    def unprotected(self, fleet: Fleet, rounds: int) -> Outcome:
        """The same votes without noise."""
        layout = layout_of(plan_of(self.bins, 1.0))
        users = [votes for agents in fleet.votes[:rounds] for votes in agents]
        sums = add_up(layout, (), [one for votes in users for one in self.contributions(votes)])
        found = weights(*shrink(layout.seen(sums), layout.failed(sums), 0.0))
        return Outcome(dict(zip([bin_.bin_id for bin_ in self.bins], found, strict=True)))

    def oracle(self, fleet: Fleet) -> Outcome:
        """What the labels of all that is asked say, no vote in the wrong bin."""
        found = weights(self.shares(fleet.demand_I).tolist(), [0.0] * len(self.bins))
        return Outcome(dict(zip([bin_.bin_id for bin_ in self.bins], found, strict=True)))
