"""The OpenAI-compatible HTTP API of one device.

/v1/models, /v1/completions, /v1/chat/completions, and /v1/feedback, which is ours: what the user made of an answer, by
the answer's id. The field `user` names the user; it is hashed with a key that never leaves the device.
"""

import asyncio
import hmac
import time
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response

from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving import chat
from ebbflow.edge.serving.answering import Answer, Answering, Question
from ebbflow.edge.serving.guards import BodyLimit, LocalHosts
from ebbflow.edge.serving.http_errors import add_error_handlers
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.schema import ChatBody, CompletionBody, FeedbackBody
from ebbflow.edge.serving.shapes import ChatShape, CompletionShape, Shape
from ebbflow.edge.serving.streaming import EventStream, gather

CLIENT_CLOSED_REQUEST = 499
_OUTCOMES = {
    "accepted": pb.OUTCOME_ACCEPTED,
    "edited": pb.OUTCOME_EDITED,
    "rejected": pb.OUTCOME_REJECTED,
    "regenerated": pb.OUTCOME_REGENERATED,
}


class Api:
    """The handlers."""

    def __init__(self, hub: Hub, answering: Answering, store: FeedbackStore, api_key: str | None) -> None:
        """Takes what the handlers ask; without an `api_key` everyone who reaches the port may ask."""
        self._hub, self._answering, self._store, self._api_key = hub, answering, store, api_key
        self._start_time_s = int(time.time())

    def router(self) -> APIRouter:
        """Returns the routes under /v1."""
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.check_key)])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/completions", self.complete, methods=["POST"], response_model=None)
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/feedback", self.feedback, methods=["POST"])
        return router

    async def check_key(self, authorization: Annotated[str, Header()] = "") -> None:
        """Refuses a request without the key, where one is configured."""
        if self._api_key is None:
            return
        scheme, _, key = authorization.partition(" ")
        sent = key.strip().encode("latin-1", "replace")  # headers arrive as bytes that were read as Latin-1
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self._api_key.encode()):
            raise EbbflowError(Reason.API_KEY_INVALID, "the API key is missing or wrong")

    async def models(self) -> dict[str, object]:
        """Lists the students that serve."""
        return {"object": "list", "data": [self._card(model.student, model.release) for model in self._hub.models()]}

    async def model(self, name: str) -> dict[str, object]:
        """Returns one student."""
        model = self._hub.batcher(name).model
        return self._card(model.student, model.release)

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Continues a prompt."""
        question = Question(body.model, body.text(), body.sampling(body.max_tokens), body.user or None)
        shape = CompletionShape(include_usage=body.include_usage)
        return await self._answer(question, shape, request, stream=bool(body.stream))

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answers a chat."""
        messages = [message.message() for message in body.messages]
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        sampling = body.sampling(most, chat.STOPS)
        said = chat.last_said(messages)
        question = Question(body.model, chat.transcript(messages), sampling, body.user or None, said)
        shape = ChatShape(include_usage=body.include_usage)
        return await self._answer(question, shape, request, stream=bool(body.stream))

    async def feedback(self, body: FeedbackBody) -> dict[str, object]:
        """Keeps what the user made of an answer, on this device."""
        await asyncio.to_thread(self._store.record_outcome, body.id, _OUTCOMES[body.outcome])
        return {"object": "feedback", "id": body.id, "outcome": body.outcome}

    async def _answer(self, question: Question, shape: Shape, request: Request, *, stream: bool) -> Response:
        answer = await self._answering.ask(question)
        if stream:
            return EventStream(answer, shape)
        return await self._whole(answer, shape, request)

    @staticmethod
    async def _whole(answer: Answer, shape: Shape, request: Request) -> Response:
        """Waits for the answer's end, or until the client has gone."""
        work = asyncio.ensure_future(gather(answer))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            text, end = await work
            return JSONResponse(shape.whole(answer, text, end))
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            await answer.close()

    def _card(self, student: str, release: str) -> dict[str, object]:
        card = {"id": student.removeprefix("students/"), "object": "model", "created": self._start_time_s}
        return card | {"owned_by": "ebbflow", "release": release}


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    hub: Hub, answering: Answering, store: FeedbackStore, api_key: str | None = None, *, loopback: bool = True
) -> FastAPI:
    """Builds the HTTP API.

    Args:
        hub: the students.
        answering: how to ask them.
        store: where outcomes are kept.
        api_key: what callers must send as a bearer token; None lets everyone in who reaches the port.
        loopback: whether the API is reached under a loopback name only. Then, unless there is a key, other host names
            are refused, so that no web page can reach it by pointing its own name at this machine.
    """
    app = FastAPI(title="Ebbflow agent", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.include_router(Api(hub, answering, store, api_key).router())
    add_error_handlers(app)
    app.add_middleware(BodyLimit)
    if loopback and api_key is None:
        app.add_middleware(LocalHosts)
    return app
