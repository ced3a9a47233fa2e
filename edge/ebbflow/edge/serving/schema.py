"""What the HTTP API accepts: the part of OpenAI's API that one student on one device can honour.

Unknown fields are ignored, as OpenAI's own clients expect; known fields that change the answer in a way that is not
offered here are refused rather than ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.chat import Message, Role
from ebbflow.edge.serving.sampling import DEFAULT_MAX_TOKENS, Sampling

# Fields of OpenAI's API that are not offered, with the values that ask for nothing.
_NOT_OFFERED: dict[str, Sequence[object]] = {
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
MAX_CHOICES = 16
"""Of one request, over all its prompts."""
MAX_INPUTS = 2048
"""Texts of one request for embeddings."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair is no text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
UserKey = Annotated[Text, Field(max_length=512)]
Prompt = str | list[int]
Several = Text | list[StrictInt] | list[Text] | list[list[StrictInt]]
"""One prompt or several, each a text or its tokens."""


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False


def _refuse(field: str, message: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, f"{field} {message}", field=field)


class _Asking(BaseModel):
    """What every request to a student has."""

    model_config = ConfigDict(extra="allow")

    model: Text
    user: UserKey | None = None
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Ours: seconds after which nobody waits for the response."""


class _Body(_Asking):
    """What completions and chat have in common."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Text | list[Text] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    escalate: bool | None = None
    """Ours: the user agrees that the cloud's teacher may see the prompt, should the student be unsure."""

    @model_validator(mode="after")
    def _offered(self) -> "_Body":
        for field, neutral in _NOT_OFFERED.items():
            value = (self.model_extra or {}).get(field)
            if value is not None and value not in neutral:
                raise _refuse(field, "is not offered by this agent")
        return self

    def sampling(self, most: int | None, top_log_probs: int | None, stops: Sequence[str] = ()) -> Sampling:
        """Returns the options; raises INVALID_REQUEST when one is out of range."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=DEFAULT_MAX_TOKENS if most is None else most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            stop=(*stop, *stops),
            seed=self.seed,
            top_log_probs=top_log_probs,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Several
    logprobs: int | None = None
    echo: bool | None = None

    def prompts(self) -> list[Prompt]:
        """Returns the prompts; raises INVALID_REQUEST for none or for too many choices."""
        found = _each(self.prompt, "prompt")
        if len(found) * (self.n or 1) > MAX_CHOICES:
            raise _refuse("prompt", f"and n may make {MAX_CHOICES} choices at most")
        if self.echo and self.logprobs is not None:
            raise _refuse("echo", "with logprobs is not offered by this agent; the Score method of its gRPC API is")
        return found


def _each(value: Several, field: str) -> list[Prompt]:
    """One text or many, one row of tokens or many."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise _refuse(field, "is empty")
    return [value] if isinstance(value[0], int) else [*value]


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """A message of a chat."""

    role: Role
    content: Text | list[TextPart]

    def message(self) -> Message:
        """Returns the message with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, text)


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def top_log_probs(self) -> int | None:
        """How many alternatives to tell beside each token; None for no log-probabilities at all."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise _refuse("top_logprobs", "needs logprobs to be true")
        return None


class EmbeddingBody(_Asking):
    """POST /v1/embeddings."""

    input: Several
    encoding_format: Literal["float", "base64"] = "float"

    @model_validator(mode="after")
    def _offered(self) -> "EmbeddingBody":
        if (self.model_extra or {}).get("dimensions") is not None:
            raise _refuse("dimensions", "is not offered by this agent")
        return self

    def inputs(self) -> list[Prompt]:
        """Returns the texts; raises INVALID_REQUEST for none or too many."""
        found = _each(self.input, "input")
        if len(found) > MAX_INPUTS:
            raise _refuse("input", f"may hold at most {MAX_INPUTS} texts")
        return found


class ConsentBody(BaseModel):
    """POST /v1/feedback/consent."""

    user: Text
    allowed: StrictBool


class FeedbackBody(BaseModel):
    """POST /v1/feedback."""

    id: Text
    outcome: Literal["accepted", "edited", "rejected", "regenerated"]
