"""The OpenAI-compatible HTTP API of one device.

/v1/models, /v1/completions, /v1/chat/completions, /v1/embeddings, and /v1/feedback, which is ours: what the user made
of an answer, by the answer's id. The field `user` names the user; it is hashed with a key that never leaves the device.
"""

import time
from dataclasses import replace

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving import chat
from ebbflow.edge.serving.answering import Answering, Question, in_turn
from ebbflow.edge.serving.guards import BodyLimit, KeyGuard, LocalHosts
from ebbflow.edge.serving.http_errors import add_error_handlers
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.replies import GONE, Replies, until_gone
from ebbflow.edge.serving.schema import ChatBody, CompletionBody, ConsentBody, EmbeddingBody, FeedbackBody, Prompt
from ebbflow.edge.serving.shapes import ChatShape, CompletionShape, embeddings

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
        self._hub, self._answering, self._store, self._check_key = hub, answering, store, KeyGuard(api_key)
        self._replies = Replies(answering)
        self._start_time_s = int(time.time())

    def router(self) -> APIRouter:
        """Returns the routes under /v1."""
        router = APIRouter(prefix="/v1", dependencies=[Depends(self._check_key)])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/completions", self.complete, methods=["POST"], response_model=None)
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/embeddings", self.embed, methods=["POST"], response_model=None)
        router.add_api_route("/feedback", self.feedback, methods=["POST"])
        router.add_api_route("/feedback/consent", self.consent, methods=["POST"])
        router.add_api_route("/feedback/users", self.purge, methods=["DELETE"])
        return router

    async def models(self) -> dict[str, object]:
        """Lists the students that serve."""
        return {"object": "list", "data": [self._card(model.student, model.release) for model in self._hub.models()]}

    async def model(self, name: str) -> dict[str, object]:
        """Returns one student."""
        model = self._hub.batcher(name).model
        return self._card(model.student, model.release)

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Continues one or several prompts, each once or several times."""
        sampling, count = body.sampling(body.max_tokens, body.logprobs), body.n or 1
        prompts = body.prompts()
        questions = [
            Question(
                body.model,
                prompt,
                sampling.choice(place),
                body.user or None,
                timeout_s=body.timeout_s,
                escalate=bool(body.escalate),
            )
            for prompt in prompts
            for place in range(count)
        ]
        echoes = [self._echo(body, prompt) for prompt in prompts for _ in range(count)]
        return await self._replies.answer(questions, [CompletionShape(echo=echo) for echo in echoes], body, request)

    def _echo(self, body: CompletionBody, prompt: Prompt) -> str:
        if not body.echo:
            return ""
        return prompt if isinstance(prompt, str) else self._hub.batcher(body.model).model.tokenizer.decode(prompt)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answers a chat, once or several times."""
        messages = [message.message() for message in body.messages]
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        sampling, count = body.sampling(most, body.top_log_probs, chat.STOPS), body.n or 1
        question = Question(
            body.model,
            chat.transcript(messages),
            sampling,
            body.user or None,
            chat.last_said(messages),
            timeout_s=body.timeout_s,
            escalate=bool(body.escalate),
        )
        questions = [replace(question, sampling=sampling.choice(place)) for place in range(count)]
        return await self._replies.answer(questions, [ChatShape() for _ in questions], body, request)

    async def embed(self, body: EmbeddingBody, request: Request) -> Response:
        """Embeds one or several texts; vectors have length 1."""
        work = self._answering.embed(body.model, body.inputs(), body.timeout_s)
        found = await until_gone(work, request)
        return GONE if found is None else JSONResponse(embeddings(found, base64=body.encoding_format == "base64"))

    async def feedback(self, body: FeedbackBody) -> dict[str, object]:
        """Keeps what the user made of an answer, on this device."""
        await in_turn(self._store.submit_outcome(body.id, _OUTCOMES[body.outcome]))
        return {"object": "feedback", "id": body.id, "outcome": body.outcome}

    async def consent(self, body: ConsentBody) -> dict[str, object]:
        """Keeps a user's word on taking part in feedback, on this device."""
        await in_turn(self._store.submit_consent(body.user or None, allowed=body.allowed))
        return {"object": "feedback.consent", "user": body.user, "allowed": body.allowed}

    async def purge(self, user: str) -> dict[str, object]:
        """Forgets a user's requests; an empty name is that of requests without a user."""
        count = await in_turn(self._store.submit_purge(user or None))
        self._hub.forget_prompts()
        return {"object": "feedback.user", "user": user, "interactions": count, "deleted": True}

    def _card(self, student: str, release: str) -> dict[str, object]:
        card = {"id": student.removeprefix("students/"), "object": "model", "created": self._start_time_s}
        return card | {"owned_by": "ebbflow", "release": release}


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
