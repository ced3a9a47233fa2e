"""The engine's thread: what runs between steps, how it is let go, and what it tells of its load."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.meters import NoMeters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Failed, Finished, Piece

Make = Callable[..., Model]
PRIVATE = "what a user said"


def ask(batcher: Batcher, events: list[Event], tokens: int = 5, timeout_s: float | None = None) -> Generation:
    sampling = Sampling(temperature=1, seed=3, max_tokens=tokens)
    sequence = Generation(batcher.model, "Use open()", sampling, events.append)
    batcher.submit(sequence, timeout_s)
    return sequence


def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.002)


def test_what_runs_between_steps_has_the_engine_on_its_own_thread(
    hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(one := slow(model()))
    batcher, events = hub.batcher(""), list[Event]()
    ask(batcher, events, 400)
    until(lambda: events)
    seen = batcher.between_steps(lambda engine: (engine, threading.current_thread().name)).result(60)
    assert seen == (one.engine, "engine students/faq")
    assert not isinstance(events[-1], Finished), "the answer was under way"

    def fail(_engine: object) -> None:
        raise EbbflowError(Reason.OUT_OF_MEMORY, "too much")

    with pytest.raises(EbbflowError):
        batcher.between_steps(fail).result(60)
    before = len(events)
    until(lambda: len(events) > before)


def test_a_cancelled_action_does_not_run(hub: Hub, model: Make) -> None:
    hub.swap(model())
    batcher, gate, ran = hub.batcher(""), threading.Event(), list[int]()
    blocking = batcher.between_steps(lambda _: gate.wait(60))
    until(blocking.running)
    waiting = batcher.between_steps(lambda _: ran.append(1))
    assert waiting.cancel()
    gate.set()
    batcher.between_steps(lambda _: None).result(60)
    assert not ran


def test_a_held_engine_is_free_and_everyone_is_answered_afterwards(
    hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    batcher, running, waiting = hub.batcher(""), list[Event](), list[Event]()
    ask(batcher, running, 30)
    until(lambda: batcher.load().running)
    with hub.hold("students/faq") as held:
        assert held is batcher
        assert isinstance(running[-1], Finished), "what ran has ended"
        ask(batcher, waiting)
        time.sleep(0.05)
        assert (batcher.load().running, batcher.load().queued) == (0, 1)
        assert not waiting
        assert batcher.between_steps(lambda engine: engine.memory().cache_used_bytes).result(60) == 0
    until(lambda: waiting and isinstance(waiting[-1], Finished))


def test_a_release_put_in_place_of_another_answers_what_waits(hub: Hub, model: Make) -> None:
    hub.swap(first := model())
    batcher, events = hub.batcher(""), list[Event]()
    with hub.hold("faq"):
        sequence = ask(batcher, events)
        hub.swap(replace(first, release="students/faq/releases/2"))
    until(lambda: events and isinstance(events[-1], Finished))
    assert sequence.model.release == "students/faq/releases/2"


def test_who_cannot_wait_for_running_requests_holds_nothing(
    hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    batcher, events, later = hub.batcher(""), list[Event](), list[Event]()
    ask(batcher, events, 300)
    until(lambda: batcher.load().running)
    with pytest.raises(EbbflowError) as caught, hub.hold("faq", within_s=0.05):
        pytest.fail("it is not free")
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    ask(batcher, later)
    until(lambda: later and isinstance(later[-1], Finished))
    assert not isinstance(events[-1], Finished)


def test_a_stop_ends_a_hold_that_waits(hub: Hub, model: Make, slow: Callable[[Model], Model]) -> None:
    hub.swap(slow(model()))
    batcher, reasons = hub.batcher(""), list[Reason]()
    ask(batcher, [], 500)
    until(lambda: batcher.load().running)

    def hold() -> None:
        try:
            batcher.hold()
        except EbbflowError as error:
            reasons.append(error.reason)

    holding = threading.Thread(target=hold)
    holding.start()
    hub.stop()
    holding.join(60)
    assert reasons == [Reason.AGENT_STOPPING]


def test_who_waits_for_a_held_engine_hears_of_its_deadline(hub: Hub, model: Make) -> None:
    hub.swap(model())
    batcher, events = hub.batcher(""), list[Event]()
    with hub.hold("faq"):
        ask(batcher, events, timeout_s=0.05)
        until(lambda: events)
    assert isinstance(events[0], Failed)
    assert events[0].error.reason is Reason.DEADLINE_EXCEEDED


class Counted(NoMeters):
    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        self.first_s: list[float] = []

    def arrived(self) -> None:
        self.heard["arrived"] += 1

    def first_token(self, seconds: float) -> None:
        self.first_s.append(seconds)

    def tokens(self, count: int) -> None:
        self.heard["tokens"] += count

    def finished(self, reason: str) -> None:
        self.heard[reason] += 1


def test_load_and_meters_tell_what_happened(model: Make, slow: Callable[[Model], Model]) -> None:
    meters: dict[str, Counted] = {}
    hub = Hub(Limits(running=2), lambda student: meters.setdefault(student, Counted()))
    hub.swap(slow(model()))
    batcher, events = hub.batcher(""), [list[Event]() for _ in range(5)]
    idle = batcher.load()
    assert (idle.running, idle.queued, idle.queued_tokens, idle.step_s, idle.first_token_s) == (0, 0, 0, 0.0, None)
    sequences = [ask(batcher, each, 60) for each in events]
    until(lambda: batcher.load().running == 2)
    busy = batcher.load()
    assert busy.queued == 3
    assert busy.queued_tokens >= 3 * len(sequences[0].token_ids[:3])
    until(lambda: all(each and isinstance(each[-1], Finished) for each in events))
    until(lambda: not batcher.load().running)
    load, heard = batcher.load(), meters["students/faq"]
    assert 0.01 <= load.step_s < 5  # seconds, and not milliseconds
    assert load.first_token_s is not None
    assert max(heard.first_s) == pytest.approx(load.first_token_s)
    answered = sum(each[-1].completion_tokens for each in events if isinstance(each[-1], Finished))
    assert heard.heard["tokens"] == answered
    assert load.tokens_per_s == pytest.approx(answered / 5)
    assert heard.heard["arrived"] == heard.heard["length"] + heard.heard["stop"] == 5
    hub.stop()


def test_one_user_with_many_requests_does_not_hold_up_another(model: Make, slow: Callable[[Model], Model]) -> None:
    hub = Hub(Limits(running=1))
    hub.swap(slow(model()))
    batcher, many, one = hub.batcher(""), [list[Event]() for _ in range(20)], list[Event]()
    for events in many:
        batcher.submit(Generation(batcher.model, "Use", Sampling(max_tokens=10), events.append, "many"))
    batcher.submit(Generation(batcher.model, "Use", Sampling(max_tokens=10), one.append, "one"))
    until(lambda: one and isinstance(one[-1], Finished))
    assert sum(any(not isinstance(event, Piece) for event in events) for events in many) <= 2
    hub.stop()


def test_a_fault_of_our_own_leaves_nobody_waiting(model: Make, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(NoMeters):
        def tokens(self, count: int) -> None:
            raise ValueError(PRIVATE)

    hub = Hub(Limits(), lambda _: Broken())
    hub.swap(model())
    batcher, events = hub.batcher(""), list[Event]()
    ask(batcher, events)
    until(lambda: events and isinstance(events[-1], Failed))
    until(lambda: not batcher.alive)
    with pytest.raises(EbbflowError):
        ask(batcher, events)
    said = capsys.readouterr()
    assert "engine_thread_failed" in said.out + said.err
    assert PRIVATE not in said.out + said.err
    hub.stop()
