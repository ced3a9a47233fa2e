"""Keeping an engine free of requests: who runs ends on the release it began with, who waits is answered by the next."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.engine.base import Engine, Logits, StepEntry
from ebbflow.edge.engine.load import Preference, load_engine
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Failed, Finished, Piece

Make = Callable[..., Model]
STUDENT = "students/faq"


class Asked:
    """One request, and what came of it."""

    def __init__(self, hub: Hub, model: Model, prompt: str = "How do I", tokens: int = 60) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()
        end = model.engine.config.eos_token_id
        assert end is not None
        options = Sampling(max_tokens=tokens, temperature=0.0, logit_bias=((end, -100.0),))
        self.sequence = Generation(model, prompt, options, self._hear)
        hub.batcher("faq").submit(self.sequence)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Piece):
            self._ended.set()

    def text(self) -> str:
        assert self._ended.wait(60)
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    def reason(self) -> Reason:
        assert self._ended.wait(60)
        assert isinstance(self.events[-1], Failed)
        return self.events[-1].error.reason


def until(condition: Callable[[], object]) -> None:
    limit_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit_s, "it did not happen in time"
        time.sleep(0.002)


@pytest.fixture
def alone(model: Make) -> Iterator[Callable[..., str]]:
    """What a release answers when nobody else asks."""
    hub = Hub(Limits())

    def answer(number: int, prompt: str = "How do I", tokens: int = 60) -> str:
        hub.swap(one := model(number))
        return Asked(hub, one, prompt, tokens).text()

    yield answer
    hub.stop()


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("reload", [False, True])
def test_who_runs_ends_on_the_old_release_and_who_waits_is_answered_by_the_one_that_takes_its_place(
    artefacts: dict[int, Path],
    tokenizer: Tokenizer,
    alone: Callable[..., str],
    slow: Callable[[Model], Model],
    engine: Preference,
    reload: bool,
) -> None:
    hub = Hub(Limits(running=2))
    old = Model(STUDENT, "students/faq/releases/1", load_engine(artefacts[1], engine, threads=1), tokenizer)
    hub.swap(slow(old))
    gate = threading.Event()
    hub.batcher("faq").between_steps(lambda _: gate.wait(60))
    asked = [Asked(hub, old) for _ in range(5)]
    threading.Timer(0.1, gate.set).start()
    until(lambda: hub.batcher("faq").load().running == 2)
    with hub.hold("faq") as batcher:
        finished = [one.sequence.done for one in asked]
        assert 2 <= sum(finished) < 5
        if reload:
            batcher.between_steps(lambda held: held.shutdown()).result(60)
            taken: Engine = load_engine(artefacts[2], engine, threads=1)
        else:
            batcher.between_steps(lambda held: held.replace(artefacts[2])).result(60)
            taken = old.engine
        late = Asked(hub, old)
        time.sleep(0.05)
        assert [one.sequence.done for one in asked] == finished
        hub.swap(Model(STUDENT, "students/faq/releases/2", taken, tokenizer), instead=reload)
    texts = [one.text() for one in [*asked, late]]
    hub.stop()
    assert texts == [alone(1 if done else 2) for done in [*finished, False]]
    releases = [one.sequence.model.release.rpartition("/")[2] for one in [*asked, late]]
    assert releases == ["1" if done else "2" for done in [*finished, False]]


def test_an_answer_that_had_to_make_room_for_another_still_ends_on_the_release_it_began_with(
    hub: Hub, model: Make, artefacts: dict[int, Path], alone: Callable[..., str]
) -> None:
    hub.swap(old := model())
    step, full = old.engine.step, threading.Event()

    def short_of_memory_once(entries: Sequence[StepEntry]) -> list[Logits]:
        if all(one.events for one in asked) and not full.is_set():
            full.set()
            raise EbbflowError(Reason.OUT_OF_MEMORY, "there is no memory for the KV cache")
        return step(entries)

    old.engine.step = short_of_memory_once  # type: ignore[method-assign]
    asked: list[Asked] = []
    hub.batcher("faq").between_steps(lambda _: asked.extend([Asked(hub, old, tokens=200), Asked(hub, old, tokens=200)]))
    assert full.wait(60)
    with hub.hold("faq") as batcher:
        assert [one.sequence.done for one in asked] == [True, True]
        batcher.between_steps(lambda held: held.replace(artefacts[2])).result(60)
        hub.swap(Model(STUDENT, "students/faq/releases/2", old.engine, old.tokenizer))
    assert {one.text() for one in asked} == {alone(1, tokens=200)}


def test_a_hold_ends_with_the_agent(hub: Hub, model: Make, slow: Callable[[Model], Model]) -> None:
    hub.swap(one := slow(model()))
    asked = Asked(hub, one, tokens=400)
    until(lambda: asked.events)
    caught: list[Reason] = []

    def hold() -> None:
        try:
            with hub.hold("faq"):
                pass
        except EbbflowError as error:
            caught.append(error.reason)

    holding = threading.Thread(target=hold)
    holding.start()
    hub.stop()
    holding.join(60)
    assert caught == [Reason.AGENT_STOPPING]
    assert asked.reason() is Reason.AGENT_STOPPING


def test_who_waits_for_an_engine_that_is_lost_hears_so_at_once(hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    with hub.hold("faq") as batcher:
        asked = Asked(hub, one)
        hub.abandon(STUDENT)
        assert asked.reason() is Reason.AGENT_STOPPING
        until(lambda: not batcher.alive)
    assert hub.models() == []
    hub.swap(two := model(2))
    assert Asked(hub, two).text()
