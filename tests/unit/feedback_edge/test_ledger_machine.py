"""Whatever happens to a device and in whatever order: nothing is spent twice, no charge is lost, no cap is passed.

The cloud here asks as often as it likes, answers are lost, the disk is wiped or restored, the clock jumps, threads
race. What the cloud has received is the truth that every claim is held against.
"""

import datetime as dt
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from feedback_world import NOW, SIGNER, signed_policy
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import with_lifetime
from ebbflow.common.privacy.composition import within
from ebbflow.common.privacy.vector import Contribution
from ebbflow.common.privacy.windows import window_end, window_name, window_start
from ebbflow.edge.feedback.plans import Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)
STUDENTS = ("faq", "poetry")
POLICIES = [
    with_lifetime(pb.PrivacyPolicy(epsilon=2.0, rounds_per_window=3), 3.5),
    with_lifetime(pb.PrivacyPolicy(epsilon=3.0, rounds_per_window=3, window_days=31), 4.0),
    with_lifetime(pb.PrivacyPolicy(epsilon=1.0, rounds_per_window=2), 0.0),
]
CEILING = Ceiling(epsilon=3.0, lifetime_epsilon=5.0)
KEYS = {SIGNER.public_key.keyid: SIGNER.public_key}
DECLINED = {Reason.BUDGET_EXHAUSTED, Reason.LIFETIME_EXHAUSTED, Reason.ROUND_CLOSED, Reason.PLAN_INVALID}


@dataclass(frozen=True)
class Received:
    """A batch that has reached the cloud."""

    plan: pb.RoundPlan
    data: bytes

    @property
    def end(self) -> dt.datetime:
        return self.plan.end_time.ToDatetime(dt.UTC)

    def charge(self) -> pb.MirroredCharge:
        plan = self.plan
        charge = pb.MirroredCharge(
            round=plan.round, student=plan.student, window=plan.window, rho_nano=plan.mechanism.rho_nano
        )
        charge.end_time.CopyFrom(plan.end_time)
        return charge


def spent(costs: Counter[int]) -> int:
    return sum(cost * rounds for cost, rounds in costs.items())


class Device(RuleBasedStateMachine):
    """A device whose disk, clock and line are anything but reliable, and a cloud that wants all it can get."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ledger"))
        self.path = self.folder / "agent.db"
        self.store = FeedbackStore(self.path)
        self.plans: list[pb.SignedPlan] = []
        self.received: dict[str, Received] = {}
        self.backups: list[Path] = []
        self.known: set[str] = set()
        self.now, self.skew = NOW, dt.timedelta()
        self.rounds = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @property
    def clock(self) -> dt.datetime:
        return self.now + self.skew

    # The cloud

    @rule(student=st.sampled_from(STUDENTS), version=st.integers(1, len(POLICIES)), days=st.sampled_from([1, 6]))
    def open_round(self, student: str, version: int, days: int) -> None:
        policy = signed_policy(POLICIES[version - 1], student, version=version)
        bins = [pb.Bin(bin_id="files", texts=["files"])]
        plan = make_plan(f"r{self.rounds}", student, policy, bins, Timing(self.now, days * DAY, DAY))
        self.rounds += 1
        self.plans.append(PlanSigner(SIGNER).sign(plan))

    @rule(days=st.sampled_from([0.3, 2, 9, 31]))
    def time_passes(self, days: float) -> None:
        self.now += days * DAY

    # The device

    @rule(last=st.integers(0, 6), sends=st.booleans(), lost=st.booleans())
    def look(self, last: int, *, sends: bool, lost: bool) -> None:
        """Takes over what the cloud knows of, answers what is open, hands in what waits; may end before that."""
        self.take_over()
        for plan in self.plans[len(self.plans) - last :]:
            self.answer(plan)
        if sends:
            self.send(lost=lost)

    def take_over(self) -> None:
        self.store.take_over([batch.charge() for batch in self.received.values()], self.clock)
        self.known |= set(self.received)

    def answer(self, signed: pb.SignedPlan) -> None:
        plan = pb.RoundPlan.FromString(signed.plan)
        before = self.store.has_answered(plan.round)
        if self.released(self.store, signed) is not None:
            self.known.add(plan.round)
            if not before:
                self.check_cap(plan)

    def released(self, store: FeedbackStore, signed: pb.SignedPlan) -> bytes | None:
        try:
            admitted = admit(signed, KEYS, CEILING, self.clock)
            return store.release_batch(admitted, [Contribution(0)], lambda data: data[:8], self.clock)
        except EbbflowError as error:
            if error.reason not in DECLINED:
                raise
            return None

    def check_cap(self, plan: pb.RoundPlan) -> None:
        """What was received and what waits together stay within the caps of the plan that was answered last."""
        policy = plan.policy
        costs = self.costs(window_start(plan.window), window_end(plan.window, policy.window_days), plan.student)
        assert spent(costs) <= policy.rho_cap_nano
        assert within(costs, policy.epsilon, policy.delta)
        if policy.lifetime_rho_cap_nano:
            assert spent(self.costs(None, None, plan.student)) <= policy.lifetime_rho_cap_nano

    def costs(
        self, start: dt.datetime | None, end: dt.datetime | None, student: str | None = None, *, waits: bool = True
    ) -> Counter[int]:
        """By the cloud's books and the outbox, and not by the account that is being tested."""
        plans = {name: batch.plan for name, batch in self.received.items()}
        waiting = {batch.round for batch in self.store.pending(NOW - 999 * DAY)} if waits else set()
        asked = {plan.round: plan for plan in (pb.RoundPlan.FromString(signed.plan) for signed in self.plans)}
        plans |= {name: asked[name] for name in waiting}
        return Counter(
            plan.mechanism.rho_nano
            for plan in plans.values()
            if (student is None or plan.student == student)
            and (start is None or start <= plan.end_time.ToDatetime(dt.UTC))
            and (end is None or plan.end_time.ToDatetime(dt.UTC) < end)
        )

    def send(self, *, lost: bool) -> None:
        """Hands in what waits; `lost` loses the cloud's answers."""
        asked = {plan.round: plan for plan in (pb.RoundPlan.FromString(signed.plan) for signed in self.plans)}
        for waiting in self.store.pending(self.clock):
            before = self.received.setdefault(waiting.round, Received(asked[waiting.round], waiting.signed_batch))
            assert before.data == waiting.signed_batch, "a round left the device twice, with other noise"
            if not lost:
                self.store.mark_sent(waiting.batch_id)

    @rule()
    def answer_in_threads(self) -> None:
        """As two processes do: over connections of their own, the same plans in another order."""
        self.take_over()
        other = FeedbackStore(self.path)
        answers: dict[str, set[bytes]] = {}

        def work(store: FeedbackStore, plans: list[pb.SignedPlan]) -> None:
            for signed in plans:
                data = self.released(store, signed)
                if data is not None:
                    answers.setdefault(pb.RoundPlan.FromString(signed.plan).round, set()).add(data)

        plans = self.plans[-4:]
        threads = [threading.Thread(target=work, args=each) for each in ((self.store, plans), (other, plans[::-1]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other.close()
        assert all(len(found) == 1 for found in answers.values())
        self.known |= set(answers)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = FeedbackStore(self.path)

    @rule(days=st.sampled_from([-40, -1, 0, 0, 0.5, 40]))
    def set_clock(self, days: float) -> None:
        self.skew = days * DAY

    @rule()
    def clean_up(self) -> None:
        self.store.apply_retention(self.now)

    @rule()
    def back_up(self) -> None:
        self.store.close()
        self.backups.append(Path(shutil.copy(self.path, self.folder / f"backup-{len(self.backups)}")))
        self.store = FeedbackStore(self.path)

    @precondition(lambda self: self.backups)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        self.replace(lambda: shutil.copy(data.draw(st.sampled_from(self.backups)), self.path))

    @rule()
    def lose_the_disk(self) -> None:
        self.replace(lambda: None)

    def replace(self, put: Callable[[], object]) -> None:
        self.store.close()
        for file in self.folder.glob("agent.db*"):
            file.unlink()
        put()
        self.store = FeedbackStore(self.path)
        self.known = set()

    # What must always hold

    @invariant()
    def no_charge_is_lost(self) -> None:
        assert all(self.store.has_answered(round_) for round_ in self.known)

    @invariant()
    def no_cap_of_the_device_is_passed(self) -> None:
        for window in {window_name(batch.end, CEILING.window_days) for batch in self.received.values()}:
            costs = self.costs(window_start(window), window_end(window, CEILING.window_days), waits=False)
            assert spent(costs) <= CEILING.rho_cap_nano
            assert within(costs, CEILING.epsilon, CEILING.delta)
        ever = self.costs(None, None, waits=False)
        assert spent(ever) <= CEILING.lifetime_nano
        assert within(ever, CEILING.lifetime_epsilon + 1e-7, CEILING.delta)

    @invariant()
    def the_account_is_what_it_says(self) -> None:
        accounts = self.store.accounts()
        assert sum(account.rho_spent_nano for account in accounts) == self.store.lifetime_spent_nano()
        assert sum(account.entries for account in accounts) >= len(self.known)


class ManyDevices(Device):
    """The same, for lives that are long and come by the hundred."""


_EVERYTHING = settings(deadline=None, suppress_health_check=list(HealthCheck))
TestDevice = Device.TestCase
TestDevice.settings = settings(_EVERYTHING, max_examples=20, stateful_step_count=25)
TestManyDevices = pytest.mark.slow(ManyDevices.TestCase)
TestManyDevices.settings = settings(_EVERYTHING, max_examples=400, stateful_step_count=60)
