from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.teacher.quota import Quota


def test_a_minutes_tokens_are_there_at_once_and_then_come_back_steadily() -> None:
    quota = Quota(600)
    assert quota.take("ada", 600, 0.0) == 0
    assert quota.take("ada", 50, 0.0) == 5.0
    assert quota.take("ada", 50, 4.9) > 0
    assert quota.take("ada", 50, 5.0) == 0


def test_a_refusal_takes_nothing() -> None:
    quota = Quota(60)
    assert quota.take("ada", 61, 0.0) == 1.0
    assert quota.take("ada", 60, 0.0) == 0


def test_callers_do_not_share() -> None:
    quota = Quota(60)
    assert quota.take("ada", 60, 0.0) == 0
    assert quota.take("bob", 60, 0.0) == 0


def test_what_was_not_needed_comes_back_but_never_more_than_a_bucket() -> None:
    quota = Quota(60)
    quota.take("ada", 60, 0.0)
    quota.give_back("ada", 40, 0.0)
    assert quota.take("ada", 40, 0.0) == 0
    quota.give_back("ada", 10_000, 0.0)
    assert quota.take("ada", 61, 0.0) > 0


def test_callers_that_are_gone_take_no_memory() -> None:
    quota = Quota(60)
    for number in range(30_000):
        quota.take(f"caller-{number}", 1, float(number))
    assert len(quota._buckets) <= 10_000


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), max_size=60))
def test_no_caller_gets_more_than_the_rate_and_one_bucket(calls: list[tuple[float, int]]) -> None:
    quota, now, granted = Quota(60), 0.0, 0
    for wait, tokens in calls:
        now += wait
        if quota.take("ada", tokens, now) == 0:
            granted += tokens
    assert granted <= 60 + now + 1e-6
