"""How many bytes a release has cost so far, over all attempts to install it."""


class Tally:
    """Counts by student; a new wish begins anew."""

    def __init__(self) -> None:
        self._wishes: dict[str, tuple[bytes, int]] = {}

    def add(self, student: str, wish: bytes, fetched_bytes: int, resumed_bytes: int) -> int:
        """Counts one attempt.

        Args:
            student: whose release it is.
            wish: what is being installed.
            fetched_bytes: bytes that the attempt fetched.
            resumed_bytes: bytes that lay there before it. They count if nobody counted them in this process: they came
                before a restart.

        Returns:
            Bytes that came for this wish.
        """
        known, total = self._wishes.get(student, (b"", 0))
        total = (total if known == wish else resumed_bytes) + fetched_bytes
        self._wishes[student] = (wish, total)
        return total
