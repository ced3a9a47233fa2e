"""Calibration beside running requests: what is read is what the engine says, in pieces and in its turn."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import StepEntry
from ebbflow.edge.serving.calibrations import Calibrations, read
from ebbflow.edge.serving.confidence import fit, observe
from ebbflow.edge.serving.events import Events
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Finished

FAQ = "students/faq"
TEXT = [int(id_) for id_ in np.random.default_rng(0).integers(3, 250, 150)]


async def test_a_text_is_read_in_pieces_beside_an_answer_as_the_engine_reads_it_at_once(
    hub: Hub, model: Callable[..., Model]
) -> None:
    hub.swap(model())
    batcher, events = hub.batcher(FAQ), Events()
    batcher.submit(Generation(batcher.model, "How do I", Sampling(max_tokens=40, temperature=0.0), events.put))
    seen = await read(batcher, TEXT)
    while not isinstance(await events.get(), Finished):
        pass
    engine = model().engine
    whole = observe(engine.step([StepEntry(engine.open(), TEXT[:-1], "all")])[0], np.array(TEXT[1:]))
    assert np.concatenate([each.log_probs for each in seen]) == pytest.approx(whole.log_probs, abs=1e-3)
    assert (np.concatenate([each.hits for each in seen]) == whole.hits).all()
    assert len(seen) > 1


async def test_a_curve_is_fitted_once_for_all_who_wait_and_anew_for_another_release(
    hub: Hub, model: Callable[..., Model]
) -> None:
    hub.swap(model(1))
    asked: list[str] = []

    def texts(student: str) -> list[list[int]]:
        asked.append(student)
        return [TEXT, TEXT[:40]]

    calibrations, batcher = Calibrations(texts), hub.batcher(FAQ)
    curves = await asyncio.gather(*(calibrations.of(batcher) for _ in range(4)))
    assert curves[0].tokens == 188
    assert len(set(curves)) == 1
    assert curves[0] == fit([each for text in texts("") for each in await read(batcher, text)])
    hub.swap(model(2))
    assert await calibrations.of(batcher) != curves[0]
    assert [student for student in asked if student] == [FAQ, FAQ]


async def test_a_full_queue_is_no_calibration_and_the_next_answer_tries_again(model: Callable[..., Model]) -> None:
    hub = Hub(Limits(running=1, queued=1))
    hub.swap(model())
    batcher = hub.batcher(FAQ)
    calibrations = Calibrations(lambda _: [TEXT])
    try:
        with hub.hold(FAQ):
            waiting = asyncio.ensure_future(read(batcher, TEXT))
            await asyncio.sleep(0)
            with pytest.raises(EbbflowError) as caught:
                await read(batcher, TEXT)
            assert caught.value.reason is Reason.QUEUE_FULL
            assert (await calibrations.of(batcher)).tokens == 0
        await waiting
        assert (await calibrations.of(batcher)).tokens == 149
    finally:
        hub.stop()
