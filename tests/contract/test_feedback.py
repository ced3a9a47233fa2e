"""Rounds from opening to aggregate, with real devices' batches, on every database."""

import datetime as dt
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from google.protobuf import json_format
from securesystemslib.signer import CryptoSigner

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback import accounts, batches, rounds
from ebbflow.cloud.feedback.aggregate import mixture
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    FeedbackBatch,
    FeedbackRefusal,
    PrivacyAccount,
    PrivacyEntry,
    Round,
    RoundState,
    Student,
)
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity import keys as identity
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback import release
from ebbflow.edge.feedback.plans import Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
AGENTS = ("kiosk-1", "kiosk-2", "kiosk-3")
BINS = [pb.Bin(bin_id=topic, texts=[topic]) for topic in ("files", "dates", "networks")]
SIGNER = CryptoSigner.generate_ed25519()
KEYS = {agent: identity.generate_key() for agent in (*AGENTS, "stranger")}


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    """A student that three agents serve, and an agent for each reason not to belong to its cohort."""
    outsiders = {"elsewhere": {"site": "oslo"}, "revoked": {"site": "berlin"}, "empty": {"site": "berlin"}}
    with registry.transaction() as session:
        session.add(
            Student(
                id="faq",
                teacher="",
                architecture={},
                corpus_sha256="0" * 64,
                topics=["files", "dates", "networks"],
                privacy_policy={"epsilon": 4.0},
                selector="site=berlin",
                create_time=NOW,
            )
        )
        for agent in (*AGENTS, *outsiders, "stranger"):
            labels = outsiders.get(agent, {"site": "berlin"})
            state = AgentState.REVOKED if agent == "revoked" else AgentState.ACTIVE
            session.add(Agent(id=agent, state=state, labels=labels, profile={}, create_time=NOW))
        session.flush()
        for agent in (*AGENTS, "elsewhere", "revoked"):
            session.add(Assignment(agent_id=agent, student_id="faq", serving_number=1))
        session.add(Assignment(agent_id="empty", student_id="faq", desired_number=1))
    return registry


def open_round(registry: Registry, now: dt.datetime = NOW, **more: object) -> Round:
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        return rounds.open_round(session, student, BINS, PlanSigner(SIGNER), now, **more)  # type: ignore[arg-type]


class Device:
    """A real agent's feedback side."""

    def __init__(self, folder: Path, agent: str) -> None:
        folder.mkdir()
        self.agent, self.key, self.store = agent, KEYS[agent], FeedbackStore(folder / "agent.db")

    def answer(self, registry: Registry, votes: list[Contribution], now: dt.datetime = NOW) -> pb.SignedBatch:
        with registry.reading() as session:
            plan = rounds.current_plans(session, self.agent, now)[-1]
        keys = {SIGNER.public_key.keyid: SIGNER.public_key}
        admitted = admit(plan, keys, Ceiling(epsilon=64.0), now)
        data = self.store.release_batch(admitted, votes, lambda data: identity.sign(self.key, data), now)
        return pb.SignedBatch.FromString(data)

    def submit(self, registry: Registry, signed: pb.SignedBatch, now: dt.datetime = NOW) -> None:
        batches.submit(registry, self.agent, signed, self.key.public_key(), now)

    def resign(self, signed: pb.SignedBatch, change: Callable[[pb.FeedbackBatch], object]) -> pb.SignedBatch:
        batch = pb.FeedbackBatch.FromString(signed.batch)
        change(batch)
        data = batch.SerializeToString(deterministic=True)
        return pb.SignedBatch(batch=data, signature=identity.sign(self.key, data))


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Device]]:
    made = [Device(tmp_path / agent, agent) for agent in AGENTS]
    yield made
    for device in made:
        device.store.close()


def count(registry: Registry, table: type) -> int:
    with registry.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def refusals(registry: Registry) -> list[tuple[str, str]]:
    with registry.reading() as session:
        return [(row.agent_id, row.reason) for row in session.scalars(sa.select(FeedbackRefusal))]


def test_a_round_goes_from_plan_to_mixture(fleet: Registry, devices: list[Device]) -> None:
    round_ = open_round(fleet)
    votes = [Contribution(0)] * 300 + [Contribution(1, failed=True)] * 60
    for device in devices:
        device.submit(fleet, device.answer(fleet, votes))
    with fleet.transaction() as session:
        closed = rounds.close_round(session, round_.id)
    result = rounds.aggregate_of(closed)
    assert closed.state == RoundState.CLOSED
    assert result.informative
    assert result.bins[0].seen == pytest.approx(900, abs=30)
    assert result.bins[1].failed == pytest.approx(180, abs=30)
    shares = mixture(result)
    assert shares["files"] > shares["dates"] > shares["networks"] > 0
    assert 1 < rounds.epsilon_of_round(closed) < 4
    with fleet.reading() as session:
        assert rounds.counts(session, [round_.id]) == {round_.id: (3, 3, 0)}


def test_the_cohort_is_who_serves_the_student_and_is_frozen(fleet: Registry) -> None:
    round_ = open_round(fleet)
    with fleet.transaction() as session:
        session.add(Assignment(agent_id="stranger", student_id="faq", serving_number=1))
    with fleet.reading() as session:
        assert rounds.counts(session, [round_.id])[round_.id][0] == len(AGENTS)
        for agent in AGENTS:
            [signed] = rounds.current_plans(session, agent, NOW)
            assert pb.RoundPlan.FromString(signed.plan).round == f"rounds/{round_.id}"
        for agent in ("stranger", "elsewhere", "revoked", "empty"):
            assert rounds.current_plans(session, agent, NOW) == []
        assert rounds.current_plans(session, AGENTS[0], NOW + DAY) == []


def test_opening_and_closing_tell_the_fleet(fleet: Registry) -> None:
    seen = []
    for act in (lambda: open_round(fleet), lambda: close_all(fleet)):
        act()
        with fleet.reading() as session:
            seen.append(changes.revisions(session)["plan"])
    assert seen == [1, 2]


def close_all(registry: Registry) -> None:
    with registry.transaction() as session:
        rounds.close_overdue(session, NOW + 2 * DAY)


def test_a_window_has_its_rounds_and_not_one_more(fleet: Registry) -> None:
    for _ in range(4):
        open_round(fleet)
    with pytest.raises(EbbflowError) as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert open_round(fleet, NOW + 30 * DAY).window == "2026-12-03"


def test_a_richer_policy_does_not_reopen_a_spent_window(fleet: Registry) -> None:
    for _ in range(4):
        open_round(fleet)
    with fleet.transaction() as session:
        session.get_one(Student, "faq").privacy_policy = {"epsilon": 4.0, "rounds_per_window": 8}
    with pytest.raises(EbbflowError) as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED


def test_replicas_that_open_at_once_share_one_budget(fleet: Registry) -> None:
    def attempt(_: int) -> bool:
        try:
            open_round(fleet)
        except EbbflowError as error:
            assert error.reason is Reason.BUDGET_EXHAUSTED  # noqa: PT017 - both outcomes are expected
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(attempt, range(8))) == 4


def test_a_student_that_nobody_serves_has_no_round(fleet: Registry) -> None:
    with fleet.transaction() as session:
        session.execute(sa.delete(Assignment))
    with pytest.raises(EbbflowError, match="no agent serves") as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.STATE_CONFLICT
    assert count(fleet, Round) == 0


def test_the_same_batch_again_is_fine_even_after_the_round(fleet: Registry, devices: list[Device]) -> None:
    round_ = open_round(fleet)
    signed = devices[0].answer(fleet, [])
    for _ in range(3):
        devices[0].submit(fleet, signed)
    with fleet.transaction() as session:
        rounds.close_round(session, round_.id)
    devices[0].submit(fleet, signed, NOW + 2 * DAY)
    assert (count(fleet, FeedbackBatch), count(fleet, PrivacyEntry), refusals(fleet)) == (1, 1, [])


def test_copies_that_arrive_at_once_are_charged_once(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    signed = [device.answer(fleet, []) for device in devices]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: devices[i % 3].submit(fleet, signed[i % 3]), range(18)))
    assert (count(fleet, FeedbackBatch), count(fleet, PrivacyEntry)) == (3, 3)
    with fleet.reading() as session:
        rows = session.scalars(sa.select(PrivacyAccount)).all()
    assert len({row.rho_spent_nano for row in rows}) == 1


def test_the_mirror_follows_the_devices_own_account(fleet: Registry, devices: list[Device]) -> None:
    for _ in range(3):
        round_ = open_round(fleet)
        for device in devices[:2]:
            device.submit(fleet, device.answer(fleet, []))
        with fleet.transaction() as session:
            rounds.close_round(session, round_.id)
    with fleet.reading() as session:
        rows, token = accounts.list_accounts(session, page_size=1)
        assert token
        more, _ = accounts.list_accounts(session, page_token=token)
        one, _ = accounts.list_accounts(session, agent_id="kiosk-2")
    assert [row.agent_id for row, _ in rows + more] == ["kiosk-1", "kiosk-2"]
    [(account, entries)] = one
    [local] = devices[1].store.accounts()
    assert (account.rho_spent_nano, account.rho_cap_nano, entries) == (local.rho_spent_nano, local.rho_cap_nano, 3)
    assert 0 < epsilon_of(account.rho_spent_nano, account.delta) < 4


def refused_with(registry: Registry, device: Device, signed: pb.SignedBatch, now: dt.datetime = NOW) -> str:
    before = count(registry, FeedbackBatch), count(registry, PrivacyEntry)
    with pytest.raises(EbbflowError) as caught:
        device.submit(registry, signed, now)
    assert (count(registry, FeedbackBatch), count(registry, PrivacyEntry)) == before
    assert refusals(registry)[-1] == (device.agent, caught.value.metadata["why"])
    return caught.value.metadata["why"]


def test_a_batch_that_its_agent_did_not_sign_is_refused(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    signed = devices[0].answer(fleet, [])
    assert refused_with(fleet, devices[1], signed) == "signature"
    signed.signature = b"nonsense"
    assert refused_with(fleet, devices[0], signed) == "signature"


def test_each_breach_has_its_word(fleet: Registry, devices: list[Device]) -> None:
    device = devices[0]
    open_round(fleet)
    good = device.answer(fleet, [])

    def breach(change: Callable[[pb.FeedbackBatch], object]) -> str:
        return refused_with(fleet, device, device.resign(good, change))

    assert breach(lambda batch: setattr(batch, "round", "rounds/unknown")) == "round_unknown"
    assert breach(lambda batch: setattr(batch, "round", "elsewhere/x")) == "round_unknown"
    assert breach(lambda batch: setattr(batch, "batch_id", "7")) == "batch_id"
    assert breach(lambda batch: setattr(batch, "plan_sha256", b"")) == "plan_mismatch"
    assert breach(lambda batch: setattr(batch.mechanism, "rho_nano", 1)) == "mechanism_mismatch"
    assert breach(lambda batch: batch.noisy.append(3)) == "length"
    assert breach(lambda batch: batch.noisy.__setitem__(0, 10**9)) == "value_range"
    assert breach(lambda batch: batch.noisy.__setitem__(slice(6, None), [-1] + [0] * 63)) == "under_noised"
    smuggled = pb.SignedBatch(batch=good.batch + b"\x7a\x03raw", signature=b"")
    smuggled.signature = identity.sign(device.key, smuggled.batch)
    assert refused_with(fleet, device, smuggled) == "unknown_fields"
    device.submit(fleet, good)
    assert breach(lambda batch: batch.noisy.__setitem__(0, batch.noisy[0] + 1)) == "replay"
    assert breach(lambda batch: setattr(batch, "batch_id", "00000000-0000-4000-8000-000000000000")) == "replay"


def test_another_agents_batch_id_cannot_be_taken(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    first, second = devices[0].answer(fleet, []), devices[1].answer(fleet, [])
    devices[0].submit(fleet, first)
    taken = pb.FeedbackBatch.FromString(first.batch).batch_id
    stolen = devices[1].resign(second, lambda batch: setattr(batch, "batch_id", taken))
    assert refused_with(fleet, devices[1], stolen) == "replay"
    devices[1].submit(fleet, second)


def test_who_was_not_asked_is_refused(fleet: Registry, devices: list[Device], tmp_path: Path) -> None:
    open_round(fleet)
    signed = devices[0].answer(fleet, [])
    stranger = Device(tmp_path / "stranger", "stranger")
    forged = stranger.resign(signed, lambda batch: None)
    assert refused_with(fleet, stranger, forged) == "not_a_member"
    stranger.store.close()


@pytest.mark.parametrize("late", [True, False], ids=["late", "closed"])
def test_a_round_that_is_over_takes_nothing(fleet: Registry, devices: list[Device], late: bool) -> None:
    round_ = open_round(fleet)
    signed = devices[0].answer(fleet, [])
    if not late:
        with fleet.transaction() as session:
            rounds.close_round(session, round_.id)
    assert refused_with(fleet, devices[0], signed, NOW + DAY if late else NOW) == "round_closed"


def test_a_device_that_halves_its_noise_is_caught(
    fleet: Registry, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "DiscreteGaussian", lambda variance: DiscreteGaussian(variance / 9))
    open_round(fleet)
    assert refused_with(fleet, devices[0], devices[0].answer(fleet, [Contribution(0)] * 9)) == "under_noised"


def test_noise_that_was_used_before_is_refused(
    fleet: Registry, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(DiscreteGaussian):
        drawn: list[int] | None = None

        def sample(self, count: int) -> list[int]:
            Stuck.drawn = Stuck.drawn or super().sample(count)
            return Stuck.drawn

    monkeypatch.setattr(release, "DiscreteGaussian", Stuck)
    open_round(fleet)
    devices[0].submit(fleet, devices[0].answer(fleet, []))
    close_all(fleet)
    open_round(fleet)
    assert refused_with(fleet, devices[0], devices[0].answer(fleet, [Contribution(1)])) == "noise_reused"


def test_a_spent_mirror_refuses(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    first = devices[0].answer(fleet, [])
    devices[0].submit(fleet, first)
    with fleet.transaction() as session:
        session.execute(sa.update(PrivacyAccount).values(rho_spent_nano=PrivacyAccount.rho_cap_nano))
    close_all(fleet)
    open_round(fleet)
    assert refused_with(fleet, devices[0], devices[0].answer(fleet, [])) == "budget"


def test_nothing_of_a_refused_batch_is_kept(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    marked = 777_777_777
    good = devices[0].answer(fleet, [])
    bad = devices[0].resign(good, lambda batch: batch.noisy.__setitem__(0, marked))
    batch_id = pb.FeedbackBatch.FromString(bad.batch).batch_id
    refused_with(fleet, devices[0], bad)
    tables = sa.MetaData()
    with fleet.engine.connect() as connection:
        tables.reflect(connection)
        rows = [row for table in tables.sorted_tables for row in connection.execute(sa.select(table))]
    for row in rows:
        assert str(marked) not in str(tuple(row))
        assert batch_id not in str(tuple(row))


def test_refusals_do_not_fill_the_disk(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    signed = devices[0].answer(fleet, [])
    signed.signature = b""
    for _ in range(batches.MAX_REFUSALS + 5):
        with pytest.raises(EbbflowError):
            devices[0].submit(fleet, signed)
    assert count(fleet, FeedbackRefusal) == batches.MAX_REFUSALS


def test_closing_again_changes_nothing(fleet: Registry, devices: list[Device]) -> None:
    round_ = open_round(fleet)
    devices[0].submit(fleet, devices[0].answer(fleet, []))
    kept = []
    for _ in range(2):
        with fleet.transaction() as session:
            kept.append(json.dumps(rounds.close_round(session, round_.id).aggregate, sort_keys=True))
    assert kept[0] == kept[1]


def test_overdue_rounds_close_by_themselves(fleet: Registry) -> None:
    first, second = open_round(fleet), open_round(fleet, NOW + DAY / 2)
    with fleet.transaction() as session:
        assert rounds.close_overdue(session, NOW + DAY) == [first.id]
    with fleet.reading() as session:
        assert session.get_one(Round, second.id).state == RoundState.OPEN


def test_an_unknown_round_cannot_be_closed(fleet: Registry) -> None:
    with fleet.transaction() as session, pytest.raises(EbbflowError) as caught:
        rounds.close_round(session, "nope")
    assert caught.value.reason is Reason.ROUND_NOT_FOUND


def test_metrics_travel_with_the_votes(fleet: Registry, devices: list[Device]) -> None:
    round_ = open_round(fleet, metrics=[pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=2)])
    votes = [Contribution(0, metrics=(100,))] * 200
    devices[0].submit(fleet, devices[0].answer(fleet, votes))
    with fleet.transaction() as session:
        result = rounds.aggregate_of(rounds.close_round(session, round_.id))
    assert result.metrics[0] == pytest.approx(400, abs=40)
    assert json_format.MessageToDict(result)["metrics"]
