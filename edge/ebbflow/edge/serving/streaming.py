"""Answers as server-sent events."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ebbflow.common.errors import EbbflowError
from ebbflow.edge.serving.answering import Answer
from ebbflow.edge.serving.http_errors import body_of
from ebbflow.edge.serving.sequences import Finished, Piece
from ebbflow.edge.serving.shapes import Shape

_DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Streams an answer; a client that goes away ends the generation."""

    def __init__(self, answer: Answer, shape: Shape) -> None:
        """Begins nothing yet."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(answer, shape), headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()


async def gather(answer: Answer) -> tuple[str, Finished]:
    """Returns the whole text and the end.

    Raises:
        EbbflowError: whatever ended the answer.
    """
    pieces: list[str] = []
    async with aclosing(answer.events()) as events:
        async for event in events:
            if isinstance(event, Finished):
                return "".join(pieces), event
            pieces.append(event.text)
    raise AssertionError("an answer ends with Finished or an error")


async def _events(answer: Answer, shape: Shape) -> AsyncIterator[bytes]:
    if (first := shape.first(answer)) is not None:
        yield _event(first)
    try:
        async with aclosing(answer.events()) as events:
            async for event in events:
                for data in _data(answer, shape, event):
                    yield _event(data)
    except EbbflowError as error:  # the status line has gone out already
        yield _event(body_of(error))
    yield _DONE


def _data(answer: Answer, shape: Shape, event: Piece | Finished) -> list[dict[str, object]]:
    if isinstance(event, Piece):
        piece = shape.piece(answer, event.text)
        return [] if piece is None else [piece]
    usage = [shape.usage(answer, event)] if shape.include_usage else []
    return [shape.last(answer, event), *usage]


def _event(data: dict[str, object]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
