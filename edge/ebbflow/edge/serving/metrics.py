"""What this device does, for whoever runs it: Prometheus metrics.

Every agent has a registry of its own. Labels take few values (students that serve, precisions, words of closed lists),
and no figure says anything of what was asked or who asked it. The cloud never reads them.
"""

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ebbflow.common.errors import Reason
from ebbflow.edge.serving.figures import label_of
from ebbflow.edge.serving.meters import Meters
from ebbflow.edge.serving.sequences import Finish

FIRST_TOKEN_BUCKETS_S = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
OTHER = "other"
"""The label of a reason that is in no list."""
REASONS = frozenset({
    *(reason.value for reason in Finish), *(reason.name.lower() for reason in Reason), "scored", "cancelled",
})  # fmt: skip
"""Everything that a request may end with, or be refused for."""
_STUDENT = ("student",)


class Metrics:
    """The figures of one agent. Its methods may be called from any thread."""

    def __init__(self) -> None:
        """Begins to count."""
        self._registry = CollectorRegistry(auto_describe=False)
        registry = self._registry
        self._asked = Counter("ebbflow_requests", "Requests that came.", _STUDENT, registry=registry)
        self._refused = Counter(
            "ebbflow_requests_refused", "Requests that were not taken on.", ("student", "reason"), registry=registry
        )
        self._ended = Counter(
            "ebbflow_answers",
            "Requests that were taken on and have ended, by what ended them.",
            ("student", "reason"),
            registry=registry,
        )
        self._tokens = Counter("ebbflow_answer_tokens", "Tokens of answers.", _STUDENT, registry=registry)
        self._first_token = Histogram(
            "ebbflow_first_token_seconds",
            "From a request's arrival to the first token of its answer.",
            _STUDENT,
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        ProcessCollector(registry=registry)

    def add(self, collector: Collector) -> None:
        """Tells from now on what `collector` finds whenever somebody asks."""
        self._registry.register(collector)

    def meters(self, student: str) -> Meters:
        """Returns where a student's figures are counted; `student` such as "students/faq"."""
        label = label_of(student)
        return StudentMeters(
            label,
            self._asked.labels(label),
            self._tokens.labels(label),
            self._first_token.labels(label),
            self._ended,
            self._refused,
        )

    def forget(self, student: str) -> None:
        """Drops the figures of a student that no longer serves here."""
        label = label_of(student)
        for metric in (self._asked, self._tokens, self._first_token, self._ended, self._refused):
            with suppress(KeyError):
                metric.remove_by_labels({"student": label})

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Returns all figures and their content type. Blocks for some milliseconds: sensors are read.

        Args:
            accept: the Accept header; OpenMetrics for who asks for it, else Prometheus' own text format.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class StudentMeters:
    """Counts what happens to the requests of one student."""

    def __init__(
        self, label: str, asked: Counter, tokens: Counter, first_token: Histogram, ended: Counter, refused: Counter
    ) -> None:
        """Takes the student's own figures, and those that have a reason beside the student."""
        self._label = label
        self._asked, self._tokens, self._first_token = asked, tokens, first_token
        self._ended, self._refused = ended, refused

    def arrived(self) -> None:
        """A request came."""
        self._asked.inc()

    def first_token(self, seconds: float) -> None:
        """An answer began, so long after its request arrived."""
        self._first_token.observe(seconds)

    def tokens(self, count: int) -> None:
        """Tokens were added to answers."""
        self._tokens.inc(count)

    def finished(self, reason: str) -> None:
        """A request ended."""
        self._ended.labels(self._label, _known(reason)).inc()

    def refused(self, reason: str) -> None:
        """A request was not taken on."""
        self._refused.labels(self._label, _known(reason)).inc()


def _known(reason: str) -> str:
    return reason if reason in REASONS else OTHER
