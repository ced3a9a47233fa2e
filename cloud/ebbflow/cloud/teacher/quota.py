"""How many tokens each caller may have the teacher compute: a token bucket for each, without IO."""

from dataclasses import dataclass

_MOST_BUCKETS = 10_000


@dataclass
class _Bucket:
    level: float
    time_s: float


class Quota:
    """Buckets that hold one minute's tokens and fill steadily. Not thread-safe: the event loop asks."""

    def __init__(self, tokens_per_minute: int) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: str, tokens: int, now_s: float) -> float:
        """Takes tokens out of a caller's bucket.

        Args:
            caller: whose.
            tokens: how many; more than a whole bucket is never granted.
            now_s: a clock that never goes back, in seconds.

        Returns:
            0 if they were granted, else the seconds after which asking again makes sense; nothing was taken then.
        """
        bucket = self._filled(caller, now_s)
        if bucket.level >= tokens:
            bucket.level -= tokens
            return 0.0
        return (tokens - bucket.level) * 60 / self.tokens_per_minute

    def give_back(self, caller: str, tokens: int, now_s: float) -> None:
        """Returns what was taken and not needed."""
        bucket = self._filled(caller, now_s)
        bucket.level = min(self.tokens_per_minute, bucket.level + tokens)

    def _filled(self, caller: str, now_s: float) -> _Bucket:
        if caller not in self._buckets and len(self._buckets) >= _MOST_BUCKETS:
            self._forget_full(now_s)
        bucket = self._buckets.setdefault(caller, _Bucket(self.tokens_per_minute, now_s))
        bucket.level = self._level(bucket, now_s)
        bucket.time_s = now_s
        return bucket

    def _level(self, bucket: _Bucket, now_s: float) -> float:
        gained = max(0.0, now_s - bucket.time_s) * self.tokens_per_minute / 60
        return min(self.tokens_per_minute, bucket.level + gained)

    def _forget_full(self, now_s: float) -> None:
        """A full bucket says nothing that a new one would not."""
        for caller, bucket in list(self._buckets.items()):
            if self._level(bucket, now_s) >= self.tokens_per_minute:
                del self._buckets[caller]
