"""Pieces of text join to the text, whatever its language and wherever its tokens break."""

from hypothesis import example, given
from hypothesis import strategies as st

from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.serving.chat import Message, last_said, transcript
from ebbflow.edge.serving.text import StopText, TokenText

TEXT = st.text(max_size=60)


@given(TEXT)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = TokenText(tokenizer.decode)
    tokens = tokenizer.encode(text)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@example([97, 0, 0, 0, 0, 0, 0, 0, 129, 97])
@example([97, 97, 97, 97, 97, 97, 97, 97, 129, 97])
@given(st.lists(st.integers(0, 299), max_size=80))
def test_any_tokens_at_all_join_to_what_they_decode_to(tokenizer: Tokenizer, tokens: list[int]) -> None:
    stream = TokenText(tokenizer.decode)
    joined = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert joined.replace("\N{REPLACEMENT CHARACTER}", "") == tokenizer.decode(tokens).replace(
        "\N{REPLACEMENT CHARACTER}", ""
    )


@given(st.lists(st.text("abcx", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_answer_ends_before_the_first_stop_text(pieces: list[str], stops: list[str]) -> None:
    stream, shown = StopText(stops), ""
    whole = "".join(pieces)
    for piece in pieces:
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += "" if stream.stopped else stream.finish()
    assert stream.stopped == any(stop in whole for stop in stops)
    assert whole.startswith(shown)
    if not stream.stopped:
        assert shown == whole


def test_a_chat_becomes_a_transcript_that_the_assistant_continues() -> None:
    messages = [
        Message("developer", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yes?"),
        Message("user", "1+1"),
    ]
    assert transcript(messages) == "System: Be brief.\nUser: Hi\nAssistant: Yes?\nUser: 1+1\nAssistant:"
    assert last_said(messages) == "1+1"
    assert last_said(messages[:1]) == ""
