"""How much an agent may say of itself: all of it is kept."""

from google.protobuf.message import Message

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.common.errors import EbbflowError, Reason

MAX_PROFILE_BYTES = 1024
MAX_HEARTBEAT_BYTES = 16 * 1024


def check_profile(profile: resources_pb2.DeviceProfile) -> None:
    """Raises INVALID_REQUEST if a profile is too long to keep."""
    _check(profile, MAX_PROFILE_BYTES, "profile")


def check_heartbeat(heartbeat: agent_pb2.Heartbeat) -> None:
    """Raises INVALID_REQUEST if a heartbeat is too long to keep."""
    _check(heartbeat, MAX_HEARTBEAT_BYTES, "heartbeat")


def _check(message: Message, most_bytes: int, field: str) -> None:
    if message.ByteSize() > most_bytes:
        raise EbbflowError(Reason.INVALID_REQUEST, f"{field} has at most {most_bytes} bytes", field=field)
