"""Asks a running agent what it serves, and says it."""

import datetime as dt
from collections.abc import Iterator
from io import StringIO

import grpc
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import inference_pb2_grpc, resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.errors import from_rpc_error
from ebbflow.edge.agent.endpoints import Endpoints, running
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.transfers import lines

_TIMEOUT_S = 5.0
_WIDTH = 140


def ask(settings: AgentSettings, address: str = "") -> pb.GetModelStatusResponse:
    """Asks the agent of a state folder, or the one at an address.

    Raises:
        EbbflowError: AGENT_UNREACHABLE.
    """
    where = _at(settings, address) if address else running(settings.folder)
    try:
        with _channel(settings, where) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return stub.GetModelStatus(pb.GetModelStatusRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        found = from_rpc_error(error, where.grpc)
        if found.reason in {Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED}:
            message = f"no agent answers at {where.grpc}"
            raise EbbflowError(Reason.AGENT_UNREACHABLE, message, address=where.grpc) from error
        raise found from error


def as_json(answer: pb.GetModelStatusResponse) -> str:
    """Returns the answer as JSON (the proto JSON mapping)."""
    return MessageToJson(answer, always_print_fields_with_no_presence=True)


def as_table(answer: pb.GetModelStatusResponse) -> str:
    """Returns the answer for people."""
    table = Table("STUDENT", "RELEASE", "PRECISION", "ENGINE", "CONTEXT", "LAST INSTALLATION", box=None)
    for model in answer.models:
        release = model.release.rpartition("/")[2] or "-"
        context = str(model.context_tokens or "-")
        table.add_row(model.student, release, _precision(model), model.engine or "-", context, _last(model))
    out = StringIO()
    console = Console(file=out, width=_WIDTH)
    console.print(table if answer.models else "No release is installed yet.")
    for line in (*_governors(answer), *lines(answer), f"Cloud: {_line(answer)}"):
        console.print(line, markup=False, soft_wrap=True)
    return out.getvalue().rstrip()


def _governors(answer: pb.GetModelStatusResponse) -> Iterator[str]:
    for model in answer.models:
        if model.HasField("governor"):
            since = model.governor.change_time.ToDatetime(dt.UTC)
            yield f"{model.student} since {since:%Y-%m-%d %H:%M} UTC: {model.governor.reason}"


def _at(settings: AgentSettings, address: str) -> Endpoints:
    return Endpoints(http="", grpc=address, grpc_tls=settings.grpc_certificate is not None)


def _channel(settings: AgentSettings, where: Endpoints) -> grpc.Channel:
    if not where.grpc_tls:
        return grpc.insecure_channel(where.grpc)
    if settings.grpc_certificate is None:
        message = "the agent speaks TLS: name its certificate with grpc_certificate in --config"
        raise EbbflowError(Reason.CONFIG_INVALID, message, field="grpc_certificate")
    return grpc.secure_channel(where.grpc, grpc.ssl_channel_credentials(settings.grpc_certificate.read_bytes()))


def _precision(model: pb.ModelStatus) -> str:
    name = resources_pb2.Precision.Name(model.precision)
    return name.removeprefix("PRECISION_").lower() if model.precision else "-"


def _last(model: pb.ModelStatus) -> str:
    last = model.last_installation
    if not last.release:
        return "-"
    state = resources_pb2.InstallationState.Name(last.state).removeprefix("INSTALLATION_STATE_").lower()
    number = last.release.rpartition("/")[2]
    return f"{number} {state}: {last.reason}" if last.reason else f"{number} {state}"


def _line(answer: pb.GetModelStatusResponse) -> str:
    if answer.connected:
        return "connected"
    reason = Reason.__members__.get(answer.disconnected_reason)
    if reason is None:
        return "not connected yet"
    return f"not connected ({reason.name}): {reason.value.cure} Serving goes on."
