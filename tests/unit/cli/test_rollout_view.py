"""What `ebbflow rollout watch` and `show` say of a rollout."""

import datetime as dt
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_cloud import PreparedCloud
from rich.console import Console

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.cli import rollout_screen, rollout_view
from ebbflow.cli.rollout_view import Counts

Run = Callable[..., Any]
NOW = dt.datetime(2026, 11, 21, 12, 0, 0, tzinfo=dt.UTC)


def rollout(**changes: Any) -> pb.Rollout:
    """Forty agents of which a canary of five has nearly passed."""
    made = pb.Rollout(
        name="rollouts/9f2c",
        release="students/faq/releases/3",
        state=pb.Rollout.STATE_RUNNING,
        phases=[
            pb.Phase(count=5, selector="ring=canary", max_probe_rise=0.02),
            pb.Phase(share=0.5),
            pb.Phase(share=1),
        ],
        counts=pb.DeviceCounts(waiting=33, assigned=2, succeeded=4, failed=1),
        results=[
            pb.PhaseResult(
                counts=pb.DeviceCounts(assigned=0, succeeded=4, failed=1),
                probe_rise=0.0012,
                acceptance=0.812,
                acceptance_elsewhere=0.83,
                acceptance_informative=True,
            ),
            pb.PhaseResult(counts=pb.DeviceCounts(waiting=18, assigned=2), probe_rise=0.0, acceptance=0.5),
            pb.PhaseResult(counts=pb.DeviceCounts(waiting=15)),
        ],
        next_decision=pb.NextDecision(action="advance to phase 2", reason="the soak time runs"),
        failures=[pb.Failure(reason="PROBE_FAILED", count=12, agents=["agents/kiosk-1", "agents/kiosk-2"])],
        fetched_bytes=12_000_000,
        full_bytes=96_000_000,
        creator="admins/ada",
        approver="admins/bob",
        on_halt=pb.ON_HALT_ROLL_BACK,
        windows=[pb.MaintenanceWindow(weekdays=[1, 2, 3, 4, 5], start="22:00", time_zone="Europe/Berlin")],
    )
    made.windows[0].duration.FromSeconds(8 * 3600)
    made.spread.FromSeconds(1800)
    made.phases[0].soak.FromSeconds(600)
    made.results[0].soak_end_time.FromDatetime(NOW + dt.timedelta(minutes=3, seconds=20))
    made.next_decision.earliest_time.FromDatetime(NOW + dt.timedelta(minutes=3, seconds=20))
    made.MergeFrom(pb.Rollout(**changes))
    return made


def text(message: pb.Rollout) -> str:
    return "\n".join(rollout_view.lines(rollout_view.view(message, NOW)))


def drawn(message: pb.Rollout, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(rollout_screen.render(rollout_view.view(message, NOW)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FACTS = (
    "rollouts/9f2c",
    "students/faq/releases/3",
    "running",
    "5 of ring=canary",
    "50 %",
    "the rest",
    "4/5",
    "0/20",
    "phase 1",
    "soak 3m20s left, probe rise +0.0012 (max 0.02), accepted 81.2 % (others 83.0 %)",
    "12.0 MB fetched of 96.0 MB in full, 84.0 MB saved (87.5 %)",
    "12 PROBE_FAILED: kiosk-1, kiosk-2 and 10 more",
    "by ada, approved by bob, open mon-fri 22:00 8h Europe/Berlin",
    "starts spread over 30m, on a halt roll back",
    "advance to phase 2: the soak time runs; at the earliest 2026-11-21 12:03:20 UTC (in 3m20s)",
)


@pytest.mark.parametrize("show", [text, drawn])
def test_everything_that_a_person_decides_by_is_shown(show: Callable[[pb.Rollout], str]) -> None:
    shown = show(rollout())
    assert [fact for fact in FACTS if fact not in shown] == []


def test_a_small_terminal_wraps_words_and_cuts_nothing() -> None:
    words = drawn(rollout(), width=80).split()
    assert [fact for fact in FACTS if " ".join(fact.split()) not in " ".join(words)] == []
    assert "…" not in words


def test_phases_count_from_1_and_the_current_one_is_marked() -> None:
    rows = [line for line in text(rollout(phase_index=1)).splitlines() if line[:1] in "* " and line[2:3].isdigit()]
    assert [(row[0], row[2]) for row in rows] == [(" ", "1"), ("*", "2"), (" ", "3")]
    assert rollout_view.position(rollout(phase_index=1)) == "2/3"
    assert "phase 1/3" in rollout_view.line(rollout_view.view(rollout(), NOW))


def test_acceptance_is_silent_until_it_says_something() -> None:
    seen = rollout_view.view(rollout(), NOW)
    assert [row.measures for row in seen.phases][1:] == [(), ()], "nobody has measured anything there"
    quiet = rollout()
    quiet.results[0].acceptance_informative = False
    assert "81.2" not in text(quiet)
    quiet.phases[0].max_acceptance_drop = 0.05
    assert "acceptance says nothing yet" in text(quiet)


def test_a_rise_of_nothing_has_no_sign_of_a_fall() -> None:
    still = rollout()
    still.results[0].probe_rise = -1e-9
    assert "probe rise +0.0000" in text(still)


def test_a_soak_time_is_told_before_it_runs_while_it_runs_and_when_it_is_over() -> None:
    before, over = rollout(), rollout()
    before.results[0].ClearField("soak_end_time")
    over.results[0].soak_end_time.FromDatetime(NOW)
    assert "soak 10m once it passes" in text(before)
    assert "soak over" in text(over)
    assert "soak" not in text(rollout(phase_index=1)).split("agents")[0]


def test_one_line_says_state_phase_devices_bytes_and_what_comes_next() -> None:
    line = rollout_view.line(rollout_view.view(rollout(), NOW))
    assert line == (
        "rollouts/9f2c running 4/40 phase 1/3, 2 assigned, 1 failed (12 PROBE_FAILED: kiosk-1, kiosk-2 and 10 more),"
        " 84.0 MB saved (87.5 %); next: advance to phase 2: the soak time runs;"
        " at the earliest 2026-11-21 12:03:20 UTC (in 3m20s)"
    )


def test_a_rollout_that_waits_for_approval_has_no_current_phase() -> None:
    waiting = rollout(state=pb.Rollout.STATE_WAITING_FOR_APPROVAL)
    seen = rollout_view.view(waiting, NOW)
    assert seen.state == "waiting for approval"
    assert {row.place for row in seen.phases} == {"later"}


def test_a_halt_tells_its_reason() -> None:
    halted = rollout(state=pb.Rollout.STATE_HALTED, reason="phase 1: 1 of 5 devices that answered failed")
    halted.next_decision.CopyFrom(pb.NextDecision(action="nothing until somebody acts", reason=halted.reason))
    for shown in (text(halted), drawn(halted), rollout_view.line(rollout_view.view(halted, NOW))):
        assert shown.count("phase 1: 1 of 5 devices that answered failed") == 1
        assert "nothing until somebody acts" in shown


def test_what_has_ended_has_no_next_decision() -> None:
    ended = rollout(state=pb.Rollout.STATE_ABORTED)
    ended.next_decision.CopyFrom(pb.NextDecision(reason="it has ended"))
    assert "next" not in text(ended)


@pytest.mark.parametrize(
    ("fetched", "full", "expected"),
    [
        (0, 0, ("nothing fetched yet", "")),
        (3_000, 0, ("3.0 kB fetched", "")),
        (120, 100, ("120 B fetched of 100 B in full", "")),
        (25, 100, ("25 B fetched of 100 B in full", "75 B saved (75 %)")),
    ],
)
def test_saved_bytes_are_full_less_fetched(fetched: int, full: int, expected: tuple[str, str]) -> None:
    assert rollout_view.traffic(fetched, full) == expected


def test_a_decision_that_is_due_is_due_now() -> None:
    decision = pb.NextDecision(action="advance to phase 2")
    assert rollout_view.decision(decision, NOW) == "advance to phase 2"
    decision.earliest_time.FromDatetime(NOW - dt.timedelta(seconds=5))
    assert rollout_view.decision(decision, NOW).endswith("(now)")


def test_nothing_that_a_device_sends_moves_the_cursor_or_is_taken_for_markup() -> None:
    bad = rollout(reason="\x1b[2J[red]", failures=[pb.Failure(reason="\x1b[31m[/bold]", count=1)])
    for shown in (text(bad), drawn(bad), rollout_view.line(rollout_view.view(bad, NOW))):
        assert "\x1b[2J" not in shown
        assert "\x1b[31m" not in shown
        assert "[red]" in shown, "a text is a text"


def test_an_empty_rollout_can_be_shown() -> None:
    assert "rollouts/a" in text(pb.Rollout(name="rollouts/a"))
    assert "rollouts/a" in drawn(pb.Rollout(name="rollouts/a", phases=[pb.Phase()]))


COUNTS = st.builds(Counts, *(st.integers(0, 100_000) for _ in range(4)))


@given(COUNTS, st.integers(4, 60))
def test_a_bar_has_all_its_cells_and_one_for_each_state_that_has_a_device(counts: Counts, cells: int) -> None:
    shares = rollout_screen.widths(counts, cells)
    assert sum(shares.values()) == cells
    assert all(shares[name] >= 1 for name in ("succeeded", "failed", "assigned", "waiting") if getattr(counts, name))


def test_a_bar_can_be_told_apart_without_colours_and_without_unicode() -> None:
    counts = Counts(waiting=5, assigned=5, succeeded=5, failed=5)
    assert str(rollout_screen.bar(counts, cells=8)) == "██✗✗▒▒░░"
    assert str(rollout_screen.bar(counts, cells=8, ascii_only=True)) == "##xx++.."


def watched(*messages: pb.Rollout | None) -> list[pb.WatchRolloutResponse | None]:
    return [message and pb.WatchRolloutResponse(rollout=message) for message in messages]


DONE = rollout(state=pb.Rollout.STATE_SUCCEEDED, phase_index=2)


def test_watching_prints_a_line_for_each_change_and_the_whole_at_the_end(ask: Run, prepared: PreparedCloud) -> None:
    later = rollout(phase_index=1)
    prepared.answers["WatchRollout"] = watched(rollout(), rollout(), later, DONE)
    seen = ask("rollout", "watch", "9f2c")
    assert seen.code == 0, seen.err
    lines = [line for line in seen.err.splitlines() if line.startswith("rollouts/9f2c")]
    assert ["phase 1/3" in lines[0], "phase 2/3" in lines[1], "succeeded" in lines[2], len(lines)] == [True] * 3 + [3]
    assert "12 PROBE_FAILED: kiosk-1" in seen.out
    assert "SUCCEEDED" in seen.out


def test_watching_as_json_prints_one_object_a_line_and_nothing_else(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["WatchRollout"] = watched(rollout(), DONE)
    seen = ask("rollout", "watch", "9f2c", "-o", "json")
    states = [json.loads(line)["state"] for line in seen.out.splitlines()]
    assert (states, seen.err, seen.code) == (["STATE_RUNNING", "STATE_SUCCEEDED"], "", 0)


def test_watching_goes_on_at_another_replica(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["WatchRollout"] = watched(rollout(), None, DONE)
    assert ask("rollout", "watch", "9f2c").code == 0
    assert len(prepared.asked) == 2


def test_a_terminal_gets_one_view_that_renews_itself_and_is_gone_at_the_end(
    on_terminal: Callable[[Callable[[], object]], str],
) -> None:
    def act() -> None:
        with rollout_screen.live(Console(stderr=True)) as show:
            show(rollout())
            show(DONE)

    shown = on_terminal(act)
    assert "█ 4 succeeded  ✗ 1 failed" in shown
    plain = re.sub(r"\x1b\[\d*m", "", shown)
    assert plain.index("running  phase 1/3") < plain.index("succeeded  phase 3/3")
    assert "\x1b[1A\x1b[2K" in shown, "the view is drawn over"
    assert "\x1b[31m" not in shown, "NO_COLOR is kept to"
    assert shown.endswith("\x1b[2K"), "nothing is left behind"


def test_an_interrupt_says_that_the_rollout_goes_on(ask: Run, prepared: PreparedCloud) -> None:
    def interrupt(message: pb.Rollout) -> None:
        raise KeyboardInterrupt

    prepared.answers["WatchRollout"] = watched(rollout())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ebbflow.cli.rollout_watch.ChangedLines.show", lambda self, message: interrupt(message))
        seen = ask("rollout", "watch", "9f2c")
    assert seen.code == 130
    assert "rollouts/9f2c goes on without you" in seen.err


@pytest.mark.parametrize("state", ["HALTED", "ABORTED", "SUPERSEDED"])
def test_watching_what_does_not_succeed_ends_with_5(ask: Run, prepared: PreparedCloud, state: str) -> None:
    ended = rollout(state=pb.Rollout.State.Value(f"STATE_{state}"), reason="too many failed")
    prepared.answers["WatchRollout"] = watched(rollout(), ended)
    seen = ask("rollout", "watch", "9f2c")
    assert seen.code == 5
    assert f"error: rollouts/9f2c {state.lower()}: too many failed" in seen.err


def test_showing_is_the_same_view_and_json_the_whole_message(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["GetRollout"] = pb.GetRolloutResponse(rollout=rollout())
    shown = ask("rollout", "show", "9f2c").out
    assert "84.0 MB saved (87.5 %)" in shown
    assert "kiosk-1, kiosk-2 and 10 more" in shown
    assert ask("rollout", "show", "9f2c", "-o", "json").json["failures"][0]["count"] == 12


def test_the_list_has_the_saved_share(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["ListRollouts"] = pb.ListRolloutsResponse(rollouts=[rollout(), pb.Rollout(name="rollouts/b")])
    head, first, second = ask("rollout", "list").out.splitlines()
    assert "BYTES SAVED" in head
    assert "87.5 %" in first
    assert "87.5 %" not in second
