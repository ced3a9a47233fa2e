"""A wire between agents and cloud that can be slow, broken, or cut."""

import contextlib
import selectors
import socket
import threading
import time

_BLOCK_BYTES = 32 * 1024


class Wire:
    """Forwards TCP connections on a port of its own. Thread-safe.

    Attributes:
        bytes_per_second: speed towards the agents, of all connections together; 0 for no limit.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        """Begins to listen."""
        self.target, self.bytes_per_second, self._up = target, 0, True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._free_s = 0.0
        threading.Thread(target=self._accept, name="wire", daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection and refuses new ones."""
        self._up = False
        self.shake()

    def join(self) -> None:
        """Lets connections through again."""
        self._up = True

    def shake(self) -> None:
        """Breaks every connection."""
        with self._lock:
            for pair in self._pairs:
                for end in pair:
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                agent, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(agent,), daemon=True).start()

    def _connect(self, agent: socket.socket) -> None:
        with agent:
            if not self._up:
                return
            try:
                cloud = socket.create_connection(self.target, 5)
            except OSError:
                return
            with cloud:
                self._forward(agent, cloud)

    def _forward(self, agent: socket.socket, cloud: socket.socket) -> None:
        pair = (agent, cloud)
        with self._lock:
            self._pairs.add(pair)
        try:
            with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
                selector.register(agent, selectors.EVENT_READ, cloud)
                selector.register(cloud, selectors.EVENT_READ, agent)
                while self._up:
                    for key, _ in selector.select(0.5):
                        source: socket.socket = key.fileobj  # type: ignore[assignment]
                        block = source.recv(_BLOCK_BYTES)
                        if not block:
                            return
                        if source is cloud:
                            self._pace(len(block))
                        key.data.sendall(block)
        finally:
            with self._lock:
                self._pairs.discard(pair)

    def _pace(self, size_bytes: int) -> None:
        """Waits until the line is free for so many bytes."""
        if not (speed := self.bytes_per_second):  # read once: another thread changes it
            return
        with self._lock:
            begin_s = max(time.monotonic(), self._free_s)
            self._free_s = begin_s + size_bytes / speed
        time.sleep(max(0.0, begin_s - time.monotonic()))
