"""Events on their way from the engine's thread: whole, in order, and not one message for each token."""

import asyncio
import threading
import time

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.events import Events
from ebbflow.edge.serving.sequences import Failed, Finish, Finished, Piece

END = Finished(Finish.STOP, 1, 1)


async def collect(events: Events) -> list[tuple[float, str]]:
    found = []
    while isinstance(event := await events.get(), Piece):
        found.append((time.monotonic(), event.text))
    return found


async def test_tokens_that_come_close_together_travel_together() -> None:
    events = Events(coalesce_s=0.02)
    text = [f"{number} " for number in range(400)]

    def produce() -> None:
        for piece in text:
            events.put(Piece(piece))
            time.sleep(0.0005)
        events.put(END)

    events.put(Piece("first "))
    assert await asyncio.wait_for(events.get(), 60) == Piece("first "), "it does not wait for the rest"
    began_s = time.monotonic()
    producer = threading.Thread(target=produce)
    producer.start()
    found = await collect(events)
    took_s = time.monotonic() - began_s
    producer.join()
    assert "".join(piece for _, piece in found) == "".join(text)
    assert len(found) <= took_s / 0.02 + 3, "a message every 20 ms at most, but for the first and the last"


async def test_many_threads_lose_nothing() -> None:
    streams = [Events(coalesce_s=0.001) for _ in range(8)]

    def produce() -> None:
        for number in range(2000):
            for events in streams:
                events.put(Piece(chr(ord("a") + number % 26)))
        for events in streams:
            events.put(END)

    producer = threading.Thread(target=produce)
    producer.start()
    async with asyncio.timeout(60):
        found = await asyncio.gather(*(collect(events) for events in streams))
    producer.join()
    expected = "".join(chr(ord("a") + number % 26) for number in range(2000))
    assert all("".join(piece for _, piece in pieces) == expected for pieces in found)


async def test_an_error_comes_after_what_came_before_it() -> None:
    events = Events()
    events.put(Piece("half "))
    events.put(Piece("an answer"))
    events.put(Failed(EbbflowError(Reason.OUT_OF_MEMORY, "no more")))
    assert await events.get() == Piece("half an answer")
    with pytest.raises(EbbflowError):
        await events.get()


def test_who_has_gone_with_its_loop_costs_nothing() -> None:
    async def make() -> Events:
        return Events()

    events = asyncio.run(make())
    events.put(Piece("nobody hears this"))
