"""The metrics say what happened, in a registry of their own, with labels from closed lists."""

from collections import Counter
from collections.abc import Callable

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from ebbflow.edge.serving.figures import StudentCollector
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.metrics import FIRST_TOKEN_BUCKETS_S, REASONS, Metrics
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Finished

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

STUDENTS = ["students/faq", "students/other"]
events = st.lists(
    st.tuples(
        st.sampled_from(STUDENTS),
        st.one_of(
            st.just(("arrived", None)),
            st.tuples(st.just("first_token"), st.floats(0, 60)),
            st.tuples(st.just("tokens"), st.integers(0, 1000)),
            st.tuples(st.sampled_from(["finished", "refused"]), st.sampled_from(sorted(REASONS))),
            st.tuples(st.sampled_from(["finished", "refused"]), st.text()),
        ),
    ),
    max_size=40,
)


def samples(metrics: Metrics) -> Samples:
    content, kind = metrics.exposition()
    assert kind.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


@given(events=events)
def test_what_was_counted_is_what_is_told(events: list[tuple[str, tuple[str, object]]]) -> None:
    metrics, expected = Metrics(), Counter[tuple[str, str, str]]()
    meters = {student: metrics.meters(student) for student in STUDENTS}
    for student, (name, argument) in events:
        getattr(meters[student], name)(*([] if argument is None else [argument]))
        label = student.removeprefix("students/")
        if name == "first_token":
            assert isinstance(argument, float)
            for bucket in FIRST_TOKEN_BUCKETS_S:
                expected["first_token", label, str(bucket)] += argument <= bucket
            expected["first_token", label, "+Inf"] += 1
        elif name == "tokens":
            assert isinstance(argument, int)
            expected["tokens", label, ""] += argument
        else:
            reason = "" if argument is None else str(argument) if argument in REASONS else "other"
            expected[name, label, reason] += 1
    found = samples(metrics)
    for (name, student, detail), count in expected.items():
        match name:
            case "arrived":
                assert value(found, "ebbflow_requests_total", student=student) == count
            case "tokens":
                assert value(found, "ebbflow_answer_tokens_total", student=student) == count
            case "finished":
                assert value(found, "ebbflow_answers_total", student=student, reason=detail) == count
            case "refused":
                assert value(found, "ebbflow_requests_refused_total", student=student, reason=detail) == count
            case "first_token":
                assert value(found, "ebbflow_first_token_seconds_bucket", student=student, le=detail) == count
    reasons = {dict(labels).get("reason") for _, labels in found}
    assert reasons <= {None, "other", *REASONS}


def test_agents_share_no_figures_and_nothing_is_global() -> None:
    one, other = Metrics(), Metrics()
    one.meters("students/faq").arrived()
    assert value(samples(one), "ebbflow_requests_total", student="faq") == 1
    assert value(samples(other), "ebbflow_requests_total", student="faq") == 0
    names = {family.name for family in prometheus_client.REGISTRY.collect()}
    assert not [name for name in names if name.startswith("ebbflow")]


def test_a_student_that_is_gone_leaves_no_figures_and_begins_anew() -> None:
    metrics = Metrics()
    metrics.forget("students/faq")
    for student in STUDENTS:
        meters = metrics.meters(student)
        meters.arrived()
        meters.first_token(0.1)
        meters.finished("stop")
        meters.refused("queue_full")
        meters.tokens(3)
    metrics.forget("students/faq")
    found = samples(metrics)
    assert not [name for name, labels in found if ("student", "faq") in labels]
    assert value(found, "ebbflow_answers_total", student="other", reason="stop") == 1
    metrics.meters("students/faq").arrived()
    assert value(samples(metrics), "ebbflow_requests_total", student="faq") == 1


def test_openmetrics_is_told_to_who_asks_for_it() -> None:
    metrics = Metrics()
    metrics.meters("students/faq").first_token(0.03)
    content, kind = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(content.decode())}  # type: ignore[no-untyped-call]
    assert families["ebbflow_first_token_seconds"].type == "histogram"


async def test_engine_and_load_of_each_student_are_looked_up(hub: Hub, model: Callable[..., Model]) -> None:
    metrics = Metrics()
    metrics.add(StudentCollector(hub))
    assert not [name for name, _ in samples(metrics) if name.startswith("ebbflow")]
    hub.swap(one := model(2))
    hub.swap(model(1, "students/other"))
    found = samples(metrics)
    assert value(found, "ebbflow_release", student="faq") == 2
    assert value(found, "ebbflow_release", student="other") == 1
    assert value(found, "ebbflow_precision", student="faq", precision=one.engine.precision) == 1
    info = {"student": "faq", "engine": one.engine.name, "instruction_set": one.engine.instruction_set}
    assert value(found, "ebbflow_engine_info", **info) == 1
    assert value(found, "ebbflow_weights_bytes", student="faq") == one.engine.memory().weights_bytes > 0
    assert value(found, "ebbflow_engine_threads", student="faq") >= 1
    assert value(found, "ebbflow_requests_running", student="faq") == 0
    assert value(found, "process_resident_memory_bytes") > 2**20


def test_what_runs_and_waits_shows(hub: Hub, model: Callable[..., Model], slow: Callable[[Model], Model]) -> None:
    metrics = Metrics()
    metrics.add(StudentCollector(hub))
    hub.swap(one := slow(model()))
    batcher = hub.batcher("faq")
    for _ in range(20):
        batcher.submit(Generation(one, "How do I", Sampling(max_tokens=400), lambda _: None))
    most = {"ebbflow_requests_running": 8.0, "ebbflow_requests_queued": 12.0}
    for _ in range(500):
        found = samples(metrics)
        if all(value(found, name, student="faq") == count for name, count in most.items()):
            break
    else:
        pytest.fail("never eight ran and twelve waited")
    assert value(found, "ebbflow_queued_tokens", student="faq") > 12


def test_a_label_holds_nothing_of_a_prompt_or_a_user(hub: Hub, model: Callable[..., Model]) -> None:
    metrics = Metrics()
    metrics.add(StudentCollector(hub))
    hub.swap(one := model())
    done: list[Event] = []
    hub.batcher("faq").submit(Generation(one, "sesame prompt", Sampling(max_tokens=4), done.append, "sesame user"))
    while not any(isinstance(event, Finished) for event in list(done)):
        pass
    assert b"sesame" not in metrics.exposition()[0]
    labels = {name for _, labels in samples(metrics) for name, _ in labels}
    assert labels <= {"student", "precision", "reason", "engine", "instruction_set", "le"}
