"""The search for the rate that a server carries, and the line that says so."""

import pytest
from bench_serving import ABOVE, Search, summary
from hypothesis import given, settings
from hypothesis import strategies as st
from speed.open_loop import Asked, Load, Served

GOAL_MS = 1000.0
ASKED = Asked("127.0.0.1:1", "bench", 32, ())


def search(capacity: float) -> Search:
    found = Search(ASKED, iter(()), 1, GOAL_MS)
    found.begin(capacity)
    return found


def answered(rate: float, wait_s: float, count: int = 200) -> Load:
    return Load(rate, [Served(at / rate, at / rate + wait_s, at / rate + wait_s + 0.1, 128, 32) for at in range(count)])


@given(capacity=st.floats(0.1, 1000), carried=st.floats(0, 1), probes=st.integers(1, 12))
@settings(deadline=None)
def test_the_search_closes_in_on_what_a_server_carries(capacity: float, carried: float, probes: int) -> None:
    found, limit = search(capacity), capacity * carried
    for _ in range(probes):
        tried = found.rate
        met = found.learn(answered(tried, 0.5 if tried <= limit else 1.5))
        assert met == (tried <= limit)
        assert found.bounds[0 if met else 1] == tried
    low, high = found.bounds
    assert high - low == pytest.approx(ABOVE * capacity / 2**probes)
    assert low <= limit <= high
    assert found.best is None or found.best.rate == low


def test_one_answer_in_a_hundred_may_be_late_and_two_may_not() -> None:
    late = Served(0, 2, 2.1, 128, 32)
    one, two = answered(1, 0.5, 99), answered(1, 0.5, 98)
    one.served.append(late)
    two.served += [late, late]
    assert search(1).learn(one)
    assert not search(1).learn(two)


def test_a_probe_without_an_answer_or_given_up_does_not_count() -> None:
    lost, hopeless = answered(1, 0.5), answered(1, 0.5)
    lost.served.append(Served(0, float("inf"), 1, 0, 0))
    hopeless.gave_up = True
    for probe in (lost, hopeless):
        found = search(1)
        assert not found.learn(probe)
        assert found.best is None


def test_the_line_compares_what_both_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench_serving.peak_rss_mb", lambda pid: 100.0 * pid)
    ours, theirs = search(10), search(5)
    ours.learn(answered(8, 0.5))
    theirs.learn(answered(4, 0.5))
    line = summary({"ours": ours, "llama_server": theirs})
    assert line["metrics"]["rate_per_s"] == 8
    assert line["rivals"]["llama_server_first_token_p99_ms"] == 500
    assert line["ratios"]["throughput_vs_llama_server"] == pytest.approx(2, abs=0.05)
    assert line["ratios"]["closed_loop_vs_llama_server"] == 2


def test_nothing_is_compared_with_a_server_that_met_no_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench_serving.peak_rss_mb", lambda pid: 100.0 * pid)
    ours, theirs = search(10), search(5)
    ours.learn(answered(8, 0.5))
    theirs.learn(answered(4, 5))
    assert "throughput_vs_llama_server" not in summary({"ours": ours, "llama_server": theirs})["ratios"]
    assert summary({"ours": ours})["ratios"] == {}
