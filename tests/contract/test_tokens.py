import datetime as dt
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ebbflow.cloud.identity import admins, certificates, tokens
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Certificate, EnrolmentToken
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, make_csr
from ebbflow.common.identity.tokens import EnrolmentSecret

NOW = dt.datetime(2026, 11, 1, 12, tzinfo=dt.UTC)
PIN, KEY, OTHER_KEY = "5f" * 32, "aa" * 32, "bb" * 32


def _token(registry: Registry, uses: int = 1) -> EnrolmentSecret:
    with registry.transaction() as session:
        _, secret = tokens.create(session, PIN, NOW, uses=uses, labels={"site": "berlin"})
    return secret


def _redeem(registry: Registry, secret: EnrolmentSecret, request_id: str = "", key: str = KEY) -> bytes:
    with registry.transaction() as session:
        answer = f"agents/{uuid.uuid4()}".encode()
        return tokens.redeem(session, secret, request_id, key, NOW, lambda row: answer + row.labels["site"].encode())


def _uses_left(registry: Registry, secret: EnrolmentSecret) -> int:
    with registry.reading() as session:
        row = session.get(EnrolmentToken, secret.token_id)
        assert row is not None
        return row.uses_left


def _reason(registry: Registry, secret: EnrolmentSecret, request_id: str = "", key: str = KEY) -> Reason:
    with pytest.raises(EbbflowError) as caught:
        _redeem(registry, secret, request_id, key)
    return caught.value.reason


def test_a_token_lets_in_as_many_devices_as_it_has_uses(registry: Registry) -> None:
    secret = _token(registry, uses=2)
    assert _redeem(registry, secret, key=KEY).endswith(b"berlin")
    _redeem(registry, secret, key=OTHER_KEY)
    assert _reason(registry, secret, key="cc" * 32) is Reason.TOKEN_USED_UP


def test_a_retry_gets_the_first_answer_and_uses_nothing(registry: Registry) -> None:
    secret, request_id = _token(registry), str(uuid.uuid4())
    first = _redeem(registry, secret, request_id)
    assert _redeem(registry, secret, request_id) == first
    assert _uses_left(registry, secret) == 0


def test_without_a_request_id_the_key_stands_for_the_request(registry: Registry) -> None:
    secret = _token(registry)
    assert _redeem(registry, secret) == _redeem(registry, secret)


def test_a_request_id_with_another_key_is_refused(registry: Registry) -> None:
    secret, request_id = _token(registry, uses=2), str(uuid.uuid4())
    _redeem(registry, secret, request_id)
    assert _reason(registry, secret, request_id, OTHER_KEY) is Reason.REQUEST_ID_REUSED
    assert _uses_left(registry, secret) == 1


def test_a_request_id_that_is_no_uuid_is_refused(registry: Registry) -> None:
    secret = _token(registry)
    assert _reason(registry, secret, "x" * 100) is Reason.INVALID_REQUEST
    assert _uses_left(registry, secret) == 1


def test_a_device_that_is_turned_away_uses_nothing(registry: Registry) -> None:
    secret = _token(registry)

    def refuse(row: EnrolmentToken) -> bytes:
        raise EbbflowError(Reason.ALREADY_EXISTS, "the name is taken")

    with pytest.raises(EbbflowError), registry.transaction() as session:
        tokens.redeem(session, secret, "", KEY, NOW, refuse)
    assert _uses_left(registry, secret) == 1


def test_devices_that_come_at_once_share_the_uses(registry: Registry) -> None:
    secret = _token(registry, uses=3)

    def enrol(number: int) -> Reason | None:
        try:
            _redeem(registry, secret, key=f"{number:064x}")
        except EbbflowError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(8) as pool:
        outcomes = Counter(pool.map(enrol, range(12)))
    assert outcomes == {None: 3, Reason.TOKEN_USED_UP: 9}
    assert _uses_left(registry, secret) == 0


def test_a_retry_that_overtakes_its_original_uses_the_token_once(registry: Registry) -> None:
    secret, request_id = _token(registry), str(uuid.uuid4())
    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _: _redeem(registry, secret, request_id), range(8)))
    assert len(answers) == 1


def test_wrong_expired_and_revoked_tokens_are_refused(registry: Registry) -> None:
    secret = _token(registry)
    assert _reason(registry, EnrolmentSecret.generate(secret.token_id, PIN)) is Reason.TOKEN_INVALID
    assert _reason(registry, EnrolmentSecret.generate("unknown", PIN)) is Reason.TOKEN_INVALID
    with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
        tokens.redeem(session, secret, "", KEY, NOW + dt.timedelta(hours=1), lambda row: b"")
    assert caught.value.reason is Reason.TOKEN_EXPIRED
    with registry.transaction() as session:
        tokens.revoke(session, secret.token_id, NOW)
    assert _reason(registry, secret) is Reason.TOKEN_INVALID


def test_revoking_again_keeps_the_first_time_and_an_unknown_token_is_named(registry: Registry) -> None:
    secret = _token(registry)
    for day in (0, 1):
        with registry.transaction() as session:
            row = tokens.revoke(session, secret.token_id, NOW + dt.timedelta(days=day))
            assert row.revoke_time == NOW
    with pytest.raises(EbbflowError, match="nobody") as caught, registry.transaction() as session:
        tokens.revoke(session, "nobody", NOW)
    assert caught.value.reason is Reason.TOKEN_NOT_FOUND


@pytest.mark.parametrize(("uses", "hours"), [(0, 1), (-1, 1), (2_000_000, 1), (1, 0), (1, 100_000)])
def test_senseless_tokens_are_refused(sqlite_registry: Registry, uses: int, hours: int) -> None:
    with pytest.raises(EbbflowError) as caught, sqlite_registry.transaction() as session:
        tokens.create(session, PIN, NOW, uses=uses, lifetime=dt.timedelta(hours=hours))
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_revocation_covers_every_certificate_of_a_subject_and_no_other(registry: Registry, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority")
    csr = make_csr(generate_key())
    issued = [authority.issue_agent(csr, name) for name in ("kiosk-7", "kiosk-7", "kiosk-8")]
    with registry.transaction() as session:
        for one in issued:
            certificates.record(session, one, NOW)
    with registry.transaction() as session:
        assert certificates.revoke_subject(session, "agents/kiosk-7", NOW) == 2
    with registry.reading() as session:
        assert [certificates.is_revoked(session, one.serial) for one in issued] == [True, True, False]
        assert certificates.newest_expiry(session, "agents/kiosk-8") == issued[2].expire_time
        assert certificates.newest_expiry(session, "agents/kiosk-7") is None
        with pytest.raises(EbbflowError) as caught:
            certificates.check(session, issued[0].serial)
        assert caught.value.reason is Reason.CERTIFICATE_REVOKED
        assert certificates.check(session, issued[2].serial).subject == "agents/kiosk-8"


def test_a_certificate_that_the_registry_does_not_know_is_refused(sqlite_registry: Registry) -> None:
    with sqlite_registry.reading() as session:
        assert certificates.is_revoked(session, "abc")
        with pytest.raises(EbbflowError) as caught:
            certificates.check(session, "abc")
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_creating_an_admin_again_revokes_what_it_had_but_not_what_it_calls_with(
    registry: Registry, tmp_path: Path
) -> None:
    authority = Authority.create(tmp_path / "authority")
    csr = make_csr(generate_key())
    with registry.transaction() as session:
        first = admins.create(session, authority, "ada", "owner", csr, NOW)
    with registry.transaction() as session:
        second = admins.create(session, authority, "ada", "owner", csr, NOW, keep_serial=first.serial)
    with registry.transaction() as session:
        third = admins.create(session, authority, "ada", "viewer", csr, NOW, keep_serial=second.serial)
    with registry.reading() as session:
        rows = [session.get_one(Certificate, one.serial) for one in (first, second, third)]
        assert [row.revoke_time is None for row in rows] == [False, True, True]
        assert [row.role for row in rows] == ["owner", "owner", "viewer"]


def test_senseless_admins_are_refused(sqlite_registry: Registry, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority")
    csr, day = make_csr(generate_key()), dt.timedelta(days=1)
    for admin_id, role, lifetime in [("Ada", "owner", day), ("ada", "king", day), ("ada", "owner", -day)]:
        with pytest.raises(EbbflowError) as caught, sqlite_registry.transaction() as session:
            admins.create(session, authority, admin_id, role, csr, NOW, lifetime)
        assert caught.value.reason is Reason.INVALID_REQUEST
