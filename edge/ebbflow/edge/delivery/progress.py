"""What is being fetched, for whoever asks."""

from dataclasses import dataclass

from ebbflow.edge.delivery.plan import Way


@dataclass
class Progress:
    """Written by the thread that installs, read by any other; each field is right by itself."""

    student: str = ""
    """Student id; empty while nothing is being fetched."""
    number: int = 0
    way: Way | None = None
    """None until it is chosen."""
    size_bytes: int = 0
    """Of the weights, or of the delta to them."""
    done_bytes: int = 0
    """How many of them are there."""
    failed_deltas: int = 0
    """Deltas that did not lead to the signed file since the process started."""

    def begin(self, student: str, number: int) -> None:
        """An installation begins."""
        self.student, self.number = student, number
        self.way, self.size_bytes, self.done_bytes = None, 0, 0

    def choose(self, way: Way, size_bytes: int) -> None:
        """The way is chosen."""
        self.way, self.size_bytes, self.done_bytes = way, size_bytes, 0

    def end(self) -> None:
        """It is over."""
        self.student = ""
