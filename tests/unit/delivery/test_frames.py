"""What the fast reader of chunks says is what protobuf says."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1.artefact_pb2 import ReadBlobResponse
from ebbflow.edge.delivery.frames import chunk_of


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 1 << 20, (1 << 21) - 1, 1 << 21])
def test_a_chunk_of_any_length_comes_out(size: int) -> None:
    data = bytes(size)
    assert chunk_of(ReadBlobResponse(chunk=data).SerializeToString()) == data


@given(message=st.binary(max_size=40) | st.binary(max_size=40).map(lambda rest: b"\x0a" + rest))
def test_it_never_says_anything_else_than_protobuf(message: bytes) -> None:
    try:
        expected = ReadBlobResponse.FromString(message).chunk
    except DecodeError:
        with pytest.raises(DecodeError):
            chunk_of(message)
    else:
        assert chunk_of(message) == expected


@given(chunk=st.binary(max_size=300), more=st.binary(max_size=300))
def test_fields_of_a_newer_server_are_passed_over(chunk: bytes, more: bytes) -> None:
    unknown = b"\x7a" + ReadBlobResponse(chunk=more).SerializeToString()[1:] if more else b""
    message = ReadBlobResponse(chunk=chunk).SerializeToString()
    assert chunk_of(unknown + message) == chunk
    assert chunk_of(message + unknown) == chunk
