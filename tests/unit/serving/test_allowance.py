"""When a device may ask the teacher: a state machine, held against every history that hypothesis thinks of."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ebbflow.edge.serving.allowance import FIRST_HOLD_S, MOST_HOLD_S, PERMISSION_S, Allowance

students = st.sampled_from(["students/a", "students/b"])


class Histories(RuleBasedStateMachine):
    """Time passes, questions are sent, the cloud speaks or is gone."""

    @initialize(most=st.integers(1, 4), window_s=st.sampled_from([1.0, 60.0, 3600.0]))
    def begin(self, most: int, window_s: float) -> None:
        self.most, self.window_s, self.now_s = most, window_s, 1000.0
        self.allowance = Allowance(most, window_s)
        self.sent: list[float] = []
        self.held_until_s = 0.0
        self.words: dict[str, tuple[bool, float]] = {}

    @rule(seconds=st.one_of(st.floats(0, 2), st.floats(0, 5000)))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(student=students, asked=st.booleans())
    def send(self, student: str, asked: bool) -> None:
        if asked and not self.allowance.open(student, self.now_s):
            return
        if self.allowance.take(self.now_s):
            self.sent.append(self.now_s)
        else:
            assert not asked, "an open allowance has something left"

    @rule(student=students, allowed=st.booleans())
    def hear(self, student: str, allowed: bool) -> None:
        self.allowance.learn(student, self.now_s, allowed=allowed)
        self.words[student] = (allowed, self.now_s + PERMISSION_S)

    @rule(retry_after_s=st.one_of(st.just(0.0), st.floats(0.1, 10_000)))
    def fail(self, retry_after_s: float) -> None:
        self.allowance.failed(self.now_s, retry_after_s)
        least_s = min(retry_after_s, MOST_HOLD_S) if retry_after_s else FIRST_HOLD_S
        self.held_until_s = max(self.held_until_s, self.now_s + least_s)

    @rule()
    def succeed(self) -> None:
        self.allowance.succeeded()

    @invariant()
    def no_window_holds_more_than_the_budget(self) -> None:
        for end_s in getattr(self, "sent", []):
            inside = [time_s for time_s in self.sent if end_s - self.window_s < time_s <= end_s]
            assert len(inside) <= self.most

    @invariant()
    def it_is_shut_while_held_spent_or_forbidden_and_opens_again(self) -> None:
        if not hasattr(self, "sent"):
            return
        spent = len([time_s for time_s in self.sent if time_s > self.now_s - self.window_s]) >= self.most
        for student in ("students/a", "students/b"):
            allowed, until_s = self.words.get(student, (True, 0.0))
            forbidden = not allowed and self.now_s < until_s
            if spent or forbidden or self.now_s < self.held_until_s:
                assert not self.allowance.open(student, self.now_s)
            elif self.now_s >= self.held_until_s + MOST_HOLD_S:
                assert self.allowance.open(student, self.now_s)


TestHistories = Histories.TestCase
TestHistories.settings = settings(deadline=None, max_examples=80)


@given(st.integers(1, 30))
@settings(deadline=None)
def test_failures_in_a_row_hold_for_longer_each_time_up_to_a_limit(count: int) -> None:
    allowance, now_s, holds = Allowance(10, 60.0), 0.0, []
    for _ in range(count):
        allowance.failed(now_s)
        wait_s = FIRST_HOLD_S
        while not allowance.open("students/a", now_s + wait_s):
            wait_s *= 2
        holds.append(wait_s)
        now_s += MOST_HOLD_S
    assert holds == sorted(holds)
    assert holds[-1] <= 2 * MOST_HOLD_S
    allowance.succeeded()
    allowance.failed(now_s)
    assert allowance.open("students/a", now_s + FIRST_HOLD_S)


def test_the_clouds_word_is_asked_for_again_after_a_while() -> None:
    allowance = Allowance(1, 60.0)
    assert allowance.permission("students/a", 0.0) is None
    for allowed in (False, True):
        allowance.learn("students/a", 0.0, allowed=allowed)
        assert allowance.permission("students/a", PERMISSION_S - 1) is allowed
        assert allowance.permission("students/a", PERMISSION_S) is None
    assert allowance.permission("students/b", 0.0) is None
