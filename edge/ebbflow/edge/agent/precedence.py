"""In which order students are seen to, and whose wish may put off the transfer of another one."""

from collections.abc import Iterable

from ebbflow.api.v1 import agent_pb2


class Precedence:
    """Who was seen to last comes last; a wish that was never seen to comes first."""

    def __init__(self) -> None:
        self._seen: dict[str, bytes] = {}  # by student, the last one at the end: the wish that had its turn
        self._known: set[bytes] = set()

    def begin(self, ready: Iterable[agent_pb2.DesiredRelease]) -> None:
        """A look begins.

        Args:
            ready: what does not wait for its time. It stands in line from here on, whether or not it was refused, and
                puts nobody off: so two students cannot put each other off by turns.
        """
        self._known = set(map(said_of, ready))

    def order(self, releases: Iterable[agent_pb2.DesiredRelease]) -> list[agent_pb2.DesiredRelease]:
        """Returns them in the order of their turns."""
        places = {student: place for place, student in enumerate(self._seen)}

        def place(desired: agent_pb2.DesiredRelease) -> int:
            seen = self._seen.get(desired.student) == wish_of(desired)
            return places[desired.student] if seen else -1

        return sorted(releases, key=place)

    def take(self, desired: agent_pb2.DesiredRelease) -> None:
        """A wish has its turn now."""
        self._seen.pop(desired.student, None)
        self._seen[desired.student] = wish_of(desired)

    def is_new(self, desired: agent_pb2.DesiredRelease) -> bool:
        """Whether it was not in line when the look began."""
        return said_of(desired) not in self._known


def said_of(desired: agent_pb2.DesiredRelease) -> bytes:
    """What is desired, and when it may begin."""
    return desired.SerializeToString(deterministic=True)


def wish_of(desired: agent_pb2.DesiredRelease) -> bytes:
    """What is desired, whenever it may begin."""
    wish = agent_pb2.DesiredRelease()
    wish.CopyFrom(desired)
    wish.ClearField("not_before_time")
    return said_of(wish)
