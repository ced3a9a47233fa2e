"""Takes the bytes out of a `ReadBlobResponse` without copying them, which protobuf does twice."""

from ebbflow.api.v1.artefact_pb2 import ReadBlobResponse

Chunk = bytes | memoryview

_TAG = ReadBlobResponse.CHUNK_FIELD_NUMBER << 3 | 2  # field, length-delimited
_MORE, _BITS = 0x80, 7
_LONGEST = 6
"""Longest tag and length of a message that gRPC lets through."""


def chunk_of(message: bytes) -> Chunk:
    """Returns the field `chunk` of a serialised `ReadBlobResponse`.

    Raises:
        google.protobuf.message.DecodeError: if it is none.
    """
    if message[:1] == bytes([_TAG]):
        length = 0
        for place, digit in enumerate(message[1:_LONGEST]):
            length |= (digit & (_MORE - 1)) << (_BITS * place)
            if digit < _MORE:
                begin = place + 2
                if begin + length == len(message):
                    return memoryview(message)[begin:]
                break
    return ReadBlobResponse.FromString(message).chunk  # a newer server may say more than that
