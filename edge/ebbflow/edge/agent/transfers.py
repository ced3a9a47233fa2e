"""What a running agent says of its transfers, and how that reads."""

import datetime as dt

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.common import names
from ebbflow.edge.delivery.plan import Way
from ebbflow.edge.delivery.progress import Progress
from ebbflow.edge.delivery.traffic import Traffic

_WAYS = {
    Way.FULL: pb.Transfer.WAY_FULL,
    Way.DELTA: pb.Transfer.WAY_DELTA,
    Way.DERIVED: pb.Transfer.WAY_DERIVED,
}
_WORDS = {
    pb.Transfer.WAY_UNSPECIFIED: "looking for a way",
    pb.Transfer.WAY_FULL: "the full file",
    pb.Transfer.WAY_DELTA: "a delta",
    pb.Transfer.WAY_DERIVED: "derived on the device",
}
_MB = 1e6


def transfers(progress: Progress, traffic: Traffic) -> pb.GetModelStatusResponse:
    """Returns the part of a status that is about transfers."""
    answer = pb.GetModelStatusResponse(bandwidth_limit=traffic.rate, failed_deltas=progress.failed_deltas)
    if student := progress.student:
        release = names.release(student, progress.number)
        way = _WAYS[progress.way] if progress.way else pb.Transfer.WAY_UNSPECIFIED
        size_bytes, done_bytes = progress.size_bytes, progress.done_bytes
        transfer = pb.Transfer(release=release, way=way, size_bytes=size_bytes, done_bytes=min(done_bytes, size_bytes))
        answer.transfer.CopyFrom(transfer)
    if opens := traffic.next_window_time():
        answer.next_window_time.FromDatetime(opens)
    return answer


def lines(answer: pb.GetModelStatusResponse) -> list[str]:
    """Returns the same for people; nothing where there is nothing to say."""
    said = []
    if answer.HasField("transfer"):
        transfer = answer.transfer
        far = f": {transfer.done_bytes / _MB:.1f} of {transfer.size_bytes / _MB:.1f} MB" if transfer.size_bytes else ""
        said.append(f"Fetching {transfer.release}, {_WORDS[transfer.way]}{far}")
    if answer.bandwidth_limit:
        said.append(f"Bandwidth limit: {answer.bandwidth_limit / _MB:g} MB/s")
    if answer.HasField("next_window_time"):
        opens = answer.next_window_time.ToDatetime(dt.UTC)
        said.append(f"Next transfer window: {opens:%Y-%m-%d %H:%M} UTC")
    if answer.failed_deltas:
        said.append(f"Deltas that failed, with the full file fetched instead: {answer.failed_deltas}")
    return said
