"""Whose turn it is: a queue that serves users by what they had already. No threads and no clock.

Each user has a counter of the tokens that were computed for them, and the one with the least comes next: the virtual
token counter of Sheng and others, "Fairness in Serving Large Language Models" (OSDI 2024). Who comes back after a pause
starts no lower than the least of those who are there, so that nobody saves up turns. Who asks without a name shares one
user with all others who do.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """What waits: it belongs to a user."""

    @property
    def user(self) -> Hashable:
        """Who asked."""


T = TypeVar("T", bound=Owned)


class FairQueue(Generic[T]):
    """Items in the order of their turn. A user is present from their first `push` until their last item is `left`."""

    def __init__(self, most: int) -> None:
        """Takes how many may wait at a time."""
        self._most = most
        self._waiting: dict[Hashable, deque[T]] = {}
        self._present: dict[Hashable, int] = {}  # items that wait or have been taken out and not left yet
        self._served: dict[Hashable, int] = {}  # of those present, and of others that are ahead of all of them
        self._count = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def __iter__(self) -> Iterator[T]:
        """Those that wait, user by user."""
        return (item for items in self._waiting.values() for item in items)

    def push(self, item: T) -> T | None:
        """Puts an item behind its user's others.

        Returns:
            What has no place any more: None while there is room. In a full queue it is the newest item of the user who
            has most of them waiting, if that leaves them no fewer than this user; else the item itself.
        """
        dropped = None
        if self._count >= self._most:
            dropped = self._displaced(item)
            if dropped is item:
                return item
        self._enter(item.user)
        self._waiting.setdefault(item.user, deque()).append(item)
        self._count += 1
        return dropped

    def pop(self) -> T:
        """Takes out the first item of the user who has been served least; of equals, who waits longest.

        Raises:
            IndexError: nothing waits.
        """
        if not self._waiting:
            raise IndexError("the queue is empty")
        user = min(self._waiting, key=lambda user: self._served[user])
        items = self._waiting.pop(user)
        item = items.popleft()
        if items:
            self._waiting[user] = items  # behind the others of the same count
        self._count -= 1
        return item

    def charge(self, user: Hashable, tokens: int) -> None:
        """Counts work that was done for a user who is present."""
        self._served[user] += tokens

    def left(self, user: Hashable) -> None:
        """One item of a user that was taken out has ended."""
        self._present[user] -= 1
        if not self._present[user]:
            del self._present[user]
            self._forget()

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Takes out, for good, what fits a condition; returns it."""
        removed = [item for item in self if unwanted(item)]
        if removed:
            gone = set(map(id, removed))
            kept = {u: deque(item for item in items if id(item) not in gone) for u, items in self._waiting.items()}
            self._waiting = {user: items for user, items in kept.items() if items}
            self._count -= len(removed)
            for item in removed:
                self.left(item.user)
        return removed

    def _displaced(self, item: T) -> T:
        longest = max(self._waiting, key=lambda user: len(self._waiting[user]), default=None)
        if longest is None or len(self._waiting[longest]) <= len(self._waiting.get(item.user, ())) + 1:
            return item
        dropped = self._waiting[longest].pop()  # never the last one: the longest has at least two
        self._count -= 1
        self.left(longest)
        return dropped

    def _enter(self, user: Hashable) -> None:
        if user not in self._present:
            floor = min((self._served[other] for other in self._present), default=0)
            self._served[user] = max(self._served.get(user, 0), floor)
            self._present[user] = 0
        self._present[user] += 1

    def _forget(self) -> None:
        """Keeps the counters that still say something: of those present, and of who is ahead of the least of them."""
        floor = min((self._served[user] for user in self._present), default=None)
        self._served = {
            user: count
            for user, count in self._served.items()
            if user in self._present or (floor is not None and count > floor)
        }
