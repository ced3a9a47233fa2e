"""From a prompt to its tokens, at a cost that a hostile prompt cannot raise."""

from collections.abc import Sequence

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.model import Model

_HEAD_CHARACTERS = 16
"""For each token of the context: hardly any text has so many to a token."""
_QUICK_CHARACTERS = 1024
"""Longer texts are tokenised beside other threads: else the tokenizer holds the interpreter for milliseconds."""


def prompt_tokens(model: Model, prompt: str | Sequence[int], room: int, field: str = "prompt") -> list[int]:
    """Returns the tokens of a text, with the beginning-of-text token where the student knows one.

    Args:
        model: whose tokenizer and context count.
        prompt: what to tokenise; tokens are taken as they are.
        room: tokens that must stay free.
        field: of the request, for errors.

    Raises:
        EbbflowError: CONTEXT_TOO_LONG; INVALID_REQUEST if no token comes out or one is none of the student's.
    """
    context_tokens = model.engine.context_tokens
    if isinstance(prompt, str):
        token_ids = _encoded(model, prompt, field)
    else:
        token_ids = list(prompt)
        vocabulary = model.engine.config.vocab_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocabulary):
            message = f"a token of the {field} is outside the vocabulary of {vocabulary}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field=field)
    if not token_ids:
        raise EbbflowError(Reason.INVALID_REQUEST, f"the {field} is empty", field=field)
    if len(token_ids) + room > context_tokens:
        raise _too_long(field, str(len(token_ids)), context_tokens)
    return token_ids


def _encoded(model: Model, text: str, field: str) -> list[int]:
    """The tokens of a text; one that is much too long is refused by its beginning.

    The tokens of a beginning are those of the whole but for the last word, so twice the context is far beyond doubt.
    """
    tokenizer, context_tokens = model.tokenizer, model.engine.context_tokens
    head = text[: _HEAD_CHARACTERS * context_tokens]
    if len(head) < len(text) and len(tokenizer.encode_batch([head])[0]) > 2 * context_tokens:
        raise _too_long(field, f"more than {context_tokens}", context_tokens)
    bos = tokenizer.bos_id is not None
    if len(text) <= _QUICK_CHARACTERS:
        return tokenizer.encode(text, bos=bos)
    return tokenizer.encode_batch([text], bos=bos)[0]


def _too_long(field: str, tokens: str, context_tokens: int) -> EbbflowError:
    message = f"the {field} has {tokens} tokens; the student's context holds {context_tokens}"
    return EbbflowError(Reason.CONTEXT_TOO_LONG, message, context_tokens=context_tokens)
