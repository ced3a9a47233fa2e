"""The fastest rival there is: a plain grpc.aio server that streams bytes from memory, with TLS and nothing else.

    python bare_stream.py receive ADDRESS AUTHORITY MODE

MODE `count` only counts what comes; `keep` also hashes it, writes it to a file and fsyncs that, as a device has to.
"""

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

CHUNK_BYTES = 1 << 20
"""The fastest of 256 KiB, 512 KiB and 1 MiB here; longer is what nobody's contract allows."""
METHOD = "/bare.Stream/Read"
WARM_UP = b"once"
_MIB = 1 << 20


def serve(size_mb: int, home: Path, said: Any) -> None:
    """Runs the server in this process for ever; tells its address and the authority's file through `said`."""
    from ebbflow.cloud.identity.authority import Authority

    authority = Authority.create(home / "authority")
    key_pem, chain_pem = authority.issue_server(["localhost"])
    (home / "authority.pem").write_bytes(authority.certificate_pem)
    data = os.urandom(size_mb * _MIB)
    chunks = [data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES)]
    del data

    async def read(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for chunk in chunks[:1] if request == WARM_UP else chunks:
            yield chunk

    async def run() -> None:
        server = grpc.aio.server()
        handlers: dict[str, Any] = {"Read": grpc.unary_stream_rpc_method_handler(read)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare.Stream", handlers)])
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key_pem, chain_pem)]))
        await server.start()
        print(
            json.dumps({"address": f"localhost:{port}", "authority": str(home / "authority.pem")}),
            file=said,
            flush=True,
        )
        await server.wait_for_termination()

    asyncio.run(run())


def receive(address: str, authority: Path, mode: str) -> None:
    """Gets ready, waits to be told, receives, and says when it had everything."""
    with (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.read_bytes())) as channel,
        tempfile.TemporaryFile(buffering=0) as file,
    ):
        read: Any = channel.unary_stream(METHOD)
        for _ in read(WARM_UP):
            pass
        print("ready", flush=True)
        sys.stdin.readline()
        before_s = time.process_time()
        size_bytes, digest = 0, hashlib.sha256()
        for chunk in read(b"all"):
            size_bytes += len(chunk)
            if mode == "keep":
                digest.update(chunk)
                file.write(chunk)
        if mode == "keep":
            os.fsync(file.fileno())
        told = {"verified_time": time.time(), "cpu_s": time.process_time() - before_s, "fetched_bytes": size_bytes}
        print(json.dumps(told), flush=True)


@contextmanager
def server(size_mb: int) -> Iterator[tuple[int, list[object]]]:
    """A server in a process of its own; yields its process id and the start of a receiver's command."""
    from delivery.receivers import start, stop

    with tempfile.TemporaryDirectory() as home:
        process = start([__file__, "serve", size_mb, home])
        try:
            assert process.stdout
            known = json.loads(process.stdout.readline())
            yield process.pid, [__file__, "receive", known["address"], known["authority"]]
        finally:
            stop(process)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), Path(sys.argv[3]), sys.stdout)
    else:
        receive(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
