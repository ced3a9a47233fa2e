"""What became of questions that users let out, for whoever runs the device."""

from collections.abc import Iterator

from prometheus_client.registry import Collector

from ebbflow.edge.serving.escalation import OUTCOMES, Escalation
from ebbflow.edge.serving.figures import Family, Figures, label_of


class EscalationCollector(Collector):
    """Looks the counts up whenever somebody asks."""

    def __init__(self, escalation: Escalation) -> None:
        """Takes what counts."""
        self._escalation = escalation

    def collect(self) -> Iterator[Family]:
        """Yields one family with every outcome of every student that may escalate."""
        figures, about = Figures(), "Questions whose users agreed to escalation, by what became of them."
        counts = self._escalation.counts.copy()
        for student in sorted(self._escalation.students):
            for outcome in OUTCOMES:
                labels = {"student": label_of(student), "outcome": outcome}
                figures.counter("ebbflow_escalations", about, counts[student, outcome], labels)
        yield from figures.families()
