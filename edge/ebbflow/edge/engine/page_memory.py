"""The memory of the KV cache's pages, each mapped on its own, so that what is given back is back at once."""

import mmap

import numpy as np

from ebbflow.edge.engine.weights import address_of, anonymous

_FIRST_PAGES = 64


class PageMemory:
    """A `Store` of pages of one size.

    Attributes:
        addresses: of every page by its number, 0 where it has no memory. Another array once pages have been added.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._memory: dict[int, mmap.mmap] = {}
        self.addresses = np.zeros(_FIRST_PAGES, np.uint64)

    def grow(self, page: int) -> None:
        """Takes memory for a page that has none.

        Raises:
            EbbflowError: OUT_OF_MEMORY.
        """
        memory = anonymous(self._page_bytes)
        if page >= len(self.addresses):
            self.addresses = np.concatenate([self.addresses, np.zeros(max(page, len(self.addresses)), np.uint64)])
        self._memory[page] = memory
        self.addresses[page] = address_of(memory)

    def shrink(self, page: int) -> None:
        """Gives the memory of a page back."""
        self.addresses[page] = 0
        self._memory.pop(page).close()
