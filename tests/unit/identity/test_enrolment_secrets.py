import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.tokens import EnrolmentSecret

PIN = "5f" * 32


@given(st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True), st.binary(min_size=32, max_size=32))
def test_a_token_is_read_as_it_was_printed(token_id: str, pin: bytes) -> None:
    secret = EnrolmentSecret.generate(token_id, pin.hex())
    assert EnrolmentSecret.decode(f" {secret.encode()}\n") == secret


@given(st.integers(min_value=1, max_value=90))
def test_a_token_whose_end_is_missing_is_refused(missing: int) -> None:
    with pytest.raises(EbbflowError) as caught:
        EnrolmentSecret.decode(EnrolmentSecret.generate("3kq7", PIN).encode()[:-missing])
    assert caught.value.reason is Reason.TOKEN_INVALID


@pytest.mark.parametrize("text", ["", "ebb1", "ebb2.a.b.c", "ebb1..x.y", "ebb1.ä.x.y", "ebb1.a.b.c.d"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(EbbflowError, match="as it was printed"):
        EnrolmentSecret.decode(text)


def test_a_secret_shows_neither_in_its_repr_nor_in_its_hash() -> None:
    secret = EnrolmentSecret.generate("3kq7", PIN)
    assert secret.secret not in repr(secret)
    assert secret.secret not in secret.secret_sha256
