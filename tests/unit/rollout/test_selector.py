"""Label selectors."""

import pytest

from ebbflow.cloud.rollout import selector
from ebbflow.common.errors import EbbflowError, Reason


def test_every_label_must_match() -> None:
    wanted = selector.parse("site=berlin, ring=beta")
    assert selector.matches(wanted, {"site": "berlin", "ring": "beta", "more": "x"})
    assert not selector.matches(wanted, {"site": "berlin"})


def test_no_selector_means_everybody() -> None:
    assert selector.matches(selector.parse(""), {})


@pytest.mark.parametrize("wrong", ["site", "site=a,site=b", "Site=x", "site=a b", '"=x', "a'b=x"])
def test_what_is_no_selector_is_refused(wrong: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        selector.parse(wrong)
    assert caught.value.reason is Reason.INVALID_REQUEST
