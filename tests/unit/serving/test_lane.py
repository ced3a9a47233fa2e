"""Continuous batching, one step at a time."""

from collections.abc import Callable, Sequence

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.serving.lane import Lane, Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Failed, Finished, Generation, Piece, Scored, Scoring

Make = Callable[..., Model]


def generation(model: Model, prompt: str, events: list[Event], **options: float) -> Generation:
    return Generation(model, prompt, Sampling(**{"temperature": 0, "max_tokens": 5} | options), events.append)  # type: ignore[arg-type]


def run(lane: Lane, limit: int = 500) -> int:
    steps = 0
    while not lane.idle:
        lane.step()
        steps += 1
        assert steps < limit
    return steps


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def watch(model: Model, seen: list[list[int]]) -> None:
    step = model.engine.step

    def counted(entries: Sequence[StepEntry]) -> list[Logits]:
        seen.append([len(entry.token_ids) for entry in entries])
        return step(entries)

    model.engine.step = counted  # type: ignore[method-assign]


def test_a_long_prompt_is_taken_in_pieces_beside_answers(model: Make) -> None:
    one, seen = model(), list[list[int]]()
    watch(one, seen)
    lane = Lane(one, Limits(prompt_tokens=8, prompt_tokens_alone=100))
    short: list[Event] = []
    long: list[Event] = []
    lane.add(generation(one, "a", short, max_tokens=20))
    lane.step()
    lane.add(generation(one, "x" * 60, long, max_tokens=3))
    run(lane)
    beside = [lengths for lengths in seen if len(lengths) == 2]
    assert all(lengths[0] == 1 and lengths[1] <= 8 for lengths in beside)
    assert sum(lengths[1] for lengths in beside) >= 60
    assert isinstance(short[-1], Finished)
    assert isinstance(long[-1], Finished)


def test_pieces_do_not_change_the_answer(model: Make) -> None:
    answers = []
    for limits in (Limits(prompt_tokens_alone=3), Limits()):
        one, events = model(), list[Event]()
        lane = Lane(one, limits)
        lane.add(generation(one, "How do I read a file", events, max_tokens=30))
        run(lane)
        answers.append(text_of(events))
    assert answers[0] == answers[1]


def test_no_more_run_at_a_time_than_allowed_and_everyone_gets_a_turn(model: Make) -> None:
    one, seen = model(), list[list[int]]()
    watch(one, seen)
    lane = Lane(one, Limits(running=3))
    events = [list[Event]() for _ in range(10)]
    for each in events:
        lane.add(generation(one, "a", each))
    assert lane.queued == 10
    run(lane)
    assert max(map(len, seen)) == 3
    assert all(isinstance(each[-1], Finished) for each in events)


def test_a_cancelled_sequence_leaves_before_the_next_step(model: Make) -> None:
    one, seen = model(), list[list[int]]()
    watch(one, seen)
    lane, events = Lane(one, Limits(running=1)), list[Event]()
    running, queued = generation(one, "a", events, max_tokens=400), generation(one, "a", events)
    lane.add(running)
    lane.add(queued)
    lane.step()
    running.cancelled = queued.cancelled = True
    lane.step()
    assert lane.idle
    assert len(seen) == 1


def test_where_memory_runs_out_only_the_newest_ends(model: Make) -> None:
    one = model()
    step = one.engine.step

    def tight(entries: Sequence[StepEntry]) -> list[Logits]:
        if len(entries) > 2:
            raise EbbflowError(Reason.OUT_OF_MEMORY, "tight")
        return step(entries)

    one.engine.step = tight  # type: ignore[method-assign]
    lane, events = Lane(one, Limits()), [list[Event]() for _ in range(4)]
    for each in events:
        lane.add(generation(one, "a", each))
    run(lane)
    assert [type(each[-1]) for each in events] == [Finished, Finished, Failed, Failed]


def test_scores_are_those_of_one_pass(model: Make) -> None:
    one, events = model(), list[Event]()
    lane = Lane(one, Limits(prompt_tokens=5, prompt_tokens_alone=5))
    text = "How do I read a file in Python?"
    lane.add(Scoring(one, text, events.append))
    run(lane)
    from ebbflow.edge.engine.loss import sequence_loss

    tokens = one.tokenizer.encode(text, bos=True)
    assert isinstance(events[0], Scored)
    assert len(events[0].token_log_probs) == len(tokens) - 1
    mean = -sum(events[0].token_log_probs) / (len(tokens) - 1)
    assert mean == pytest.approx(sequence_loss(one.engine, tokens), abs=1e-4)


def test_an_answer_never_outgrows_the_context(model: Make) -> None:
    one, events = model(), list[Event]()
    lane = Lane(one, Limits())
    lane.add(generation(one, "x" * 500, events, max_tokens=512))
    run(lane)
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.prompt_tokens + end.completion_tokens <= 512


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(model: Make) -> None:
    one, whole = model(), list[Event]()
    lane = Lane(one, Limits())
    lane.add(generation(one, "Use", whole, max_tokens=40))
    run(lane)
    text = text_of(whole)
    stop = text[len(text) // 2 :][:3]
    events: list[Event] = []
    lane.add(Generation(one, "Use", Sampling(temperature=0, max_tokens=40, stop=(stop,)), events.append))
    run(lane)
    assert text_of(events) == text[: text.index(stop)]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason.value == "stop"
