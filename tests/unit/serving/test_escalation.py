"""Escalation on the device: who is asked, what is given, and that nothing of it is recorded."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from ebbflow.api.v1 import resources_pb2
from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answer, Answering, Question
from ebbflow.edge.serving.escalation import Escalation, EscalationLimits
from ebbflow.edge.serving.escalation_figures import EscalationCollector
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Finish, Finished, Piece

FAQ = "students/faq"
SURE, UNSURE = 0.0, 1.0  # thresholds under which nothing and everything is hard
HELD_OUT = [[1, 70, 80, 90, 100], [1, 75, 85]]
QUESTION = Question(FAQ, "How do I", Sampling(max_tokens=6, temperature=0.0, seed=1), "ada", escalate=True)


@dataclass
class Line:
    """A teacher that does what a test says: the other end of the wire, with its faults."""

    may: bool = True
    fault: Exception | None = None
    delay_s: float = 0.0
    asked: list[pb.EscalateRequest] = field(default_factory=list)
    looked: int = 0

    async def allowed(self, student: str) -> bool:
        self.looked += 1
        return self.may

    async def answer(self, request: pb.EscalateRequest, timeout_s: float) -> pb.EscalateResponse:
        self.asked.append(request)
        await asyncio.sleep(self.delay_s)
        if self.fault:
            raise self.fault
        return pb.EscalateResponse(text="Ask me.", prompt_tokens=5, completion_tokens=3)


@dataclass
class Device:
    line: Line
    hub: Hub
    store: FeedbackStore
    answering: Answering
    escalation: Escalation
    now_s: float = 0.0

    async def ask(self, question: Question = QUESTION) -> tuple[Answer, str, Finished]:
        answer = await self.answering.ask(question)
        text = ""
        async for event in answer.events():
            if isinstance(event, Finished):
                return answer, text, event
            text += event.text
        raise AssertionError("an answer ends")

    def told(self) -> dict[str, float]:
        """What whoever runs the device can see, by outcome."""
        (family,) = EscalationCollector(self.escalation).collect()
        return {sample.labels["outcome"]: sample.value for sample in family.samples if sample.value}

    def recorded(self, answer: Answer) -> bool:
        try:
            self.store.record_outcome(answer.interaction_id, resources_pb2.OUTCOME_ACCEPTED)
        except EbbflowError as error:
            return error.reason is not Reason.INTERACTION_NOT_FOUND
        return True


@pytest.fixture
def device(hub: Hub, store: FeedbackStore, model: Callable[..., Model]) -> Callable[..., Device]:
    hub.swap(model())

    def make(
        line: Line | None = None, texts: Callable[[str], Sequence[Sequence[int]]] = lambda _: HELD_OUT, **limits: Any
    ) -> Device:
        line = line or Line()
        wanted = EscalationLimits(**{"students": frozenset({FAQ}), "confidence": UNSURE, **limits})
        escalation = Escalation(line, wanted, texts, lambda: made.now_s)
        made = Device(line, hub, store, Answering(hub, store, escalation=escalation), escalation)
        return made

    return make


async def local(device: Device) -> str:
    """What the student answers when nobody may escalate."""
    return (await replace(device, answering=Answering(device.hub, device.store)).ask())[1]


async def test_a_hard_question_is_answered_by_the_teacher_and_says_so_and_is_not_recorded(
    device: Callable[..., Device],
) -> None:
    made = device()
    answer, text, end = await made.ask(
        replace(QUESTION, sampling=Sampling(max_tokens=6, temperature=0.5, seed=-1, stop=("\n", "User:")))
    )
    assert (text, answer.escalated) == ("Ask me.", True)
    assert end == Finished(Finish.STOP, 5, 3)
    (sent,) = made.line.asked
    assert (sent.student, sent.prompt, sent.max_tokens, sent.temperature) == (FAQ, "How do I", 6, 0.5)
    assert (sent.seed, list(sent.stop)) == (2**64 - 1, ["\n", "User:"])
    assert "ada" not in str(sent)
    assert not made.recorded(answer)


async def test_a_question_that_the_student_is_sure_of_stays_on_the_device(device: Callable[..., Device]) -> None:
    made = device(confidence=SURE)
    answer, text, _ = await made.ask()
    assert (text, answer.escalated) == (await local(made), False)
    assert (made.line.asked, made.line.looked) == ([], 0)
    assert made.recorded(answer)
    assert made.told() == {"kept": 1}


@pytest.mark.parametrize(
    "question",
    [
        replace(QUESTION, escalate=False),
        replace(QUESTION, prompt=[1, 70, 71]),
        replace(QUESTION, sampling=replace(QUESTION.sampling, top_log_probs=0)),
    ],
    ids=["no consent", "tokens", "log-probabilities"],
)
async def test_what_may_not_or_cannot_be_escalated_stays_on_the_device(
    question: Question, device: Callable[..., Device]
) -> None:
    made = device()
    answer, _, _ = await made.ask(question)
    assert not answer.escalated
    assert (made.line.asked, made.line.looked) == ([], 0)


async def test_other_students_questions_stay_on_the_device(device: Callable[..., Device]) -> None:
    made = device(students=frozenset({"students/other"}))
    assert not (await made.ask())[0].escalated
    assert made.line.looked == 0


async def test_without_the_clouds_permission_no_prompt_leaves_the_device(device: Callable[..., Device]) -> None:
    made = device(Line(may=False))
    for _ in range(3):
        answer, text, _ = await made.ask()
        assert (text, answer.escalated) == (await local(made), False)
        assert made.recorded(answer)
    assert (made.line.asked, made.line.looked) == ([], 1)
    made.now_s, made.line.may = 3600.0, True
    assert (await made.ask())[0].escalated


async def test_the_budget_of_a_window_is_kept_and_comes_back(device: Callable[..., Device]) -> None:
    made = device(most=2, window_s=60.0)
    assert [(await made.ask())[0].escalated for _ in range(4)] == [True, True, False, False]
    assert made.told() == {"escalated": 2, "refused": 2}
    made.now_s = 61.0
    assert (await made.ask())[0].escalated
    assert len(made.line.asked) == 3


FAULTS = [
    EbbflowError(Reason.SERVER_UNAVAILABLE, "gone"),
    EbbflowError(Reason.QUOTA_EXHAUSTED, "later", retry_after_s="5.0"),
    EbbflowError(Reason.CERTIFICATE_REVOKED, "out"),
    RuntimeError("a fault of ours"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_when_the_teacher_does_not_answer_the_student_does_and_nobody_asks_for_a_while(
    fault: Exception, device: Callable[..., Device]
) -> None:
    made = device(Line(fault=fault))
    answer, text, end = await made.ask()
    assert (text, answer.escalated) == (await local(made), False)
    assert (end.completion_tokens, made.recorded(answer)) == (6, True)
    assert not (await made.ask())[0].escalated
    assert len(made.line.asked) == 1
    assert made.told() == {"failed": 1, "refused": 1}
    made.now_s, made.line.fault = 700.0, None
    assert (await made.ask())[0].escalated


async def test_a_teacher_that_forbids_it_after_all_is_not_asked_again(device: Callable[..., Device]) -> None:
    made = device(Line(fault=EbbflowError(Reason.ESCALATION_FORBIDDEN, "no")))
    for _ in range(2):
        assert not (await made.ask())[0].escalated
    assert len(made.line.asked) == 1


async def test_a_question_that_the_teacher_cannot_read_keeps_no_other_back(device: Callable[..., Device]) -> None:
    made = device(Line(fault=EbbflowError(Reason.CONTEXT_TOO_LONG, "long")))
    assert not (await made.ask())[0].escalated
    made.line.fault = None
    assert (await made.ask())[0].escalated


async def test_a_slow_teacher_is_waited_for_no_longer_than_said(device: Callable[..., Device]) -> None:
    made = device(Line(delay_s=600.0), timeout_s=0.2)
    async with asyncio.timeout(60):
        answer, text, _ = await made.ask()
    assert (text, answer.escalated) == (await local(made), False)
    assert made.recorded(answer)


async def test_a_user_who_waits_no_longer_gets_the_students_answer(device: Callable[..., Device]) -> None:
    made = device(Line(delay_s=600.0), timeout_s=300.0)
    async with asyncio.timeout(60):
        answer, text, _ = await made.ask(replace(QUESTION, timeout_s=2.0))
    assert (text, answer.escalated) == (await local(made), False)


async def test_a_user_who_goes_away_while_the_teacher_thinks_leaves_nothing_behind(
    device: Callable[..., Device],
) -> None:
    made = device(Line(delay_s=600.0))
    answer = await made.answering.ask(QUESTION)
    reading = asyncio.ensure_future(anext(answer.events()))
    async with asyncio.timeout(60):
        while not made.line.asked:  # noqa: ASYNC110 - the question goes out when the student has answered
            await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await answer.close()
    assert not made.recorded(answer)


async def test_an_answer_under_review_comes_as_one_piece(device: Callable[..., Device]) -> None:
    made = device(confidence=SURE)
    answer = await made.answering.ask(QUESTION)
    events = [event async for event in _all(answer)]
    assert [type(event) for event in events] == [Piece, Finished]
    assert events[0].chances == ()  # type: ignore[union-attr]


async def _all(answer: Answer) -> AsyncIterator[Piece | Finished]:
    async for event in answer.events():
        yield event


async def test_the_students_own_errors_are_told(device: Callable[..., Device]) -> None:
    made = device()
    with pytest.raises(EbbflowError) as caught:
        await made.ask(replace(QUESTION, prompt="word " * 2000))
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert made.line.asked == []


async def test_confidence_is_calibrated_once_for_each_release(
    device: Callable[..., Device], model: Callable[..., Model]
) -> None:
    asked: list[str] = []

    def texts(student: str) -> list[list[int]]:
        asked.append(student)
        return HELD_OUT

    made = device(texts=texts)
    await asyncio.gather(*(made.ask() for _ in range(3)))
    assert asked == [FAQ]
    made.hub.swap(model(2))
    await made.ask()
    assert asked == [FAQ, FAQ]


@pytest.mark.parametrize("fault", [RuntimeError("broken"), EbbflowError(Reason.FILE_CORRUPT, "broken")])
async def test_without_texts_to_calibrate_with_the_student_is_taken_at_its_word(
    fault: Exception, device: Callable[..., Device]
) -> None:
    def texts(student: str) -> list[list[int]]:
        raise fault

    made = device(texts=texts)
    assert (await made.ask())[0].escalated
    assert (await device(texts=texts, confidence=SURE).ask())[0].escalated is False
