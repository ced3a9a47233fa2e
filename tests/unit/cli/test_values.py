import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cli import values
from ebbflow.common.errors import EbbflowError, Reason


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("15m", 900), ("1h30m", 5400), ("7d", 604_800), ("0.5s", 0.5), ("0s", 0)]
)
def test_times_are_read(text: str, expected: float) -> None:
    assert values.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "1", "s", "1 h", "-1h", "1w", "1h-", "1.h", "∞", "1hh"])
def test_anything_else_is_no_time(text: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        values.seconds(text)
    assert caught.value.reason is Reason.INVALID_REQUEST


@given(st.text(max_size=12))
def test_no_text_breaks_the_reading_of_times_labels_shares_and_names(text: str) -> None:
    for read in (
        values.seconds,
        lambda text: values.labels([text]),
        lambda text: values.label_changes([text]),
        lambda text: values.shares([text]),
        lambda text: values.full_name("agents", text),
        values.release_name,
        lambda text: values.architecture(text, {}),
    ):
        try:
            read(text)
        except EbbflowError as error:
            reason = error.reason
        else:
            reason = Reason.INVALID_REQUEST
        assert reason is Reason.INVALID_REQUEST


def test_labels_may_hold_what_labels_hold() -> None:
    assert values.labels(["site=berlin", "note=a=b", "empty="]) == {"site": "berlin", "note": "a=b", "empty": ""}
    assert values.label_changes(["ring=beta", "site-", "odd-=x"]) == ({"ring": "beta", "odd-": "x"}, ["site"])


def test_shares_may_not_be_negative_or_endless() -> None:
    assert values.shares(["datetime=0.5", "a=b=2"]) == {"datetime": 0.5, "a=b": 2.0}
    for wrong in ("datetime=-1", "datetime=inf", "datetime=nan", "datetime=", "=1"):
        with pytest.raises(EbbflowError):
            values.shares([wrong])


def test_names_may_be_short() -> None:
    assert values.full_name("agents", "kiosk-7") == values.full_name("agents", "agents/kiosk-7") == "agents/kiosk-7"
    assert values.release_name("faq/3") == values.release_name("students/faq/releases/3") == "students/faq/releases/3"
    for wrong in ("students/faq", "agents/", "Kiosk"):
        with pytest.raises(EbbflowError):
            values.full_name("agents", wrong)


def test_an_architecture_is_its_file_overridden_by_options() -> None:
    file = "hidden_size = 64\nintermediate_size = 128\nnum_hidden_layers = 2\nnum_attention_heads = 4\n"
    shape = values.architecture(file, {"hidden_size": 96, "num_key_value_heads": 2, "head_dim": None})
    assert (shape["hidden_size"], shape["num_key_value_heads"], "head_dim" in shape) == (96, 2, False)
    assert values.architecture("", {"initial_checkpoint": "/c"}) == {"initial_checkpoint": "/c"}
    for wrong in ("hidden_sise = 64", "hidden_size = 6.4", "hidden_size = true", "hidden_size = 64", "= x"):
        with pytest.raises(EbbflowError):
            values.architecture(wrong, {})
