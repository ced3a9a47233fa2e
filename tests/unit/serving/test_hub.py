"""Students by name, and an orderly end."""

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Logits
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Failed

Make = Callable[..., Model]


def reason_of(action: Callable[[], object]) -> Reason:
    with pytest.raises(EbbflowError) as caught:
        action()
    return caught.value.reason


def test_a_student_has_several_names_and_the_only_one_needs_none(hub: Hub, model: Make) -> None:
    assert reason_of(lambda: hub.batcher("faq")) is Reason.NO_MODEL
    hub.swap(model())
    names = ["", "faq", "students/faq", "students/faq/releases/1"]
    assert len({id(hub.batcher(name)) for name in names}) == 1
    assert reason_of(lambda: hub.batcher("students/faq/releases/2")) is Reason.MODEL_NOT_FOUND
    hub.swap(model(2, "students/other"))
    assert reason_of(lambda: hub.batcher("")) is Reason.INVALID_REQUEST
    assert hub.batcher("other").model.release == "students/other/releases/2"


def test_who_waits_when_the_agent_stops_hears_so(hub: Hub, model: Make) -> None:
    one, gate = model(), threading.Event()
    step = one.engine.step

    def held(entries: Sequence[object]) -> list[Logits]:
        gate.wait(60)
        return step(entries)  # type: ignore[arg-type]

    one.engine.step = held  # type: ignore[method-assign]
    hub.swap(one)
    events: list[Event] = []
    batcher = hub.batcher("faq")
    batcher.submit(Generation(one, "a", Sampling(max_tokens=400), events.append))
    future = batcher.embed([1, 2])
    stopping = threading.Thread(target=hub.stop)
    stopping.start()
    deadline_s = time.monotonic() + 50
    while not batcher._stopped:
        assert time.monotonic() < deadline_s, "it did not begin to stop"
        time.sleep(0.001)
    gate.set()
    stopping.join(60)
    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.AGENT_STOPPING
    assert future.done()
    assert reason_of(lambda: batcher.embed([1])) is Reason.AGENT_STOPPING
    assert reason_of(lambda: batcher.submit(Generation(one, "a", Sampling(), events.append))) is (Reason.AGENT_STOPPING)
