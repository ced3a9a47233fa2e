"""An agent's part in rounds beside a cloud that holds the feedback key and does as it likes."""

import asyncio
import datetime as dt
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapter_world import adapter_plan, config, policy, round_plan
from agent_support import until
from feedback_world import NOW, SIGNER, signed_policy
from structlog.testing import capture_logs

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key
from ebbflow.edge.agent.likeness import Likeness
from ebbflow.edge.agent.rounds import Rounds
from ebbflow.edge.agent.updates import Updates
from ebbflow.edge.agent.waiting import Pace
from ebbflow.edge.agent.watcher import Watcher
from ebbflow.edge.delivery.clock import TrustClock
from ebbflow.edge.delivery.slots import SlotStore
from ebbflow.edge.feedback.clock import FeedbackClock
from ebbflow.edge.feedback.plans import Ceiling
from ebbflow.edge.feedback.store import FeedbackStore

DAY, HOUR = dt.timedelta(days=1), dt.timedelta(hours=1)
TEXTS_S = 0.001
"""What it costs to look at a text, by the device's stopwatch."""


class HostileCloud:
    """Answers the two calls of an agent; notes when batches come, by the device's stopwatch."""

    def __init__(self, device: "Device") -> None:
        self._device, key = device, generate_key()
        self.credentials = SimpleNamespace(key=lambda: key)
        self.feedback = self
        self.plans: list[pb.SignedPlan] = []
        self.received: list[tuple[str, float]] = []
        self.asked = 0
        self.sent: list[list[str]] = []
        """Rounds whose plans went to the device, for each time that it asked."""
        self.down = False

    async def GetPlan(self, request: pb.GetPlanRequest) -> pb.GetPlanResponse:  # noqa: N802
        self.asked += 1
        self._device.passed_s = 0.0
        open_ = {pb.RoundPlan.FromString(signed.plan).round: signed for signed in self.plans}
        new = [name for name in open_ if name not in request.held_rounds]
        self.sent.append(new)
        held = [name for name in request.held_rounds if name in open_]
        return pb.GetPlanResponse(plans=[open_[name] for name in new], held_rounds=held)

    async def SubmitBatch(self, request: pb.SubmitBatchRequest) -> None:  # noqa: N802
        if self.down:
            raise EbbflowError(Reason.SERVER_UNAVAILABLE, "down")
        round_ = pb.FeedbackBatch.FromString(request.batch.batch).round
        self.received.append((round_, round(self._device.passed_s, 6)))


class Device:
    """A device whose clock and stopwatch a test sets."""

    size = 300  # of its tokenizer

    def __init__(self, folder: Path) -> None:
        self.system, self.passed_s = NOW, 0.0
        self.refreshed_s: list[float] = []
        self.served = SimpleNamespace(student="students/faq", tokenizer=self)
        self.store = FeedbackStore(folder / "agent.db")
        self.clock = FeedbackClock(None, lambda: self.system)
        self.trust_clock = TrustClock(folder / "clock", lambda: self.system)
        self.cloud = HostileCloud(self)
        keys = {SIGNER.public_key.keyid: SIGNER.public_key}
        trust: Any = SimpleNamespace(clock=self.trust_clock, feedback_keys=lambda: keys, refresh=self.refresh)
        hub: Any = SimpleNamespace(models=lambda: [self.served])
        room: Any = SimpleNamespace(fits=lambda *_: False)  # for an engine, which votes by shared words do not need
        updates = Updates(SlotStore(folder / "releases"), self.store)
        cloud: Any = self.cloud
        self.rounds = Rounds(
            cloud,
            trust,
            self.store,
            Likeness(hub, lambda: room),
            Ceiling(epsilon=8.0, adapters=True),
            updates,
            self.clock,
            Pace(),
            stopwatch=lambda: self.passed_s,
            sleep=self.sleep,
        )

    async def sleep(self, seconds: float) -> None:
        self.passed_s += seconds

    def refresh(self) -> None:
        """Asks the cloud for newer keys."""
        self.refreshed_s.append(self.passed_s)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        self.passed_s += TEXTS_S
        return [bos, *text.encode()]

    def hear(self, server_time: dt.datetime) -> None:
        """What the cloud says as a line begins."""
        self.trust_clock.hear(server_time)
        self.clock.hear(server_time)

    def used_by(self, users: int) -> None:
        for user in range(users):
            self.store.record_interaction("faq", "r", f"u{user}", "a file", "ok", now=self.system - HOUR)

    def look(self, *plans: pb.RoundPlan) -> list[tuple[str, float]]:
        """Returns the rounds whose batches were sent, and when."""
        self.cloud.plans, before = [PlanSigner(SIGNER).sign(plan) for plan in plans], len(self.cloud.received)
        asyncio.run(self.rounds.look())
        return self.cloud.received[before:]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.store.close()


def plan(round_id: str, at: dt.datetime = NOW, duration: dt.timedelta = DAY, **more: Any) -> pb.RoundPlan:
    bins = [pb.Bin(bin_id=text, texts=[text]) for text in ("files", "dates")]
    return make_plan(round_id, "faq", signed_policy(policy()), bins, Timing(at, duration, 7 * DAY), **more)


# The clock


def test_a_cloud_that_tells_the_time_opens_no_window(device: Device) -> None:
    sent = []
    for window in range(4):
        at = NOW + window * 30 * DAY
        device.hear(at)
        sent += device.look(*(plan(f"{window}{number}", at) for number in range(5)))
    assert [round_ for round_, _ in sent] == [f"rounds/0{number}" for number in range(4)]


def test_one_wrong_word_of_the_cloud_about_the_time_stops_nothing(device: Device) -> None:
    wrong = NOW + 730 * DAY
    device.hear(wrong)
    assert device.look(plan("wrong", wrong)) == []
    device.hear(NOW)
    device.system += DAY
    assert [round_ for round_, _ in device.look(plan("right", device.system))] == ["rounds/right"]


def test_a_device_without_a_clock_is_moved_once_and_not_step_by_step(device: Device) -> None:
    device.system = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    sent = []
    for window in range(4):
        at = NOW + window * 30 * DAY
        device.hear(at)
        sent += device.look(plan(f"{window}", at + HOUR))
    assert [round_ for round_, _ in sent] == ["rounds/0"]


def test_a_device_whose_clock_is_behind_says_once_until_when_a_round_waits(device: Device) -> None:
    asked = plan("r", NOW + 10 * DAY)
    with capture_logs() as logs:
        assert [device.look(asked), device.look(asked)] == [[], []]
    until_when = (NOW + (10 + 1 - 7) * DAY).isoformat()
    waits = [entry for entry in logs if entry["event"] == "round_waits"]
    assert [(entry["round"], entry["until"]) for entry in waits] == [("rounds/r", until_when)]
    assert device.store.decisions() == []


# Plans that wait


def test_a_plan_that_waits_is_sent_once_and_answered_in_its_time(device: Device) -> None:
    asked = plan("r", NOW + 10 * DAY)
    assert [device.look(asked), device.look(asked)] == [[], []]
    device.system += 5 * DAY
    assert [round_ for round_, _ in device.look(asked)] == ["rounds/r"]
    assert device.cloud.sent == [["rounds/r"], [], []]


def test_a_plan_whose_round_was_closed_is_neither_held_nor_answered(device: Device) -> None:
    waiting, other = plan("r", NOW + 10 * DAY), plan("other", NOW + 11 * DAY)
    device.look(waiting, other)
    device.look(other)
    device.system += 4 * DAY
    assert device.look(other) == []
    device.system += DAY
    assert [round_ for round_, _ in device.look(other)] == ["rounds/other"]


# The moment of sending


def test_when_a_batch_is_sent_says_nothing_about_the_number_of_users(tmp_path: Path) -> None:
    moments, computed_s = [], []
    for users in (0, 1, 200):
        (tmp_path / str(users)).mkdir()
        device = Device(tmp_path / str(users))
        device.used_by(users)
        moments.append(device.look(plan("r")))
        computed_s.append(device.passed_s)
        device.store.close()
    assert moments == [[("rounds/r", 2.0)]] * 3
    assert len(set(computed_s)) == 1


def test_a_device_that_computes_for_longer_sends_at_the_next_moment_of_the_grid(device: Device) -> None:
    device.used_by(2500)
    assert device.look(plan("r")) == [("rounds/r", 4.0)]


def test_updates_of_adapters_are_sent_after_five_minutes(device: Device) -> None:
    assert device.look(round_plan(adapter_plan(config()))) == [("rounds/5c1e", 300.0)]


def test_without_a_round_to_answer_nobody_waits(device: Device) -> None:
    device.look(plan("r"))
    assert device.look(plan("r")) == []
    assert device.passed_s == 0.0


def test_newer_keys_are_asked_for_once_and_before_anything_is_computed(device: Device) -> None:
    """The moment of that question would tell how long computing took."""
    device.used_by(200)
    good, *unknown = (PlanSigner(SIGNER).sign(plan(round_id)) for round_id in ("good", "bad", "worse"))
    for signed in unknown:
        signed.key_id = "ff" * 32
    device.cloud.plans = [good, *unknown]
    asyncio.run(device.rounds.look())
    assert device.refreshed_s == [0.0]
    assert device.cloud.received == [("rounds/good", 2.0)]
    assert [each.reason for each in device.store.decisions()].count("PLAN_UNTRUSTED") == 2


def test_keys_that_cannot_be_had_keep_no_other_plan_from_being_answered(device: Device) -> None:
    def fails() -> None:
        raise EbbflowError(Reason.SERVER_UNAVAILABLE, "down")

    device.rounds._trust.refresh = fails  # type: ignore[method-assign]
    good, unknown = (PlanSigner(SIGNER).sign(plan(round_id)) for round_id in ("good", "bad"))
    unknown.key_id = "ff" * 32
    device.cloud.plans = [unknown, good]
    with pytest.raises(EbbflowError) as caught:
        asyncio.run(device.rounds.look())
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    assert device.cloud.received == [("rounds/good", 2.0)]


def test_a_round_that_ends_before_its_answer_could_be_sent_costs_nothing(device: Device) -> None:
    soon = NOW + 4 * dt.timedelta(minutes=1) - DAY
    assert device.look(plan("states", soon, measure=pb.RoundPlan.MEASURE_STUDENT)) == []
    assert [each.reason for each in device.store.decisions()] == ["ROUND_CLOSED"]
    assert device.look(plan("words", soon), round_plan(adapter_plan(config()))) == [("rounds/5c1e", 300.0)]
    assert [account.entries for account in device.store.accounts()] == [1]
    assert device.look(plan("words", soon)) == [("rounds/words", 2.0)]


def test_nobody_waits_for_a_round_that_this_device_cannot_compute(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "weights").write_bytes(b"")
    device.served.engine = SimpleNamespace(weights_path=tmp_path / "weights", name="native")
    device.used_by(3)
    adapters, states = round_plan(adapter_plan(config())), plan("states", measure=pb.RoundPlan.MEASURE_STUDENT)
    assert device.look(adapters, states) == []
    assert {each.reason for each in device.store.decisions()} == {"EXTRA_MISSING", "OUT_OF_MEMORY"}
    assert device.passed_s == 0.0
    assert device.look(adapters, states, plan("words")) == [("rounds/words", 2.0)]


def test_what_fails_at_a_users_text_is_waited_for_as_what_does_not(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Device.encode

    def fails(device: Device, text: str, *, bos: bool = False) -> list[int]:
        if text == "a file":
            raise MemoryError
        return encode(device, text, bos=bos)

    monkeypatch.setattr(Device, "encode", fails)
    device.used_by(1)
    assert device.look(plan("r")) == []
    assert device.store.accounts() == []
    assert device.passed_s == pytest.approx(2.0)


def test_votes_by_words_are_computed_as_fast_as_answers(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold the interpreter's lock: whoever would go before them had to wait for them."""
    encode, found = Device.encode, set()

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def noted(device: Device, text: str, *, bos: bool = False) -> list[int]:
        found.add(priority())
        return encode(device, text, bos=bos)

    monkeypatch.setattr(Device, "encode", noted)
    device.look(plan("r"))
    assert found == {priority()}


def test_what_waits_from_before_is_sent_before_anything_is_computed(device: Device) -> None:
    device.cloud.down = True
    with pytest.raises(EbbflowError):
        device.look(plan("old"))
    device.cloud.down = False
    device.used_by(10)
    assert device.look(plan("old"), plan("new")) == [("rounds/old", 0.0), ("rounds/new", 2.0)]


def test_nothing_is_asked_of_the_cloud_between_answering_and_sending(device: Device) -> None:
    """The moment of another question would tell how long computing took."""
    asked = []
    watcher = Watcher("plan", device.rounds.look)

    async def pushed(seconds: float) -> None:
        watcher.hint()
        await asyncio.sleep(0.05)
        asked.append(device.cloud.asked)
        device.passed_s += seconds

    async def scene() -> None:
        device.rounds._sleep = pushed
        device.cloud.plans = [PlanSigner(SIGNER).sign(plan("r"))]
        watcher.hint()
        running = asyncio.create_task(watcher.run())
        await until(lambda: device.cloud.asked == 2)
        running.cancel()

    asyncio.run(scene())
    assert asked == [1]
    assert device.cloud.received == [("rounds/r", 2.0)]


# Plans that go wrong


def test_a_plan_that_goes_wrong_keeps_no_other_from_being_answered(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, full, broken = plan("bad"), plan("full"), plan("broken")
    bad.end_time.seconds = 10**15
    release = FeedbackStore.release_batch

    def failing(store: FeedbackStore, admitted: Any, *rest: Any) -> bytes:
        if admitted.plan.round == "rounds/full":
            raise EbbflowError(Reason.DISK_FULL, "full")
        if admitted.plan.round == "rounds/broken":
            raise ZeroDivisionError
        return release(store, admitted, *rest)

    monkeypatch.setattr(FeedbackStore, "release_batch", failing)
    with pytest.raises(EbbflowError) as caught:
        device.look(bad, full, broken, plan("good"))
    assert caught.value.reason is Reason.DISK_FULL
    assert [round_ for round_, _ in device.cloud.received] == ["rounds/good"]
    assert {(each.round, each.reason) for each in device.store.decisions()} == {
        ("rounds/bad", "PLAN_INVALID"),
        ("rounds/good", ""),
    }
