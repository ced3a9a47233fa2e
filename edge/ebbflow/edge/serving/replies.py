"""From questions to an HTTP response, unless the client goes away first."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ebbflow.edge.serving.answering import Answer, Answering, Question
from ebbflow.edge.serving.shapes import Reply, Shape
from ebbflow.edge.serving.streaming import EventStream, Stream, gather

T = TypeVar("T")

GONE = Response(status_code=499)
"""For the log of whoever wraps the app: the client, which has gone, does not see it."""


class Asking(Protocol):
    """What a request's body says of its response."""

    n: int | None
    stream: bool | None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""


class Replies:
    """Asks questions together and answers them in one response."""

    def __init__(self, answering: Answering) -> None:
        """Takes whom to ask."""
        self._answering = answering

    async def answer(
        self, questions: Sequence[Question], shapes: Sequence[Shape], body: Asking, request: Request
    ) -> Response:
        """Asks all questions; one that is refused refuses them all.

        A stream's status is sent with its first event, so that what fails before has a status of its own.

        Raises:
            EbbflowError: as `Answering.ask`, and whatever ends an answer.
        """
        async with AsyncExitStack() as undo:
            answers: list[Answer] = []
            for question in questions:
                answers.append(await self._answering.ask(question))
                undo.push_async_callback(answers[-1].close)
            stream = Stream(answers)
            undo.push_async_callback(stream.close)
            reply = Reply(answers, shapes, include_usage=body.include_usage, choices_of_each=body.n or 1)
            if not body.stream:
                wholes = await until_gone(gather(stream, len(answers)), request)
                return GONE if wholes is None else JSONResponse(reply.whole(wholes))
            if await until_gone(stream.begin(), request) is None:
                return GONE
            undo.pop_all()  # the response closes the stream
            return EventStream(stream, reply)


async def until_gone(work: Coroutine[Any, Any, T], request: Request) -> T | None:
    """Does some work; where the client goes away first, cancels it and returns None."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (gone, working):
            task.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
