"""The two halves of a worker's process: they end together."""

import threading

import pytest

from ebbflow.cloud.processes.work import beside
from ebbflow.common.errors import EbbflowError, Reason


def test_a_step_that_fails_without_a_name_ends_the_process_with_its_error(caplog: pytest.LogCaptureFixture) -> None:
    stop, words = threading.Event(), "what somebody wrote"

    def fail() -> None:
        raise LookupError(words)

    with pytest.raises(LookupError), beside(stop, "proposer", 60.0, fail):
        assert stop.wait(60)
    assert "the proposer ends this process: unhandled LookupError" in caplog.text
    assert words not in caplog.text


def test_a_step_that_fails_with_a_name_is_taken_again() -> None:
    stop, thrice, tries = threading.Event(), threading.Event(), list[int]()

    def fail() -> None:
        tries.append(1)
        if len(tries) == 3:
            thrice.set()
        raise EbbflowError(Reason.DATABASE_UNAVAILABLE, "read-only")

    with beside(stop, "proposer", 0.001, fail):
        assert thrice.wait(60)
        assert not stop.is_set()
    assert stop.is_set()


def test_the_block_that_fails_ends_the_thread_and_its_own_error_is_told() -> None:
    stop = threading.Event()
    with pytest.raises(ArithmeticError), beside(stop, "proposer", 60.0, lambda: None):
        raise ArithmeticError
    assert stop.is_set()
    assert "proposer" not in {thread.name for thread in threading.enumerate()}
