"""Which pages of the KV cache hold what: paged sequences, and beginnings of prompts that they share.

A page holds the keys and values of 32 tokens, of all layers. A full page is known by the page before it and its own
tokens, so that another sequence with the same beginning can take it over; a page that no sequence holds any more stays
until its room is needed, the least recently used first. Where the bytes lie is the business of a `Store`; here are
numbers only.

Source: Kwon et al., PagedAttention (arXiv 2309.06180).
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ebbflow.common.errors import EbbflowError, Reason

PAGE_TOKENS = 32


class Store(Protocol):
    """The memory of pages, by number."""

    def grow(self, page: int) -> None:
        """Takes memory for a page that has none; OUT_OF_MEMORY if there is none."""

    def shrink(self, page: int) -> None:
        """Gives the memory of a page back."""


@dataclass(slots=True, eq=False)
class Pages:
    """The pages of one sequence."""

    length: int = 0
    """Tokens that are kept."""
    pages: list[int] = field(default_factory=list)
    """By 32 tokens; there may be more than the tokens need."""
    node: int | None = None
    """Names the beginning that the full pages make up; None once they cannot be shared any more."""
    tail: list[int] = field(default_factory=list)
    """Tokens behind the last full page."""


class PageBook:
    """Hands out pages and takes them back.

    One thread owns it, but `set_limit` and the counts may be called by any.

    Args:
        store: where the bytes lie.
        limit: most pages that have memory; None for no limit.
        retained_most: most pages that are kept though no sequence holds them.
    """

    def __init__(self, store: Store, limit: int | None, retained_most: int) -> None:
        self._store, self._limit, self._retained_most = store, limit, retained_most
        self._lock = threading.Lock()
        self._holders: dict[int, int] = {}
        self._free: list[int] = []
        self._named: dict[tuple[int, tuple[int, ...]], int] = {}
        self._name: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._node: dict[int, int] = {}
        self._retained: OrderedDict[int, None] = OrderedDict()
        self._roots: dict[str, int] = {}
        self._next_node = 0
        self.capacity = 0
        """Pages have numbers below it."""
        self.hits_tokens = 0
        self.asked_tokens = 0

    @property
    def allocated(self) -> int:
        """Pages that have memory."""
        return len(self._holders) + len(self._retained)

    @property
    def used(self) -> int:
        """Pages that sequences hold; one that several hold counts once."""
        return len(self._holders)

    def open(self, origin: str) -> Pages:
        """Returns an empty sequence; it shares pages with those of the same origin only, such as the same weights."""
        if origin not in self._roots:
            self._roots[origin] = self._new_node()
        return Pages(node=self._roots[origin])

    def reuse(self, sequence: Pages, token_ids: Sequence[int]) -> int:
        """Lets an empty sequence take over the known beginning of a prompt.

        Returns:
            Tokens that are kept now: whole pages, and less than the prompt.
        """
        if sequence.length or sequence.node is None:
            return 0
        with self._lock:
            self.asked_tokens += len(token_ids)
            for begin in range(0, len(token_ids) - PAGE_TOKENS, PAGE_TOKENS):
                page = self._named.get((sequence.node, tuple(token_ids[begin : begin + PAGE_TOKENS])))
                if page is None:
                    break
                self._hold(page)
                sequence.pages.append(page)
                sequence.node = self._node[page]
            sequence.length = len(sequence.pages) * PAGE_TOKENS
            self.hits_tokens += sequence.length
        return sequence.length

    def reserve(self, wanted: Sequence[tuple[Pages, int]]) -> None:
        """Gives sequences the pages that so many more tokens need: all of them or none.

        Raises:
            EbbflowError: OUT_OF_MEMORY if they do not fit; nothing has changed then.
        """
        with self._lock:
            counts = [pages_for(sequence.length + count) - len(sequence.pages) for sequence, count in wanted]
            total = sum(count for count in counts if count > 0)
            if not total:
                return
            taken = self._take(total)
            for (sequence, _), count in zip(wanted, counts, strict=True):
                for _ in range(count):
                    sequence.pages.append(taken.pop())

    def keep(self, sequence: Pages, token_ids: Sequence[int]) -> bool:
        """Counts tokens as kept, whose keys and values are in the pages by now, and makes full pages known.

        Returns:
            Whether pages were exchanged for ones with the same content.
        """
        sequence.length += len(token_ids)
        if sequence.node is None:
            return False
        sequence.tail.extend(token_ids)
        if len(sequence.tail) < PAGE_TOKENS:
            return False
        exchanged = False
        with self._lock:
            while len(sequence.tail) >= PAGE_TOKENS and sequence.node is not None:
                index = (sequence.length - len(sequence.tail)) // PAGE_TOKENS
                name = (sequence.node, tuple(sequence.tail[:PAGE_TOKENS]))
                del sequence.tail[:PAGE_TOKENS]
                exchanged |= self._publish(sequence, index, name)
        return exchanged

    def close(self, sequence: Pages) -> None:
        """Takes the pages of a sequence back; the last page first, so that no page outlives the one before it."""
        with self._lock:
            for page in reversed(sequence.pages):
                self._drop(page)
            self._trim()
        sequence.pages, sequence.length, sequence.node, sequence.tail = [], 0, None, []

    def set_limit(self, limit: int | None) -> None:
        """Changes how many pages may have memory, and lets go of unheld ones beyond it.

        Raises:
            EbbflowError: OUT_OF_MEMORY if sequences hold more; nothing has changed then.
        """
        with self._lock:
            if limit is not None and self.used > limit:
                raise _no_room(self.used, limit)
            self._limit = limit
            self._trim()

    def forget(self) -> None:
        """Lets go of every page that no sequence holds, and shares none of the others any more."""
        with self._lock:
            while self._retained:
                self._evict()
            for name in list(self._named):
                del self._named[name]
            self._name.clear()
            self._node.clear()
            self._roots.clear()

    def _take(self, count: int) -> list[int]:
        room = None if self._limit is None else self._limit - self.used
        if room is not None and count > room:
            raise _no_room(self.used + count, self.used + room)
        taken: list[int] = []
        try:
            while len(taken) < count:
                taken.append(self._take_one())
        except EbbflowError:
            for page in taken:
                self._drop(page)
            raise
        return taken

    def _take_one(self) -> int:
        if self._limit is not None and self.allocated >= self._limit:
            page, _ = self._retained.popitem(last=False)  # its memory becomes the new page's
            self._unname(page)
        else:
            page = self._free.pop() if self._free else self.capacity
            try:
                self._store.grow(page)
            except EbbflowError:
                if page < self.capacity:
                    self._free.append(page)
                raise
            self.capacity = max(self.capacity, page + 1)
        self._holders[page] = 1
        return page

    def _publish(self, sequence: Pages, index: int, name: tuple[int, tuple[int, ...]]) -> bool:
        """Makes a full page known, or exchanges it for the one that is known already."""
        page, known = sequence.pages[index], self._named.get(name)
        if known is None:
            self._named[name], self._name[page], self._node[page] = page, name, self._new_node()
            sequence.node = self._node[page]
            return False
        self._hold(known)
        sequence.pages[index] = known
        sequence.node = self._node[known]
        self._drop(page)
        return True

    def _hold(self, page: int) -> None:
        if page in self._retained:
            del self._retained[page]
            self._holders[page] = 1
        else:
            self._holders[page] += 1

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page]:
            return
        del self._holders[page]
        if page in self._name:
            self._retained[page] = None
        else:
            self._release(page)

    def _trim(self) -> None:
        while self._retained and (
            len(self._retained) > self._retained_most or (self._limit is not None and self.allocated > self._limit)
        ):
            self._evict()

    def _evict(self) -> None:
        page, _ = self._retained.popitem(last=False)
        self._unname(page)
        self._release(page)

    def _release(self, page: int) -> None:
        self._store.shrink(page)
        self._free.append(page)

    def _unname(self, page: int) -> None:
        del self._named[self._name.pop(page)]
        del self._node[page]

    def _new_node(self) -> int:
        self._next_node += 1
        return self._next_node


def pages_for(tokens: int) -> int:
    """Pages that so many tokens of one sequence need."""
    return -(-tokens // PAGE_TOKENS)


def _no_room(needed: int, limit: int) -> EbbflowError:
    message = f"the KV cache needs {needed} pages of {PAGE_TOKENS} tokens where {limit} are allowed"
    return EbbflowError(Reason.OUT_OF_MEMORY, message, needed_pages=needed, limit_pages=limit)
