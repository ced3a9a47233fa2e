"""Pages of the KV cache: whatever happens, every sequence finds its own tokens in its pages."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.pages import PAGE_TOKENS, PageBook, Pages, pages_for


class Content:
    """A store that remembers which tokens were written where."""

    def __init__(self, most: int = 10**9) -> None:
        self.pages: dict[int, dict[int, tuple[str, int]]] = {}
        self.most = most

    def grow(self, page: int) -> None:
        assert page not in self.pages
        if len(self.pages) >= self.most:
            raise EbbflowError(Reason.OUT_OF_MEMORY, "full")
        self.pages[page] = {}

    def shrink(self, page: int) -> None:
        del self.pages[page]

    def write(self, sequence: Pages, history: Sequence[int], origin: str) -> None:
        """Writes what is behind the kept tokens, as a step would."""
        for index in range(sequence.length, len(history)):
            cells = self.pages[sequence.pages[index // PAGE_TOKENS]]
            if index % PAGE_TOKENS == 0:
                cells.clear()
            cells[index % PAGE_TOKENS] = (origin, hash(tuple(history[: index + 1])))

    def check(self, sequence: Pages, history: Sequence[int], origin: str) -> None:
        for index in range(sequence.length):
            found = self.pages[sequence.pages[index // PAGE_TOKENS]].get(index % PAGE_TOKENS)
            assert found == (origin, hash(tuple(history[: index + 1])))


class Books(RuleBasedStateMachine):
    """Sequences that begin alike, grow, end, and press against the limit."""

    sequences = Bundle("sequences")

    @initialize(limit=st.none() | st.integers(1, 12), retained=st.integers(0, 6), most=st.integers(4, 30))
    def begin(self, limit: int | None, retained: int, most: int) -> None:
        self.store = Content(most)
        self.limit, self.retained = limit, retained
        self.book = PageBook(self.store, limit, retained)
        self.open: list[tuple[Pages, list[int], str]] = []

    @rule(target=sequences, origin=st.sampled_from(["int8", "int4"]), family=st.integers(0, 1), pages=st.integers(0, 4))
    def start(self, origin: str, family: int, pages: int) -> tuple[Pages, list[int], str]:
        prompt = [family] * (pages * PAGE_TOKENS + 1)
        sequence = self.book.open(origin)
        reused = self.book.reuse(sequence, prompt)
        assert reused < len(prompt)
        assert reused % PAGE_TOKENS == 0
        entry = (sequence, prompt[:reused], origin)
        self.open.append(entry)
        self.grow([entry], [prompt[reused:]])
        return entry

    def grow(self, who: list[tuple[Pages, list[int], str]], news: list[list[int]]) -> bool:
        try:
            self.book.reserve([(entry[0], len(tokens)) for entry, tokens in zip(who, news, strict=True)])
        except EbbflowError:
            return False
        for (sequence, history, origin), tokens in zip(who, news, strict=True):
            history.extend(tokens)
            self.store.write(sequence, history, origin)
            self.book.keep(sequence, tokens)
        return True

    @rule(who=st.lists(sequences, min_size=1, max_size=3, unique_by=lambda e: id(e[0])), data=st.data())
    def step(self, who: list[tuple[Pages, list[int], str]], data: st.DataObject) -> None:
        news = [
            data.draw(st.sampled_from([history[:1] or [0], history[:1] or [1], [0], [1]]))
            * data.draw(st.sampled_from([1, 2, 31, 32, 33, 70]))
            for _, history, _ in who
        ]
        before = [(list(sequence.pages), sequence.length) for sequence, _, _ in who]
        used = self.book.used
        if self.grow(who, news):
            return
        assert [(sequence.pages, sequence.length) for sequence, _, _ in who] == before
        assert self.book.used == used
        needed = sum(
            max(0, pages_for(length + len(tokens)) - len(pages))
            for (pages, length), tokens in zip(before, news, strict=True)
        )
        fits = self.limit is None or used + needed <= self.limit
        assert not fits or len(self.store.pages) >= self.store.most - needed

    @rule(entry=consumes(sequences))
    def stop(self, entry: tuple[Pages, list[int], str]) -> None:
        self.open.remove(entry)
        self.book.close(entry[0])
        assert entry[0].pages == []

    @rule(limit=st.none() | st.integers(1, 12))
    def press(self, limit: int | None) -> None:
        try:
            self.book.set_limit(limit)
            self.limit = limit
        except EbbflowError:
            assert limit is not None
            assert self.book.used > limit

    @rule(target=sequences)
    def forget(self) -> object:
        for sequence, _, _ in self.open:
            sequence.node = None
        self.book.forget()
        assert self.book.allocated == self.book.used
        return multiple()

    @invariant()
    def every_sequence_finds_its_tokens(self) -> None:
        for sequence, history, origin in self.open:
            assert sequence.length == len(history)
            assert len(sequence.pages) >= pages_for(sequence.length)
            self.store.check(sequence, history, origin)

    @invariant()
    def what_is_counted_is_what_has_memory(self) -> None:
        held = {page for sequence, _, _ in self.open for page in sequence.pages}
        assert self.book.used == len(held)
        assert self.book.allocated == len(self.store.pages)
        assert held <= self.store.pages.keys()
        assert self.book.allocated - self.book.used <= self.retained
        assert self.limit is None or self.book.allocated <= self.limit
        assert all(page < self.book.capacity for page in self.store.pages)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def grown(book: PageBook, tokens: Sequence[int], origin: str = "int8") -> Pages:
    sequence = book.open(origin)
    reused = book.reuse(sequence, tokens)
    book.reserve([(sequence, len(tokens) - reused)])
    book.keep(sequence, tokens[reused:])
    return sequence


def test_a_second_prompt_shares_the_whole_pages_of_the_first() -> None:
    book = PageBook(Content(), None, 8)
    prompt = list(range(100))
    first, second = grown(book, prompt), grown(book, prompt)
    assert second.pages[:3] == first.pages[:3]
    assert second.pages[3] != first.pages[3]
    assert (book.used, book.hits_tokens, book.asked_tokens) == (5, 96, 200)


def test_the_last_token_always_needs_a_step() -> None:
    book = PageBook(Content(), None, 8)
    book.close(grown(book, list(range(64))))
    assert book.reuse(book.open("int8"), list(range(64))) == 32
    assert book.reuse(book.open("int8"), list(range(65))) == 64


def test_origins_share_nothing() -> None:
    book = PageBook(Content(), None, 8)
    book.close(grown(book, list(range(64))))
    assert book.reuse(book.open("int4"), list(range(65))) == 0


def test_two_that_compute_the_same_at_the_same_time_end_with_one_copy() -> None:
    book = PageBook(Content(), None, 8)
    first, second = book.open("int8"), book.open("int8")
    book.reserve([(first, 40), (second, 40)])
    assert book.used == 4
    assert not book.keep(first, [7] * 40)
    assert book.keep(second, [7] * 40), "its first page was exchanged"
    assert (book.used, second.pages[0]) == (3, first.pages[0])


def test_the_least_recently_used_beginning_goes_first() -> None:
    book = PageBook(Content(), None, 2)
    for start in (0, 1000, 2000):
        book.close(grown(book, list(range(start, start + 32))))
    assert book.allocated == 2
    assert book.reuse(book.open("int8"), list(range(33))) == 0
    assert book.reuse(book.open("int8"), list(range(1000, 1033))) == 32
    assert book.reuse(book.open("int8"), list(range(2000, 2033))) == 32


def test_of_one_prompt_the_end_goes_before_the_beginning() -> None:
    book = PageBook(Content(), None, 2)
    book.close(grown(book, list(range(96))))
    assert book.reuse(book.open("int8"), list(range(97))) == 64


def test_unheld_pages_make_room_for_new_ones_the_oldest_first() -> None:
    book = PageBook(Content(), 3, 3)
    book.close(grown(book, list(range(96))))
    grown(book, [9] * 10)
    assert book.reuse(book.open("int8"), list(range(65))) == 64, "the end of the prompt went, not its beginning"
    book = PageBook(Content(), 3, 3)
    book.close(grown(book, list(range(96))))
    sequence = grown(book, [5] * 96)
    assert (book.used, book.allocated) == (3, 3)
    assert book.reuse(book.open("int8"), list(range(97))) == 0, "what made room is not known any more"
    with pytest.raises(EbbflowError, match="4 pages") as caught:
        book.reserve([(sequence, 1)])
    assert caught.value.reason is Reason.OUT_OF_MEMORY
