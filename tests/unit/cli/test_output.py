import datetime as dt
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1.distillation_pb2 import Distillation, Recipe
from ebbflow.api.v1.fleet_pb2 import Agent
from ebbflow.api.v1.resources_pb2 import Installation, InstallationState, Precision
from ebbflow.cli import errors, output, watching
from ebbflow.cli.commands import agents, distillations
from ebbflow.cli.watching import Lines, Reading, follow, remaining
from ebbflow.common.errors import EXIT_CODES, Code, EbbflowError, Reason

NOW = dt.datetime(2026, 11, 1, 12, tzinfo=dt.UTC)


@given(st.lists(st.tuples(st.text(max_size=10), st.text(max_size=10)), max_size=5))
def test_a_table_has_one_line_for_each_row_whatever_devices_send(rows: list[tuple[str, str]]) -> None:
    cells = [[output._cell(cell) for cell in row] for row in rows]
    lines = output.table(["A", "B"], cells)
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() for line in lines)


def test_nothing_that_a_device_sends_moves_the_terminals_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(name="agents/a", reason="\x1b[2Jgone\r\n", labels={"a": "\x1b[31m"})
    output.print_one(output.Format.TABLE, agent)
    output.print_list(output.Format.TABLE, [agent], agents.COLUMNS)
    assert "\x1b" not in capsys.readouterr().out


def test_json_keeps_empty_fields_and_non_latin_letters(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_list(output.Format.JSON, [Agent(name="agents/a", reason="gestört")], [])
    printed = capsys.readouterr().out
    assert '"connected": false' in printed
    assert "gestört" in printed


def test_agents_show_what_they_serve() -> None:
    installation = Installation(
        release="students/faq/releases/3",
        precision=Precision.PRECISION_INT4,
        state=InstallationState.INSTALLATION_STATE_SERVING,
    )
    cells = {head: value(Agent(installations=[installation])) for head, value in agents.COLUMNS}
    assert cells["RELEASES"] == "faq/3 int4 serving"
    assert cells["LAST SEEN (UTC)"] == "-"


def test_a_distillations_progress_tells_loss_speed_and_the_time_left() -> None:
    running = Distillation(
        name="distillations/a", state=Distillation.STATE_RUNNING, recipe=Recipe(steps=10), step=3, loss=2.5
    )
    running.tokens_per_second = 5300
    running.eta_time.FromDatetime(NOW + dt.timedelta(seconds=200))
    assert distillations.reading(running, NOW).line("x") == "x running 3/10 loss 2.5000, 5,300 tokens/s, 3m20s left"
    assert distillations.reading(Distillation(state=Distillation.STATE_QUEUED), NOW).line("x") == "x queued 0/0"


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3661, "1h01m")])
def test_the_time_left_reads_as_people_say_it(seconds: float, text: str) -> None:
    assert remaining(seconds) == text


def test_lines_are_few_but_every_state_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    time = [0.0]
    lines = Lines("x", lambda: time[0])
    for step in range(100):
        time[0] += 0.5
        lines.show(Reading("running", step, 100, ""))
    lines.show(Reading("succeeded", 100, 100, ""))
    told = capsys.readouterr().err.splitlines()
    assert (told[0], told[-1]) == ("x running 0/100", "x succeeded 100/100")
    assert len(told) <= 7


def _read(item: int) -> Reading:
    return Reading("running", item, 3, "")


def test_a_stream_that_breaks_is_opened_again() -> None:
    waits: list[float] = []
    attempts: list[list[int | EbbflowError]] = [[0, EbbflowError(Reason.SERVER_UNAVAILABLE, "gone")], [], [1, 2], [3]]
    parts = iter(attempts)

    def stream() -> Iterator[int]:
        for item in next(parts):
            if isinstance(item, EbbflowError):
                raise item
            yield item

    assert follow("x", stream, _read, lambda item: item == 3, waits.append) == 3
    assert len(waits) == 3


def test_a_server_that_stays_away_is_given_up_and_other_errors_at_once() -> None:
    for reason, most in ((Reason.SERVER_UNAVAILABLE, 11), (Reason.DISTILLATION_NOT_FOUND, 1)):
        tries: list[Reason] = []

        def stream(reason: Reason = reason, tries: list[Reason] = tries) -> Iterator[int]:
            tries.append(reason)
            raise EbbflowError(reason, "gone")

        with pytest.raises(EbbflowError):
            follow("x", stream, _read, lambda item: False, lambda seconds: None)
        assert len(tries) == most


def test_a_terminal_gets_a_bar(on_terminal: Callable[[Callable[[], object]], str]) -> None:
    shown = on_terminal(lambda: follow("distillations/a", lambda: iter([1, 3]), _read, lambda item: item == 3))
    assert "3/3" in shown
    assert "\x1b[31m" not in shown


def test_every_status_has_an_exit_code_and_every_error_ends_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(EXIT_CODES) == set(Code)
    for reason in Reason:

        def fail(reason: Reason = reason) -> None:
            raise EbbflowError(reason, "the thing")

        with pytest.raises(SystemExit) as caught:
            errors.run(fail)
        assert caught.value.code == EXIT_CODES[reason.value.code]
        assert capsys.readouterr().err == f"error: the thing\ncure: {reason.value.cure}\n"


def test_an_unexpected_error_is_one_line_unless_debugging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    monkeypatch.delenv("EBBFLOW_DEBUG", raising=False)
    with pytest.raises(SystemExit):
        errors.run(fail)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("EBBFLOW_DEBUG", "1")
    with pytest.raises(SystemExit) as caught:
        errors.run(fail)
    assert "Traceback" in capsys.readouterr().err
    assert caught.value.code == 1


def test_an_interrupted_command_ends_with_130() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        errors.run(interrupt)
    assert caught.value.code == 130


def test_a_reader_that_leaves_early_is_no_error() -> None:
    import subprocess

    root = Path(__file__).resolve().parents[3]
    path = ":".join(str(root / portion) for portion in ("cloud", "common"))
    program = (
        "from ebbflow.cli import errors, output\n"
        "errors.run(lambda: [output.print_json('x' * 100) for _ in range(100_000)])"
    )
    command = f'{sys.executable} -c "{program}" | head -n 1; test ${{PIPESTATUS[0]}} = 0'
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert watching.WATCH_S > 3600
