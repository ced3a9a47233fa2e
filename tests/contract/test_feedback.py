"""Rounds from opening to aggregate, with real devices' batches, on every database."""

import datetime as dt
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from feedback_world import DAY, NOW, Device, add_fleet, close_all, count, mixture_of, open_round, refusals
from google.protobuf import json_format

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback import accounts, batches, round_rows, rounds
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    FeedbackBatch,
    FeedbackRefusal,
    PrivacyAccount,
    PrivacyEntry,
    RoundState,
)
from ebbflow.common.errors import EbbflowError
from ebbflow.common.identity import keys as identity
from ebbflow.common.privacy import release
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import Contribution


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    return registry


def test_a_round_goes_from_plan_to_mixture(fleet: Registry, devices: list[Device]) -> None:
    round_ = open_round(fleet)
    votes = [Contribution(0)] * 300 + [Contribution(1, failed=True)] * 60
    for device in devices:
        device.submit(fleet, device.answer(fleet, votes))
    with fleet.transaction() as session:
        closed = rounds.close_round(session, round_.id)
    result = round_rows.aggregate_of(closed)
    assert closed.state == RoundState.CLOSED
    assert result.informative
    assert result.bins[0].seen == pytest.approx(900, abs=30)
    assert result.bins[1].failed == pytest.approx(180, abs=30)
    shares = mixture_of(result)
    assert shares["files"] > shares["dates"] > shares["networks"] > 0
    assert 1 < rounds.epsilon_of_round(closed) < 4
    with fleet.reading() as session:
        assert rounds.counts(session, [round_.id]) == {round_.id: (3, 3, 0)}


def play(registry: Registry, devices: list[Device], votes: list[Contribution], now: dt.datetime, **more: object) -> str:
    """A round from opening to close; returns its id."""
    round_ = open_round(registry, now, **more)
    for device in devices:
        device.submit(registry, device.answer(registry, votes, now), now)
    with registry.transaction() as session:
        return rounds.close_round(session, round_.id).id


def test_rounds_of_a_window_that_asked_the_same_speak_together(fleet: Registry, devices: list[Device]) -> None:
    first = play(fleet, devices, [Contribution(0)] * 300, NOW)
    play(fleet, devices, [Contribution(2)] * 900, NOW, measure=pb.RoundPlan.MEASURE_STUDENT)  # another question
    second = play(fleet, devices, [Contribution(0)] * 100 + [Contribution(1, failed=True)] * 60, NOW + DAY)
    later = play(fleet, devices, [Contribution(2)] * 500, NOW + 40 * DAY)  # another window
    with fleet.reading() as session:
        alone = [round_rows.aggregate_of(round_rows.find(session, id_)) for id_ in (first, second)]
        assert rounds.of_window(session, round_rows.find(session, first)) == alone[0], "none was before it"
        assert rounds.of_window(session, round_rows.find(session, later)).batches == 3
        both = rounds.of_window(session, round_rows.find(session, second))
    assert [bin_.seen for bin_ in both.bins] == [
        a.seen + b.seen for a, b in zip(alone[0].bins, alone[1].bins, strict=True)
    ]
    assert both.bins[0].seen == pytest.approx(1200, abs=40)
    assert both.noise_std == pytest.approx(alone[0].noise_std * 2**0.5)
    assert (both.batches, both.informative) == (6, True)


def test_an_open_round_of_the_window_has_no_say_yet(fleet: Registry, devices: list[Device]) -> None:
    open_round(fleet)
    devices[0].submit(fleet, devices[0].answer(fleet, [Contribution(1)] * 300))
    closed = play(fleet, devices, [Contribution(0)] * 300, NOW + DAY / 2)
    with fleet.reading() as session:
        row = round_rows.find(session, closed)
        assert rounds.of_window(session, row) == round_rows.aggregate_of(row)


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
    assert [found.account.agent_id for found in rows + more] == ["kiosk-1", "kiosk-2"]
    [statement] = one
    account, entries = statement.account, len(statement.charges_nano)
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


def test_metrics_travel_with_the_votes(fleet: Registry, devices: list[Device]) -> None:
    round_ = open_round(fleet, metrics=[pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=2)])
    votes = [Contribution(0, metrics=(100,))] * 200
    devices[0].submit(fleet, devices[0].answer(fleet, votes))
    with fleet.transaction() as session:
        result = round_rows.aggregate_of(rounds.close_round(session, round_.id))
    assert result.metrics[0] == pytest.approx(400, abs=40)
    assert json_format.MessageToDict(result)["metrics"]
