"""Answers as they come, for one response: as server-sent events, or gathered."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ebbflow.common.errors import EbbflowError
from ebbflow.edge.serving.answering import Answer
from ebbflow.edge.serving.http_errors import body_of
from ebbflow.edge.serving.sequences import Finished, Piece
from ebbflow.edge.serving.shapes import Json, Reply, Whole

_DONE = b"data: [DONE]\n\n"
Numbered = AsyncGenerator[tuple[int, Piece | Finished], None]


class Stream:
    """The events of all choices, each with its choice's number."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        """Begins nothing yet."""
        self._answers = answers
        self._events = numbered(answers)
        self._first: tuple[int, Piece | Finished] | None = None

    async def begin(self) -> bool:
        """Waits for the first event, so that what fails before it still has a status of its own; True then.

        Raises:
            EbbflowError: what ended an answer before its first event.
        """
        self._first = await anext(self._events)
        return True

    async def events(self) -> Numbered:
        """Yields the events; raises whatever ends an answer before its end."""
        async with aclosing(self._events) as events:
            if self._first:
                yield self._first
            async for event in events:
                yield event

    async def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        await self._events.aclose()
        for answer in self._answers:
            await answer.close()


async def numbered(answers: Sequence[Answer]) -> Numbered:
    """Yields the events of answers in the order in which they come.

    Raises:
        EbbflowError: whatever ended one of them; the others are then cancelled.
    """
    if len(answers) == 1:
        async with aclosing(answers[0].events()) as events:
            async for event in events:
                yield 0, event
        return
    came: asyncio.Queue[tuple[int, Piece | Finished | BaseException]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pass_on(index, answer, came)) for index, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, numbered_event = await came.get()
            if isinstance(numbered_event, BaseException):
                raise numbered_event
            left -= isinstance(numbered_event, Finished)
            yield index, numbered_event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pass_on(
    index: int, answer: Answer, came: "asyncio.Queue[tuple[int, Piece | Finished | BaseException]]"
) -> None:
    try:
        async with aclosing(answer.events()) as events:
            async for event in events:
                came.put_nowait((index, event))
    except Exception as error:  # noqa: BLE001 - raised again where it is read
        came.put_nowait((index, error))


async def gather(stream: Stream, count: int) -> list[Whole]:
    """Returns the whole texts and ends of `count` choices.

    Raises:
        EbbflowError: whatever ended an answer.
    """
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    ends: dict[int, Finished] = {}
    async with aclosing(stream.events()) as events:
        async for index, event in events:
            if isinstance(event, Finished):
                ends[index] = event
            else:
                pieces[index].append(event)
    return [Whole(Piece.joined(pieces[index]), ends[index]) for index in range(count)]


class EventStream(StreamingResponse):
    """Streams a response; a client that goes away ends the generation."""

    def __init__(self, stream: Stream, reply: Reply) -> None:
        """Begins nothing yet."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_lines(stream, reply), headers=headers, media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()


async def _lines(stream: Stream, reply: Reply) -> AsyncIterator[bytes]:
    for index, shape in enumerate(reply.shapes):
        if (content := shape.first()) is not None:
            yield _line(reply.chunk(index, content))
    ends: dict[int, Finished] = {}
    try:
        async with aclosing(stream.events()) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    ends[index] = event
                    yield _line(reply.chunk(index, reply.shapes[index].last(event), event))
                elif (content := reply.shapes[index].piece(event)) is not None:
                    yield _line(reply.chunk(index, content))
        if reply.include_usage:
            yield _line(reply.usage([ends[index] for index in sorted(ends)]))
    except EbbflowError as error:  # the status line has gone out already
        yield _line(body_of(error))
    yield _DONE


def _line(data: Json) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
