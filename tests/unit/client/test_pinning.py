import datetime as dt
import hashlib
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from ebbflow.client.context import AdminContext, find_context, write_context
from ebbflow.client.pinning import fetch_authority
from ebbflow.cloud.identity.authority import Authority
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr


def test_the_pinned_authority_is_read_from_what_the_server_presents(live: Any) -> None:
    pem = fetch_authority(live.address, live.authority.sha256)
    assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest() == live.authority.sha256
    assert fetch_authority(live.address.replace("127.0.0.1", "localhost"), live.authority.sha256) == pem


def test_a_server_of_another_authority_is_refused(live: Any, tmp_path: Path) -> None:
    with pytest.raises(EbbflowError, match=live.address) as caught:
        fetch_authority(live.address, Authority.create(tmp_path / "other").sha256)
    assert caught.value.reason is Reason.AUTHORITY_MISMATCH


def test_a_server_that_does_not_answer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for wrong in (address, "no.such.host.invalid:1", "nonsense", "127.0.0.1:x"):
        with pytest.raises(EbbflowError) as caught:
            fetch_authority(wrong, "00" * 32)
        assert caught.value.reason is Reason.SERVER_UNAVAILABLE


def test_a_server_that_hangs_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(EbbflowError) as caught:
            fetch_authority(f"127.0.0.1:{silent.getsockname()[1]}", "00" * 32, timeout_s=0.2)
        assert caught.value.reason is Reason.SERVER_UNAVAILABLE


def test_a_server_that_speaks_something_else_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(EbbflowError, match="TLS") as caught:
            fetch_authority(f"127.0.0.1:{listener.getsockname()[1]}", "00" * 32)
        thread.join(5)
    assert caught.value.reason is Reason.AUTHORITY_MISMATCH


def _write(folder: Path, lifetime: dt.timedelta = dt.timedelta(days=1), age: dt.timedelta = dt.timedelta(0)) -> Path:
    authority, key = Authority.create(folder / "authority"), generate_key()
    issued = authority.issue_admin(make_csr(key), "ada", "owner", lifetime, dt.datetime.now(dt.UTC) - age)
    pems = authority.certificate_pem, issued.certificate_pem, key_to_pem(key)
    return write_context(folder / "admin", "127.0.0.1:8443", *pems)


def test_a_context_is_read_as_it_was_written_and_its_key_is_private(tmp_path: Path) -> None:
    path = _write(tmp_path)
    endpoint = AdminContext.load(path).endpoint()
    assert endpoint.address == "127.0.0.1:8443"
    assert endpoint.key_pem is not None
    assert endpoint.key_pem.decode() not in repr(endpoint)
    assert (path.parent / "admin.key.pem").stat().st_mode & 0o77 == 0


def test_an_expired_certificate_is_said_before_any_call(tmp_path: Path) -> None:
    path = _write(tmp_path, dt.timedelta(days=1), dt.timedelta(days=2))
    with pytest.raises(EbbflowError, match="admins/ada") as caught:
        AdminContext.load(path).endpoint()
    assert caught.value.reason is Reason.CERTIFICATE_EXPIRED


def test_a_missing_or_wrong_context_names_its_file(tmp_path: Path) -> None:
    path = _write(tmp_path)
    with pytest.raises(EbbflowError, match="EBBFLOW_CONTEXT") as caught:
        AdminContext.load(tmp_path / "none.toml")
    assert caught.value.reason is Reason.NOT_INITIALISED
    (path.parent / "admin.key.pem").unlink()
    with pytest.raises(EbbflowError, match=r"admin\.key\.pem") as caught:
        AdminContext.load(path).endpoint()
    assert caught.value.reason is Reason.CONFIG_INVALID
    for text in ('address = "a:1"\nkey = 3', "not toml at all ="):
        path.write_text(text)
        with pytest.raises(EbbflowError, match=r"context\.toml") as caught:
            AdminContext.load(path)
        assert caught.value.reason is Reason.CONFIG_INVALID


def test_the_explicit_context_wins_over_the_environment_and_that_over_the_users(tmp_path: Path) -> None:
    environment = {"EBBFLOW_CONTEXT": "/b.toml", "XDG_CONFIG_HOME": "/c"}
    assert find_context(Path("/a.toml"), environment) == Path("/a.toml")
    assert find_context(None, environment) == Path("/b.toml")
    assert find_context(None, {"XDG_CONFIG_HOME": "/c"}) == Path("/c/ebbflow/context.toml")
