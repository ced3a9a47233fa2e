"""Votes by what the device serves: shared words, or the student's own states, however busy the device is."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.common.privacy.vector import Contribution
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent import likeness
from ebbflow.edge.agent.likeness import MOST_TOKENS, Likeness
from ebbflow.edge.agent.swapping import Room
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.library import find_library
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.interactions import Interaction
from ebbflow.edge.feedback.votes import Bins, contributions_of
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

Make = Callable[..., Model]
ENGINES = ["native", "torch"] if find_library() else ["torch"]
STUDENT = pb.RoundPlan.MEASURE_STUDENT
PLENTY = Room(1 << 40, 1 << 40)
TEXTS = ("How do I write a file?", "Which day is it?", "An x is an x.")
BINS = [pb.Bin(bin_id=f"1-{at}", texts=[text]) for at, text in enumerate(TEXTS)]
WORDS = ("how", "do", "I", "write", "a", "file", "which", "day", "is", "it", "network", "date", "open", "print", "loop")


def plan(measure: "pb.RoundPlan.Measure.ValueType", bins: Sequence[pb.Bin] = BINS) -> pb.RoundPlan:
    metrics = [pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1)]
    return pb.RoundPlan(student="students/faq", bins=bins, measure=measure, metrics=metrics, near_micro=900_000)


def votes(hub: Hub, asked: Sequence[str], plan: pb.RoundPlan, room: Room = PLENTY) -> list[Contribution]:
    """What users vote for who asked one text each."""
    users = {str(at).encode(): [Interaction(str(at), str(at).encode())] for at in range(len(asked))}
    with Likeness(hub, lambda: room).of(plan) as embed:
        assert embed is not None
        return contributions_of(plan, users, lambda ids: {id_: asked[int(id_)] for id_ in ids}, embed)


def words(seed: int, texts: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 8)) for _ in range(texts)]


def watched_engines(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, after: int | None = None
) -> list[Engine]:
    """Returns where the engines will be found that votes are computed with; they may fail after so many texts."""
    opened = []

    def load(path: Path, *args: object, **options: object) -> Engine:
        engine = load_engine(path, *args, **options)  # type: ignore[arg-type]
        embed, seen = engine.embed, count()

        def watched(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
            if next(seen) == after and error:
                raise error
            return embed(tokens)

        engine.embed = watched  # type: ignore[method-assign, assignment]
        opened.append(engine)
        return engine

    monkeypatch.setattr(likeness, "load_engine", load)
    return opened


def test_without_the_student_there_is_no_measure(hub: Hub, model: Make) -> None:
    measures = Likeness(hub, lambda: PLENTY)
    with measures.of(plan(STUDENT)) as embed:
        assert embed is None
    hub.swap(model(1, "students/other"))
    for measure in (STUDENT, pb.RoundPlan.MEASURE_LEXICAL):
        with measures.of(plan(measure)) as embed:
            assert embed is None


def test_a_plan_chooses_between_words_and_the_students_states(hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    measures = Likeness(hub, lambda: PLENTY)
    for measure in (pb.RoundPlan.MEASURE_UNSPECIFIED, pb.RoundPlan.MEASURE_LEXICAL):
        with measures.of(plan(measure)) as by_words:
            assert isinstance(by_words, Lexicon)
    texts = [*TEXTS, "x y" * 2000]
    tokens = [one.tokenizer.encode(text, bos=True)[:MOST_TOKENS] for text in texts]
    assert max(map(len, tokens)) == MOST_TOKENS
    with measures.of(plan(STUDENT)) as by_states:
        assert by_states is not None
        np.testing.assert_allclose(by_states(texts), [model().engine.embed(each) for each in tokens], atol=1e-5)


def test_users_vote_for_the_prompt_they_repeat_and_are_near_it_by_either_measure(hub: Hub, model: Make) -> None:
    hub.swap(model())
    for measure in (pb.RoundPlan.MEASURE_LEXICAL, STUDENT):
        found = votes(hub, TEXTS, plan(measure))
        assert [(vote.bin, vote.metrics) for vote in found] == [(0, (1,)), (1, (1,)), (2, (1,))]
        with Likeness(hub, lambda: PLENTY).of(plan(measure)) as embed:
            assert embed is not None
            strange = Bins(BINS, embed).find("zzz qqq")
            assert strange is None or strange.cosine < 0.9


@contextmanager
def flooded(hub: Hub) -> Iterator[None]:
    """Keeps the student's queue of texts full, as one user can with requests for embeddings."""
    stop, full = threading.Event(), threading.Event()
    batcher = hub.batcher("faq")
    held, go_on = threading.Event(), threading.Event()

    def hold(_: Engine) -> None:
        held.set()
        go_on.wait(60)

    batcher.between_steps(hold)  # so that none of them is answered before the end
    held.wait(60)

    def ask() -> None:
        while not stop.is_set():
            try:
                batcher.embed([1, 2, 3])
            except EbbflowError:
                full.set()
                stop.wait(0.001)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert full.wait(60)
        yield
        with pytest.raises(EbbflowError) as caught:
            batcher.embed([1])
        assert caught.value.reason is Reason.QUEUE_FULL
    finally:
        stop.set()
        thread.join()
        go_on.set()


def switch(engine: Engine, precision: str) -> None:
    engine.switch(engine.prepare(precision))


def test_neither_a_flood_of_requests_nor_the_governor_moves_a_vote(hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    bins = [pb.Bin(bin_id=str(at), texts=words(at, 150)) for at in range(3)]  # more than may wait for answers
    asked = words(99, 100)
    quiet = votes(hub, asked, plan(STUDENT, bins))
    assert len(quiet) == len(asked)
    assert len({vote.bin for vote in quiet}) == len(bins)
    with flooded(hub):
        assert votes(hub, asked, plan(STUDENT, bins)) == quiet
    engine = one.engine
    offered = [precision for precision in engine.offered if precision != engine.precision]
    for precision in offered:
        hub.batcher("faq").between_steps(partial(switch, precision=precision)).result(60)
        assert engine.precision == precision
        assert votes(hub, asked, plan(STUDENT, bins)) == quiet


@pytest.mark.parametrize("kind", ENGINES)
def test_states_are_the_same_to_the_last_bit_on_any_number_of_threads(
    hub: Hub, artefacts: dict[int, Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine = load_engine(artefacts[1], "torch" if kind == "torch" else "native", threads=1)
    hub.swap(Model("students/faq", "students/faq/releases/1", engine, tokenizer))
    opened, found = watched_engines(monkeypatch), []
    for threads in range(1, min(engine.max_threads, 4) + 1):
        engine.threads = threads
        with Likeness(hub, lambda: PLENTY).of(plan(STUDENT)) as embed:
            assert embed is not None
            found.append(embed(words(5, 20)))
            assert (opened[-1].name, opened[-1].threads) == (kind, 1)
        assert engine.threads == threads
    engine.threads = 1
    for each in found:
        assert each.tobytes() == found[0].tobytes()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EbbflowError(Reason.OUT_OF_MEMORY, "none"), Reason.OUT_OF_MEMORY),
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (RuntimeError("broken"), Reason.INTERNAL),
    ],
)
@pytest.mark.parametrize("after", [0, len(BINS) + 1])
def test_an_engine_that_fails_is_nobodys_missing_vote_but_no_report(
    hub: Hub, model: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: Reason, after: int
) -> None:
    hub.swap(model())
    opened = watched_engines(monkeypatch, error, after)
    with pytest.raises(EbbflowError) as caught:
        votes(hub, TEXTS, plan(STUDENT))
    assert caught.value.reason is reason
    assert opened[0].memory().weights_bytes == 0


def test_without_room_for_a_second_engine_there_is_no_report(hub: Hub, model: Make) -> None:
    hub.swap(model())
    for room in (Room(1000, 1 << 40), Room(1 << 40, 1000)):
        with pytest.raises(EbbflowError) as caught:
            votes(hub, TEXTS, plan(STUDENT), room)
        assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_a_text_that_cannot_be_read_has_no_vote_and_takes_no_others(
    hub: Hub, model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.swap(one := model())
    encode = one.tokenizer.encode

    def broken(text: str, *, bos: bool = False) -> list[int]:
        if "zzz" in text:
            raise RuntimeError("no such character")
        return encode(text, bos=bos)

    monkeypatch.setattr(one.tokenizer, "encode", broken)
    for measure in (pb.RoundPlan.MEASURE_LEXICAL, STUDENT):
        found = votes(hub, [TEXTS[0], "zzz", TEXTS[2]], plan(measure))
        assert [vote.bin for vote in found] == [0, 2]


def test_when_the_student_leaves_the_report_waits(hub: Hub, model: Make) -> None:
    hub.swap(model())
    with Likeness(hub, lambda: PLENTY).of(plan(STUDENT)) as embed:
        assert embed is not None
        embed(TEXTS)
        hub.stop()
        with pytest.raises(EbbflowError) as caught:
            embed(TEXTS)
    assert caught.value.reason is Reason.AGENT_STOPPING
