"""Whether a device may ask the teacher now: budget, what the cloud allows, how the last attempts went. No IO."""

from collections import deque

PERMISSION_S = 600.0
"""How long the cloud's word holds."""
FIRST_HOLD_S = 15.0
MOST_HOLD_S = 600.0


class Allowance:
    """Counts questions and remembers refusals. Not thread-safe: the event loop asks.

    Times are seconds of a clock that never goes back.
    """

    def __init__(self, most: int, window_s: float) -> None:
        """Lets `most` questions leave the device in any window of `window_s` seconds."""
        self._most, self._window_s = most, window_s
        self._sent: deque[float] = deque()
        self._permissions: dict[str, tuple[bool, float]] = {}
        self._held_until_s = float("-inf")
        self._failures = 0

    def permission(self, student: str, now_s: float) -> bool | None:
        """What the cloud said of a student; None if it has not, or long ago."""
        allowed, until_s = self._permissions.get(student, (False, float("-inf")))
        return allowed if now_s < until_s else None

    def learn(self, student: str, now_s: float, *, allowed: bool) -> None:
        """The cloud has spoken of a student."""
        self._permissions[student] = (allowed, now_s + PERMISSION_S)

    def open(self, student: str, now_s: float) -> bool:
        """Whether nothing that is known stands against asking."""
        self._forget(now_s)
        spent = len(self._sent) >= self._most
        return not spent and now_s >= self._held_until_s and self.permission(student, now_s) is not False

    def take(self, now_s: float) -> bool:
        """Takes one question out of the budget; False if it is spent. What was sent stays spent, answered or not."""
        self._forget(now_s)
        if len(self._sent) >= self._most:
            return False
        self._sent.append(now_s)
        return True

    def succeeded(self) -> None:
        """The teacher has answered."""
        self._failures = 0

    def failed(self, now_s: float, retry_after_s: float = 0.0) -> None:
        """The teacher has not answered: nothing is asked for a while, for longer each time in a row.

        Args:
            now_s: when.
            retry_after_s: the wait that the cloud asks for; then it is there, and the wait is that one.
        """
        if retry_after_s > 0:
            wait_s = min(retry_after_s, MOST_HOLD_S)
        else:
            wait_s = min(FIRST_HOLD_S * 2.0 ** min(self._failures, 16), MOST_HOLD_S)
            self._failures += 1
        self._held_until_s = max(self._held_until_s, now_s + wait_s)

    def _forget(self, now_s: float) -> None:
        while self._sent and self._sent[0] <= now_s - self._window_s:
            self._sent.popleft()
