"""What the HTTP API accepts: the part of OpenAI's API that one student on one device can honour.

Unknown fields are ignored, as OpenAI's own clients expect; known fields that change the answer in a way that is not
offered here are refused rather than ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.chat import Message, Role
from ebbflow.edge.serving.sampling import DEFAULT_MAX_TOKENS, Sampling

# Fields of OpenAI's API that are not offered, with the values that ask for nothing.
_NOT_OFFERED: dict[str, Sequence[object]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair is no text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
UserKey = Annotated[Text, Field(max_length=512)]


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False


class _Body(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="allow")

    model: Text
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Text | list[Text] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: UserKey | None = None

    @model_validator(mode="after")
    def _offered(self) -> "_Body":
        for field, neutral in _NOT_OFFERED.items():
            value = (self.model_extra or {}).get(field)
            if value is not None and value not in neutral:
                raise EbbflowError(Reason.INVALID_REQUEST, f"{field} is not offered by this agent", field=field)
        return self

    def sampling(self, most: int | None, stops: Sequence[str] = ()) -> Sampling:
        """Returns the options; raises INVALID_REQUEST when one is out of range."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=DEFAULT_MAX_TOKENS if most is None else most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            stop=(*stop, *stops),
            seed=self.seed,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Text | list[Text]

    def text(self) -> str:
        """Returns the prompt; raises INVALID_REQUEST for several."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return self.prompt[0]
        raise EbbflowError(Reason.INVALID_REQUEST, "prompt must be one text: send several one by one", field="prompt")


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


class FeedbackBody(BaseModel):
    """POST /v1/feedback."""

    id: Text
    outcome: Literal["accepted", "edited", "rejected", "regenerated"]
