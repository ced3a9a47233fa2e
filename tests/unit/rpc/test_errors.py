from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.errors import from_rpc_error, to_status


class Failure(grpc.RpcError):
    """What a stub raises, with the fields that the wire carries."""

    def __init__(self, code: grpc.StatusCode, details: str | None = None, metadata: Any = ()) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


_FACTS = st.dictionaries(st.from_regex(r"fact_[a-z]{0,8}", fullmatch=True), st.text(max_size=20))


@given(st.sampled_from(list(Reason)), st.text(max_size=50), _FACTS)
def test_an_error_arrives_as_it_was_raised(reason: Reason, message: str, facts: dict[str, str]) -> None:
    status = to_status(
        EbbflowError(reason, message, **{key: value for key, value in facts.items() if key != "message"})
    )
    arrived = from_rpc_error(Failure(status.code, status.details, status.trailing_metadata))
    assert (arrived.reason, str(arrived)) == (reason, message)
    assert arrived.metadata == facts
    assert status.code.value[0] == reason.value.code.value


def test_a_time_to_wait_travels_as_retry_info() -> None:
    status = to_status(EbbflowError(Reason.QUOTA_EXHAUSTED, "too much", retry_after_s=1.5))
    sent = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert sent.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.SERVER_UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, Reason.SERVER_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.INTERNAL),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL),
        (grpc.StatusCode.UNAUTHENTICATED, Reason.CERTIFICATE_INVALID),
    ],
)
def test_a_failure_that_nobody_of_ours_raised_names_the_address(code: grpc.StatusCode, reason: Reason) -> None:
    error = from_rpc_error(Failure(code), "cloud.example:8443")
    assert error.reason is reason
    assert "cloud.example:8443" in str(error)


def test_a_server_of_another_authority_or_name_is_told_apart_from_one_that_is_down() -> None:
    other = Failure(grpc.StatusCode.UNAVAILABLE, "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED: self signed")
    assert from_rpc_error(other).reason is Reason.AUTHORITY_MISMATCH
    name = Failure(
        grpc.StatusCode.UNAVAILABLE, "Custom verification check failed with error: Hostname Verification Check failed."
    )
    error = from_rpc_error(name, "10.0.0.1:8443")
    assert error.reason is Reason.CONFIG_INVALID
    assert "hosts" in str(error)


def test_details_of_others_or_of_a_newer_version_fall_back_to_the_status() -> None:
    for info in [
        error_details_pb2.ErrorInfo(reason="STUDENT_NOT_FOUND", domain="elsewhere.example"),
        error_details_pb2.ErrorInfo(reason="INVENTED_LATER", domain="ebbflow"),
    ]:
        packed = any_pb2.Any()
        packed.Pack(info)
        details = status_pb2.Status(code=9, message="no", details=[packed]).SerializeToString()
        failure = Failure(grpc.StatusCode.FAILED_PRECONDITION, "no", [("grpc-status-details-bin", details)])
        assert from_rpc_error(failure).reason is Reason.STATE_CONFLICT
    garbage = Failure(grpc.StatusCode.INVALID_ARGUMENT, "no", [("grpc-status-details-bin", b"\xff\xff")])
    assert from_rpc_error(garbage).reason is Reason.INVALID_REQUEST
    assert from_rpc_error(grpc.RpcError()).reason is Reason.INTERNAL
