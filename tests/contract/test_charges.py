"""The cloud's mirror gives a device back what it has spent: after a new disk, a restored backup, refused batches."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from feedback_world import AGENTS, DAY, NOW, Device, add_fleet, close_all, open_plans, open_round
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1.feedback_pb2_grpc import FeedbackServiceStub
from ebbflow.cloud.feedback import charges, round_rows, rounds
from ebbflow.cloud.registry.clock import now as clock_now
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import PrivacyEntry, Round, Student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import sign
from ebbflow.common.privacy.vector import Contribution

Plane = Any


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    return registry


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path / "device", AGENTS[0])
    yield made
    made.store.close()


def mirror(registry: Registry, agent: str = AGENTS[0]) -> list[pb.MirroredCharge]:
    with registry.reading() as session:
        return charges.known(session, agent)


def spoil(batch: pb.FeedbackBatch) -> None:
    batch.noisy[0] = 10**8


def refuse(registry: Registry, device: Device, signed: pb.SignedBatch) -> None:
    with pytest.raises(EbbflowError):
        device.submit(registry, device.resign(signed, spoil))


def test_a_kept_batch_is_a_charge(fleet: Registry, device: Device) -> None:
    round_ = open_round(fleet)
    assert mirror(fleet) == []
    device.submit(fleet, device.answer(fleet, []))
    plan = round_rows.plan_of(round_)
    [charge] = mirror(fleet)
    assert (charge.round, charge.student, charge.window) == (plan.round, "students/faq", plan.window)
    assert (charge.rho_nano, charge.end_time) == (plan.mechanism.rho_nano, plan.end_time)
    assert mirror(fleet, AGENTS[1]) == []


def test_a_refused_batch_is_a_charge_too_but_only_once(fleet: Registry, device: Device) -> None:
    round_ = open_round(fleet)
    signed = device.answer(fleet, [])
    for _ in range(3):
        refuse(fleet, device, signed)
    assert [charge.round for charge in mirror(fleet)] == [f"rounds/{round_.id}"]
    device.submit(fleet, signed)
    assert [charge.round for charge in mirror(fleet)] == [f"rounds/{round_.id}"]


def test_a_batch_that_came_too_late_was_charged(fleet: Registry, device: Device) -> None:
    round_ = open_round(fleet)
    signed = device.answer(fleet, [])
    with pytest.raises(EbbflowError) as caught:
        device.submit(fleet, signed, NOW + 2 * DAY)
    assert caught.value.reason is Reason.ROUND_CLOSED
    assert [charge.round for charge in mirror(fleet)] == [f"rounds/{round_.id}"]


def test_rounds_that_did_not_ask_the_agent_cost_it_nothing(fleet: Registry, device: Device, tmp_path: Path) -> None:
    open_round(fleet)
    stranger = Device(tmp_path / "stranger", "stranger")
    with pytest.raises(EbbflowError):
        stranger.submit(fleet, stranger.resign(device.answer(fleet, []), lambda batch: None))
    assert mirror(fleet, "stranger") == []
    stranger.store.close()


def test_charges_come_in_the_order_in_which_rounds_end(fleet: Registry, device: Device) -> None:
    for hour, days in enumerate((3, 1, 2)):
        time = NOW + hour * DAY / 24
        open_round(fleet, time, duration=days * DAY)
        device.submit(fleet, device.answer(fleet, [], time), time)
    ends = [charge.end_time.seconds for charge in mirror(fleet)]
    assert ends == sorted(ends)
    assert len(set(ends)) == 3


def test_a_reinstalled_device_goes_on_where_it_was(fleet: Registry, device: Device, tmp_path: Path) -> None:
    for refused in (False, True):
        open_round(fleet)
        signed = device.answer(fleet, [Contribution(0)])
        if refused:
            refuse(fleet, device, signed)
        else:
            device.submit(fleet, signed)
        close_all(fleet)
    again = Device(tmp_path / "again", AGENTS[0])
    assert again.take_over(fleet) == 2
    assert again.take_over(fleet) == 0
    before, after = ([(one.window, one.rho_spent_nano) for one in each.store.accounts()] for each in (device, again))
    assert before == after
    again.store.close()


def test_a_restored_backup_never_answers_a_round_again(fleet: Registry, device: Device, tmp_path: Path) -> None:
    open_round(fleet)
    device.store.close()
    shutil.copytree(tmp_path / "device", tmp_path / "backup")
    first = _reopened(tmp_path / "device")
    signed = first.answer(fleet, [Contribution(1)])
    first.submit(fleet, signed)
    first.store.close()
    restored = _reopened(tmp_path / "backup")
    restored.take_over(fleet)
    with pytest.raises(EbbflowError):
        restored.answer(fleet, [Contribution(1)])
    with fleet.reading() as session:
        assert session.query(PrivacyEntry).count() == 1
    restored.store.close()


def _reopened(folder: Path) -> Device:
    spare = folder.with_name(f"{folder.name}-spare")
    device = Device(spare, AGENTS[0])
    device.store.close()
    shutil.rmtree(spare)
    device.store = type(device.store)(folder / "agent.db")
    return device


def serving_agent(plane: Plane) -> Any:
    plane.student()
    plane.release()
    agent = plane.agent("kiosk-7")
    plane.roll_out("faq", 1)
    plane.serve("kiosk-7", "faq", 1)
    return agent


def opened(plane: Plane) -> str:
    """Opens a round; returns its name."""
    with plane.registry.transaction() as session:
        student = session.get_one(Student, "faq")
        bins = [pb.Bin(bin_id="a", texts=["b"])]
        return f"rounds/{rounds.open_round(session, student, bins, plane.cloud.plan_signer, clock_now()).id}"


async def test_agents_are_told_their_charges_with_the_plans(plane: Plane) -> None:
    agent = serving_agent(plane)
    round_ = opened(plane)
    stub = FeedbackServiceStub(agent.channel)
    answer = await stub.GetPlan(pb.GetPlanRequest())
    assert (len(answer.plans), len(answer.charges)) == (1, 0)
    batch = pb.FeedbackBatch(batch_id="00000000-0000-4000-8000-000000000000", round=round_)
    data = batch.SerializeToString(deterministic=True)
    with pytest.raises(EbbflowError) as caught:
        await stub.SubmitBatch(pb.SubmitBatchRequest(batch=pb.SignedBatch(batch=data, signature=sign(agent.key, data))))
    assert caught.value.reason is Reason.BATCH_REFUSED
    answer = await stub.GetPlan(pb.GetPlanRequest())
    assert [charge.round for charge in answer.charges] == [round_]
    assert not answer.plans, "the charge says enough"


async def test_a_plan_that_an_agent_holds_is_not_sent_again(plane: Plane) -> None:
    agent = serving_agent(plane)
    names = [opened(plane), opened(plane)]
    first, second = names
    stub = FeedbackServiceStub(agent.channel)
    for held in ([], [first], [first, second], ["rounds/closed", "nonsense", second]):
        answer = await stub.GetPlan(pb.GetPlanRequest(held_rounds=held))
        assert [pb.RoundPlan.FromString(each.plan).round for each in answer.plans] == [
            n for n in names if n not in held
        ]
        assert list(answer.held_rounds) == [name for name in names if name in held]


# Whatever happens to disks and batches, what left the device is in its account after one look at the mirror.


class History:
    """One device, and what really left it."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder = folder
        shutil.copy(template, folder / "registry.db")
        self.registry = Registry.open(f"sqlite:///{folder}/registry.db")
        add_fleet(self.registry)
        self.disks = 0
        self.device = self.fresh()
        self.left: set[str] = set()
        self.bytes_of: dict[str, bytes] = {}

    def fresh(self) -> Device:
        self.disks += 1
        return Device(self.folder / f"disk-{self.disks}", AGENTS[0])

    def open(self) -> None:
        try:
            open_round(self.registry)
        except EbbflowError as error:
            assert error.reason is Reason.BUDGET_EXHAUSTED  # noqa: PT017 - a full window is expected

    def send(self, change: Callable[[pb.FeedbackBatch], object] | None = None) -> None:
        self.device.take_over(self.registry)
        with self.registry.reading() as session:
            if not open_plans(session):
                return
        try:
            signed = self.device.answer(self.registry, [Contribution(0)])
        except EbbflowError:
            return
        round_ = pb.FeedbackBatch.FromString(signed.batch).round
        assert self.bytes_of.setdefault(round_, signed.batch) == signed.batch  # never a second noise for one round
        self.left.add(round_)
        try:
            self.device.submit(self.registry, self.device.resign(signed, change) if change else signed)
        except EbbflowError as error:
            assert error.reason is Reason.BATCH_REFUSED  # noqa: PT017 - what was spoilt is refused

    def act(self, step: str) -> None:
        if step == "open":
            self.open()
        elif step == "close":
            close_all(self.registry)
        elif step == "send":
            self.send()
        elif step == "refused":
            self.send(spoil)
        elif step == "new disk":
            self.device.store.close()
            self.device = self.fresh()

    def check(self) -> None:
        self.device.take_over(self.registry)
        known = {charge.round for charge in mirror(self.registry)}
        assert known == self.left
        accounts = self.device.store.accounts()
        spent = sum(account.rho_spent_nano for account in accounts)
        with self.registry.reading() as session:
            costs = {f"rounds/{row.id}": round_rows.plan_of(row).mechanism.rho_nano for row in session.query(Round)}
        assert spent == sum(costs[round_] for round_ in self.left)
        assert all(account.rho_spent_nano <= account.rho_cap_nano for account in accounts)

    def close(self) -> None:
        self.device.store.close()
        self.registry.close()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.sampled_from(["open", "send", "refused", "new disk", "close"]), max_size=14))
def test_the_account_and_the_mirror_agree_whatever_happens(sqlite_template: Path, steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder), sqlite_template)
        try:
            for step in steps:
                history.act(step)
            history.check()
        finally:
            history.close()
