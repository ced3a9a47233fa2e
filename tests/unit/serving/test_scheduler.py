"""Continuous batching, one step at a time."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.serving.generation import Generation, Scoring
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.meters import NoMeters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.scheduler import Scheduler
from ebbflow.edge.serving.sequences import Event, Failed, Finished, Piece, RunningSequence, Scored

Make = Callable[..., Model]


class Serving:
    """A scheduler, its time, and what it tells its meters."""

    def __init__(self, model: Model, limits: Limits | None = None) -> None:
        self.meters = Counted()
        self.scheduler = Scheduler(model, limits or Limits(), self.meters)
        self.now_s = 100.0

    def add(self, sequence: RunningSequence) -> None:
        self.scheduler.submit(sequence, self.now_s)

    def step(self) -> bool:
        """One turn; says whether anything ran in it."""
        self.now_s += 0.01
        due = self.scheduler.admit(self.now_s)
        self.scheduler.settle(self.scheduler.step(self.now_s), self.now_s)
        return due

    def run(self, limit: int = 500) -> int:
        steps = 0
        while self.step():
            steps += 1
            assert steps < limit
        return steps

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.queued


class Counted(NoMeters):
    """Counts what meters hear."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()

    def arrived(self) -> None:
        self.heard["arrived"] += 1

    def tokens(self, count: int) -> None:
        self.heard["tokens"] += count

    def finished(self, reason: str) -> None:
        self.heard[reason] += 1

    def refused(self, reason: str) -> None:
        self.heard["refused " + reason] += 1


def generation(model: Model, prompt: str, events: list[Event], user: str = "", **options: float) -> Generation:
    sampling = Sampling(**{"temperature": 0, "max_tokens": 5} | options)  # type: ignore[arg-type]
    return Generation(model, prompt, sampling, events.append, user)


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def error_of(events: Sequence[Event]) -> Reason:
    assert isinstance(events[-1], Failed)
    return events[-1].error.reason


def watch(model: Model, seen: list[list[int]]) -> None:
    step = model.engine.step

    def counted(entries: Sequence[StepEntry]) -> list[Logits]:
        seen.append([len(entry.token_ids) for entry in entries])
        return step(entries)

    model.engine.step = counted  # type: ignore[method-assign]


def test_a_long_prompt_is_taken_in_pieces_beside_answers(model: Make) -> None:
    one, seen = model(), list[list[int]]()
    watch(one, seen)
    serving = Serving(one, Limits(prompt_tokens=8, prompt_tokens_alone=100))
    short: list[Event] = []
    long: list[Event] = []
    serving.add(generation(one, "a", short, max_tokens=20))
    serving.step()
    serving.add(generation(one, "x" * 60, long, max_tokens=3))
    serving.run()
    beside = [lengths for lengths in seen if len(lengths) == 2]
    assert all(lengths[0] == 1 and lengths[1] <= 8 for lengths in beside)
    assert sum(lengths[1] for lengths in beside) >= 60
    assert isinstance(short[-1], Finished)
    assert isinstance(long[-1], Finished)


def test_pieces_do_not_change_the_answer(model: Make) -> None:
    answers = []
    for limits in (Limits(prompt_tokens_alone=3), Limits()):
        one, events = model(), list[Event]()
        serving = Serving(one, limits)
        serving.add(generation(one, "How do I read a file", events, max_tokens=30))
        serving.run()
        answers.append(text_of(events))
    assert answers[0] == answers[1]


def test_no_more_run_at_a_time_than_allowed_and_everyone_gets_a_turn(model: Make) -> None:
    one, seen = model(), list[list[int]]()
    watch(one, seen)
    serving = Serving(one, Limits(running=3))
    events = [list[Event]() for _ in range(10)]
    for each in events:
        serving.add(generation(one, "a", each))
    assert len(serving.scheduler.queued) == 10
    serving.run()
    assert max(map(len, seen)) == 3
    assert all(isinstance(each[-1], Finished) for each in events)


def test_a_cancelled_sequence_leaves_before_the_next_step(model: Make) -> None:
    one, seen = model(), list[list[int]]()
    watch(one, seen)
    serving, events = Serving(one, Limits(running=1)), list[Event]()
    running, queued = generation(one, "a", events, max_tokens=400), generation(one, "a", events)
    serving.add(running)
    serving.add(queued)
    serving.step()
    running.cancelled = queued.cancelled = True
    serving.step()
    assert serving.idle
    assert len(seen) == 1


def tighten(model: Model, most: int) -> None:
    """Lets the engine have memory for so many sequences in a step."""
    step = model.engine.step

    def tight(entries: Sequence[StepEntry]) -> list[Logits]:
        if len(entries) > most:
            raise EbbflowError(Reason.OUT_OF_MEMORY, "tight")
        return step(entries)

    model.engine.step = tight  # type: ignore[method-assign]


def test_where_memory_runs_out_the_newest_wait_and_answer_the_same(model: Make) -> None:
    answers = []
    for most in (4, 2):
        one = model()
        tighten(one, most)
        serving, events = Serving(one), [list[Event]() for _ in range(4)]
        for number, each in enumerate(events):
            serving.add(generation(one, f"Question {number}", each, max_tokens=20, temperature=1, seed=number))
        serving.run()
        assert all(isinstance(each[-1], Finished) for each in events)
        answers.append([text_of(each) for each in events])
    assert answers[0] == answers[1]


def test_who_must_begin_again_says_nothing_twice(model: Make) -> None:
    """Memory runs out in the midst of answers and of a text that is being scored."""
    one = model()
    whole, events = [list[Event]() for _ in range(3)], [list[Event]() for _ in range(3)]
    for tight, found in ((False, whole), (True, events)):
        serving = Serving(one, Limits(prompt_tokens=5, prompt_tokens_alone=5))
        step = one.engine.step
        for number, each in enumerate(found[:2]):
            serving.add(generation(one, "Use", each, max_tokens=30, temperature=1, seed=number))
        serving.add(Scoring(one, "How do I read a file in Python?", found[2].append))
        for turn in range(12):
            serving.step()
            if tight and turn in {3, 6, 8}:
                tighten(one, 1)
            if tight and turn in {4, 7}:
                one.engine.step = step  # type: ignore[method-assign]
        serving.run()
        one.engine.step = step  # type: ignore[method-assign]
    assert [text_of(each) for each in events] == [text_of(each) for each in whole]
    assert isinstance(events[2][-1], Scored)
    assert isinstance(whole[2][-1], Scored)
    assert events[2][-1].token_log_probs == pytest.approx(whole[2][-1].token_log_probs, abs=1e-5)


def test_who_does_not_fit_alone_hears_of_it(model: Make) -> None:
    one = model()
    tighten(one, 0)
    serving, events = Serving(one), [list[Event]() for _ in range(3)]
    for each in events:
        serving.add(generation(one, "a", each))
    serving.run()
    assert [error_of(each) for each in events] == [Reason.OUT_OF_MEMORY] * 3


def test_a_broken_engine_fails_what_was_in_the_step_and_serves_the_next(model: Make) -> None:
    one = model()
    step, calls = one.engine.step, iter([True, False])

    def broken(entries: Sequence[StepEntry]) -> list[Logits]:
        if next(calls, False):
            raise ZeroDivisionError
        return step(entries)

    one.engine.step = broken  # type: ignore[method-assign]
    serving, events = Serving(one), [list[Event]() for _ in range(2)]
    serving.add(generation(one, "a", events[0]))
    serving.step()
    serving.add(generation(one, "a", events[1]))
    serving.run()
    assert error_of(events[0]) is Reason.INTERNAL
    assert isinstance(events[1][-1], Finished)
    assert serving.meters.heard["internal"] == 1


def test_users_share_the_engine_and_not_the_places_in_the_queue(model: Make) -> None:
    """One user who asks ten times is answered no faster than another who asks three times, later."""
    one = model()
    serving, order = Serving(one, Limits(running=1)), list[str]()

    def ask(user: str) -> None:
        sequence = generation(one, "a", [], user, max_tokens=5)
        sequence._sink = lambda event: order.append(user) if isinstance(event, Finished) else None
        serving.add(sequence)

    for _ in range(10):
        ask("much")
    for _ in range(3):
        ask("little")
    serving.run()
    assert len(order) == 13
    assert order.index("little") <= 1
    assert order[:7].count("little") == 3


def test_a_full_queue_refuses_and_says_when_to_come_back(model: Make) -> None:
    one, events = model(), list[Event]()
    serving = Serving(one, Limits(running=1, queued=2))
    for user in ("a", "a"):
        serving.add(generation(one, "x", events, user))
    with pytest.raises(EbbflowError) as caught:
        serving.add(generation(one, "x", events, "a"))
    assert caught.value.reason is Reason.QUEUE_FULL
    assert int(caught.value.metadata["retry_after_s"]) >= 1
    serving.run()
    serving.add(generation(one, "x", [], "a"))
    dropped: list[Event] = []
    serving.add(generation(one, "x", dropped, "a"))
    serving.add(generation(one, "x", [], "b"))
    assert error_of(dropped) is Reason.QUEUE_FULL, "the newest of who has most makes room"
    serving.run()
    assert serving.meters.heard["refused queue_full"] == 2
    assert serving.meters.heard["arrived"] == 6


def test_a_deadline_ends_who_waits_and_who_runs(model: Make) -> None:
    one = model()
    serving = Serving(one, Limits(running=1, request_s=60))
    running, waiting, patient = list[Event](), list[Event](), list[Event]()
    for events, timeout_s in ((running, 1.0), (waiting, 0.5), (patient, None)):
        sequence = generation(one, "Use", events, max_tokens=500)
        sequence.deadline_s = None if timeout_s is None else serving.now_s + timeout_s
        serving.add(sequence)
    while not waiting:
        assert serving.step()
    assert error_of(waiting) is Reason.DEADLINE_EXCEEDED
    assert serving.now_s == pytest.approx(100.5, abs=0.02)
    while not (running and isinstance(running[-1], Failed | Finished)):
        assert serving.step()
    assert error_of(running) is Reason.DEADLINE_EXCEEDED
    serving.now_s = 160.0
    serving.run()
    assert error_of(patient) is Reason.DEADLINE_EXCEEDED, "nobody may take longer than the limit"
    assert serving.idle
    assert serving.meters.heard["deadline_exceeded"] == 3


def test_a_short_prompt_does_not_wait_for_a_long_one(model: Make) -> None:
    one = model()
    serving = Serving(one, Limits(prompt_tokens=16, prompt_tokens_alone=16))
    long, short = list[Event](), list[Event]()
    serving.add(generation(one, "x" * 400, long, max_tokens=2))
    serving.add(generation(one, "x" * 20, short, max_tokens=2))
    steps = 0
    while not any(isinstance(event, Finished) for event in short):
        assert serving.step()
        steps += 1
    assert steps <= 2 + len(one.tokenizer.encode("x" * 20)) / 8
    assert not long
    serving.run()
    assert isinstance(long[-1], Finished)


def test_what_waits_is_answered_by_who_takes_the_engine_over(model: Make) -> None:
    """A release put in place of another: a held queue waits for it, and its answers name it."""
    first, events = model(), list[Event]()
    serving = Serving(first)
    serving.scheduler.holds += 1
    sequence = generation(first, "Use open()", events, max_tokens=20)
    serving.add(sequence)
    assert not serving.step()
    second = replace(first, release="students/faq/releases/2")
    serving.scheduler.swap(second, instead=False)
    serving.scheduler.holds -= 1
    serving.run()
    assert sequence.model is second
    assert isinstance(events[-1], Finished)
    assert serving.scheduler.releases == ["students/faq/releases/2"]


def test_what_waits_is_answered_by_its_own_release_otherwise(model: Make) -> None:
    first, second, events = model(1), model(2), list[Event]()
    serving = Serving(first)
    serving.scheduler.holds += 1
    sequence = generation(first, "Use open()", events, max_tokens=20)
    serving.add(sequence)
    serving.scheduler.swap(second, instead=False)
    serving.scheduler.holds -= 1
    serving.run()
    alone, own = Serving(model(1)), list[Event]()
    alone.add(generation(model(1), "Use open()", own, max_tokens=20))
    alone.run()
    assert sequence.model is first
    assert text_of(events) == text_of(own)
    serving.step()
    assert serving.scheduler.releases == ["students/faq/releases/2"]


def test_who_was_displaced_ends_before_the_engine_is_let_go(model: Make) -> None:
    """What somebody has heard the beginning of is never answered by another release."""
    one = model()
    serving, events = Serving(one), [list[Event]() for _ in range(3)]
    for each in events:
        serving.add(generation(one, "Use", each, max_tokens=20, temperature=1, seed=3))
    for _ in range(5):
        serving.step()
    step = one.engine.step
    tighten(one, 2)
    serving.step()
    one.engine.step = step  # type: ignore[method-assign]
    assert len(serving.scheduler.queued) == 1
    serving.scheduler.holds += 1
    waiting: list[Event] = []
    serving.add(generation(one, "Use", waiting))
    while serving.step():
        pass
    assert not serving.scheduler.busy
    assert [type(each[-1]) for each in events] == [Finished] * 3
    assert len({text_of(each) for each in events}) == 1
    assert not waiting


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "score", "step", "step", "step", "cancel", "tight", "loose", "hold"]),
            st.integers(0, 10**6),
        ),
        max_size=80,
    )
)
def test_whatever_happens_everyone_hears_an_end_once_and_no_slot_is_left(
    one_engine: Model, steps: list[tuple[str, int]]
) -> None:
    one, step = one_engine, one_engine.engine.step
    serving = Serving(one, Limits(running=3, queued=5, prompt_tokens=4, prompt_tokens_alone=9, request_s=2.0))
    asked: list[tuple[RunningSequence, list[Event]]] = []
    for what, number in steps:
        if what in {"ask", "score"}:
            events: list[Event] = []
            prompt = "How do I read a file in Python?"[: 1 + number % 30]
            user = "abc"[number % 3]
            sequence: RunningSequence = (
                generation(one, prompt, events, user, max_tokens=1 + number % 20)
                if what == "ask"
                else Scoring(one, prompt, events.append, user)
            )
            try:
                serving.add(sequence)
            except EbbflowError:
                events.append(Failed(EbbflowError(Reason.QUEUE_FULL, "refused")))
            asked.append((sequence, events))
        elif what == "cancel" and asked:
            asked[number % len(asked)][0].cancelled = True
        elif what == "tight":
            tighten(one, number % 3)
        elif what == "loose":
            one.engine.step = step  # type: ignore[method-assign]
        elif what == "hold":
            serving.scheduler.holds ^= 1
        else:
            serving.step()
    one.engine.step = step  # type: ignore[method-assign]
    serving.scheduler.holds = 0
    serving.run()
    assert serving.idle
    for sequence, events in asked:
        ends = [event for event in events if not isinstance(event, Piece)]
        assert len(ends) == (0 if sequence.ended == "cancelled" else 1)
        assert ends == events[-1:] or sequence.ended == "cancelled"
    heard = serving.meters.heard
    assert heard["arrived"] == len(asked)
    ended = sum(count for word, count in heard.items() if word not in {"arrived", "tokens", "refused queue_full"})
    assert ended + heard["refused queue_full"] == len(asked)
    assert one.engine.memory().cache_used_bytes == 0


def test_scores_are_those_of_one_pass(model: Make) -> None:
    one, events = model(), list[Event]()
    serving = Serving(one, Limits(prompt_tokens=5, prompt_tokens_alone=5))
    text = "How do I read a file in Python?"
    serving.add(Scoring(one, text, events.append))
    serving.run()
    from ebbflow.edge.engine.loss import sequence_loss

    tokens = one.tokenizer.encode(text, bos=True)
    assert isinstance(events[0], Scored)
    assert len(events[0].token_log_probs) == len(tokens) - 1
    mean = -sum(events[0].token_log_probs) / (len(tokens) - 1)
    assert mean == pytest.approx(sequence_loss(one.engine, tokens), abs=1e-4)


def test_an_answer_never_outgrows_the_context(model: Make) -> None:
    one, events = model(), list[Event]()
    serving = Serving(one)
    serving.add(generation(one, "x" * 500, events, max_tokens=512))
    serving.run()
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.prompt_tokens + end.completion_tokens <= 512


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(model: Make) -> None:
    one, whole = model(), list[Event]()
    serving = Serving(one)
    serving.add(generation(one, "Use", whole, max_tokens=40))
    serving.run()
    text = text_of(whole)
    stop = text[len(text) // 2 :][:3]
    events: list[Event] = []
    serving.add(Generation(one, "Use", Sampling(temperature=0, max_tokens=40, stop=(stop,)), events.append))
    serving.run()
    assert text_of(events) == text[: text.index(stop)]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason.value == "stop"
