"""Figures that are looked up whenever somebody asks: of each student, and whatever else a collector adds."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ebbflow.common.errors import EbbflowError
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.load import Load

Family = CounterMetricFamily | GaugeMetricFamily

PRECISIONS = ("bf16", "int8", "int4")
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class Figures:
    """Families under construction, in the order in which they were first named."""

    def __init__(self) -> None:
        """Starts empty."""
        self._families: dict[str, Family] = {}

    def gauge(self, name: str, about: str, value: float, labels: Mapping[str, str] = _NO_LABELS) -> None:
        """Adds a value that rises and falls."""
        family = self._families.setdefault(name, GaugeMetricFamily(name, about, labels=tuple(labels)))
        family.add_metric(tuple(labels.values()), value)

    def counter(self, name: str, about: str, value: float, labels: Mapping[str, str] = _NO_LABELS) -> None:
        """Adds a value that only rises; its samples are named `name` + "_total"."""
        family = self._families.setdefault(name, CounterMetricFamily(name, about, labels=tuple(labels)))
        family.add_metric(tuple(labels.values()), value)

    def families(self) -> Iterator[Family]:
        """Yields what was added."""
        yield from self._families.values()


class StudentCollector(Collector):
    """What can be looked up whenever somebody asks: load, engine and memory of each student."""

    def __init__(self, hub: Hub) -> None:
        """Takes the students."""
        self._hub = hub

    def collect(self) -> Iterator[Family]:
        """Yields one family after another, each with all students."""
        figures = Figures()
        for model in self._hub.models():
            try:
                load = self._hub.batcher(model.student).load()
            except EbbflowError:  # it was removed meanwhile
                continue
            student = {"student": label_of(model.student)}
            figures.gauge("ebbflow_release", "Number of the release that serves.", _number(model.release), student)
            _tell_load(figures, load, student)
            _tell_engine(figures, model.engine, student)
        yield from figures.families()


def _tell_load(figures: Figures, load: Load, student: Mapping[str, str]) -> None:
    figures.gauge("ebbflow_requests_running", "Requests that are being answered.", load.running, student)
    figures.gauge("ebbflow_requests_queued", "Requests that wait for a place.", load.queued, student)
    figures.gauge("ebbflow_queued_tokens", "Prompt tokens that the engine has yet to see.", load.queued_tokens, student)
    figures.gauge("ebbflow_step_seconds", "Time of an engine's step, smoothed.", load.step_s, student)
    figures.gauge(
        "ebbflow_tokens_per_second", "Tokens of answers in the last 5 seconds, for each.", load.tokens_per_s, student
    )


def _tell_engine(figures: Figures, engine: Engine, student: Mapping[str, str]) -> None:
    info = {**student, "engine": engine.name, "instruction_set": engine.instruction_set}
    figures.gauge("ebbflow_engine_info", "Engine and instruction set; always 1.", 1.0, info)
    for precision in PRECISIONS:
        if precision == engine.precision or precision in engine.offered:
            computes, labels = float(precision == engine.precision), {**student, "precision": precision}
            figures.gauge("ebbflow_precision", "1 for the precision that computes, 0 for others.", computes, labels)
    figures.gauge("ebbflow_engine_threads", "Threads that compute.", engine.threads, student)
    memory = engine.memory()
    figures.gauge("ebbflow_weights_bytes", "Memory of the weights.", memory.weights_bytes, student)
    figures.gauge("ebbflow_cache_bytes", "Memory taken for keys and values.", memory.cache_bytes, student)
    figures.gauge("ebbflow_cache_used_bytes", "Of it, what running requests hold.", memory.cache_used_bytes, student)
    hits, asked = memory.prefix_hits_tokens, memory.prefix_asked_tokens
    figures.counter("ebbflow_prefix_hit_tokens", "Prompt tokens that needed no step.", hits, student)
    figures.counter("ebbflow_prefix_asked_tokens", "Prompt tokens looked up in the cache.", asked, student)


def label_of(student: str) -> str:
    """Returns the label of a student such as "students/faq"."""
    return student.removeprefix("students/")


def _number(release: str) -> float:
    return float(release.rpartition("/")[2])
