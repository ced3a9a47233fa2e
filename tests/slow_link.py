"""A link between a device and its cloud that can be slow, and that counts what passes. For tests of delivery."""

import socket
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Link:
    """Forwards TCP connections to a port of this machine.

    Attributes:
        rate: bytes a second towards the device; 0 for as fast as it goes.
        passed: when how many bytes passed towards the device.
    """

    port: int
    rate: int = 0
    passed: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Hangs up on everyone."""
        for opened in self._open:
            opened.close()

    def most_in(self, span_s: float) -> int:
        """Most bytes that passed within any span of so many seconds."""
        most = begin = total = 0
        for at_s, size_bytes in self.passed:
            total += size_bytes
            while at_s - self.passed[begin][0] > span_s:
                total -= self.passed[begin][1]
                begin += 1
            most = max(most, total)
        return most

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
                cloud = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                return
            cloud.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            self._open += [device, cloud]
            threading.Thread(target=self._carry, args=(device, cloud, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(cloud, device, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        try:
            while data := source.recv(1 << 12):
                sink.sendall(data)
                if down:
                    self.passed.append((time.monotonic(), len(data)))
                    if self.rate:
                        time.sleep(len(data) / self.rate)
        except OSError:
            pass
        for end in (source, sink):
            end.close()
