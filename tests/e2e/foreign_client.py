"""A gRPC client that knows nothing of Ebbflow: what to call and how, it learns from server reflection.

Run by test_foreign_client.py with `python -I -S`, so that it can import the standard library and the one folder that
its first argument names. The second argument is a JSON object; the answer is one too.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

LIBRARIES, QUESTION = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, LIBRARIES)

import grpc  # noqa: E402
from google.protobuf import json_format, message_factory  # noqa: E402
from google.protobuf.descriptor_pool import DescriptorPool  # noqa: E402
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (  # noqa: E402
    ProtoReflectionDescriptorDatabase,
)

TIMEOUT_S = 20.0


def open_channel() -> grpc.Channel:
    """Opens the target: without TLS if no authority is named, without a certificate if none is."""
    if "authority" not in QUESTION:
        return grpc.insecure_channel(QUESTION["target"])
    names = ("authority", "key", "certificate")
    authority, key, certificate = (Path(QUESTION[n]).read_bytes() if QUESTION.get(n) else None for n in names)
    return grpc.secure_channel(QUESTION["target"], grpc.ssl_channel_credentials(authority, key, certificate))


def call(channel: grpc.Channel, pool: DescriptorPool, path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Calls a method by its full name, with messages that were unknown a moment ago."""
    service, _, name = path.partition("/")
    method = pool.FindServiceByName(service).FindMethodByName(name)
    question = message_factory.GetMessageClass(method.input_type)
    answer = message_factory.GetMessageClass(method.output_type)
    kind: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    invoke = kind(f"/{path}", request_serializer=question.SerializeToString, response_deserializer=answer.FromString)
    found = invoke(json_format.ParseDict(request, question()), timeout=TIMEOUT_S)
    messages = list(found) if method.server_streaming else [found]
    return {"messages": [json_format.MessageToDict(m, preserving_proto_field_name=True) for m in messages]}


def main() -> dict[str, Any]:
    """Lists the services, then makes the calls that were asked for."""
    if importlib.util.find_spec("ebbflow") is not None:
        return {"error": "Ebbflow's own code can be imported: this proves nothing"}
    with open_channel() as channel:
        if "raw" in QUESTION:  # a method that reflection does not list
            send: Any = channel.unary_unary(QUESTION["raw"])
            return {"messages": [send(b"", timeout=TIMEOUT_S).decode()]}
        database = ProtoReflectionDescriptorDatabase(channel)
        services = sorted(database.get_services())
        pool = DescriptorPool(database)
        calls = [call(channel, pool, path, request) for path, request in QUESTION.get("calls", [])]
    return {"services": services, "calls": calls}


try:
    print(json.dumps(main()))
except grpc.RpcError as error:
    status: Any = error
    print(json.dumps({"refused": status.code().name, "details": status.details()}))
