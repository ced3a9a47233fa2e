"""Commands of delivery: what they send, and what they say of the answers."""

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from prepared_cloud import PreparedCloud

from ebbflow.api.v1 import distillation_pb2, fleet_pb2, release_pb2, resources_pb2, rollout_pb2, student_pb2

Run = Callable[..., Any]
RELEASE = "students/faq/releases/3"


def made(**fields: Any) -> rollout_pb2.Rollout:
    phases = [rollout_pb2.Phase(count=29), rollout_pb2.Phase(share=1)]
    return rollout_pb2.Rollout(name="rollouts/9f2c", release=RELEASE, phases=phases, **fields)


def test_a_rollout_starts_with_everything_that_was_typed(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["CreateRollout"] = rollout_pb2.CreateRolloutResponse(rollout=made())
    phases = ["--phase", "count=29 selector=ring=canary soak=1h probe-rise=0.02", "--phase", "50% acceptance-drop=0.05"]
    rules = ["--window", "mon-fri 22:00 8h Europe/Berlin", "--spread", "30m", "--on-halt", "roll-back"]
    done = ask("rollout", "start", "faq/3", *phases, *rules, "--failure-share", "0.1", "--soak", "0.5s")
    assert done.code == 0, done.err
    (request,) = prepared.asked
    sent = request.rollout
    assert [(p.count, p.share, p.selector) for p in sent.phases] == [(29, 0, "ring=canary"), (0, 0.5, ""), (0, 1, "")]
    assert [p.soak.ToMilliseconds() for p in sent.phases] == [3_600_000, 500, 500]
    assert [p.failure_share for p in sent.phases] == [0.1, 0.1, 0.1]
    assert (sent.phases[0].max_probe_rise, sent.phases[1].max_acceptance_drop) == (0.02, 0.05)
    assert (list(sent.windows[0].weekdays), sent.windows[0].start) == ([1, 2, 3, 4, 5], "22:00")
    assert (sent.windows[0].duration.seconds, sent.windows[0].time_zone) == (28_800, "Europe/Berlin")
    assert (sent.spread.seconds, sent.on_halt) == (1800, rollout_pb2.ON_HALT_ROLL_BACK)
    assert len(request.request_id) == 36


def test_what_was_not_typed_is_left_to_the_students_policy(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["CreateRollout"] = rollout_pb2.CreateRolloutResponse(rollout=made())
    assert ask("rollout", "start", "faq/3").code == 0
    (request,) = prepared.asked
    assert request.rollout == rollout_pb2.Rollout(release=RELEASE)
    assert ask("rollout", "start", "faq/3", "--spread", "0s").code == 0
    assert prepared.asked[-1].rollout.HasField("spread"), "no spread is another word than none said"


def test_gates_alone_change_the_phases_of_the_students_policy(ask: Run, prepared: PreparedCloud) -> None:
    policy = student_pb2.RolloutPolicy(phases=[rollout_pb2.Phase(count=59), rollout_pb2.Phase(share=1)])
    prepared.answers["GetStudent"] = student_pb2.GetStudentResponse(student=student_pb2.Student(rollout_policy=policy))
    prepared.answers["CreateRollout"] = rollout_pb2.CreateRolloutResponse(rollout=made())
    assert ask("rollout", "start", "faq/3", "--min-answers", "7").code == 0
    asked, sent = prepared.asked
    assert asked.name == "students/faq"
    assert [(phase.count, phase.min_answers) for phase in sent.rollout.phases] == [(59, 7), (0, 7)]


def test_a_preview_shows_what_the_phases_can_see_and_starts_nothing(ask: Run, prepared: PreparedCloud) -> None:
    answer = rollout_pb2.PreviewRolloutResponse(
        rollout=made(),
        outlooks=[
            rollout_pb2.PhaseOutlook(agents=29, connected=20, detectable_failure_rate=0.0981),
            rollout_pb2.PhaseOutlook(agents=171, connected=170, detectable_failure_rate=0.0174),
        ],
        advised_canaries=59,
    )
    prepared.answers["PreviewRollout"] = answer
    seen = ask("rollout", "start", "faq/3", "--phase", "count=29 soak=1h", "--preview", "--failure-rate", "0.05")
    assert seen.code == 0, seen.err
    (request,) = prepared.asked
    assert (request.failure_rate, request.rollout.phases[0].count) == (0.05, 29)
    head, first, last = seen.out.splitlines()
    assert head.split()[:2] == ["PHASE", "BRINGS"]
    assert first.split()[:7] == ["1", "29", "agents", "29", "20", "9.81", "%"]
    assert last.startswith("2") and "the rest" in last and "1.74 %" in last  # noqa: PT018 - one line
    assert "to see a failure rate of 5 % with 95 % probability takes 59 canaries" in seen.err
    assert "the first phase has 20 connected" in seen.err
    assert ask("rollout", "start", "faq/3", "--preview", "-o", "json").json["advisedCanaries"] == 59


def test_advice_is_arithmetic_and_needs_no_cloud(run_alone: Run) -> None:
    table = [line.split() for line in run_alone("rollout", "advise").out.splitlines()[1:]]
    assert {row[0]: row[2] for row in table} | {"5": "59", "10": "29", "1": "299"} == {row[0]: row[2] for row in table}
    (one,) = run_alone("rollout", "advise", "--failure-rate", "0.05", "-o", "json").json
    assert one == {"failureRate": 0.05, "agents": 59, "confidence": 0.95}
    (seen,) = run_alone("rollout", "advise", "--agents", "29", "-o", "json").json
    assert seen["failureRate"] == pytest.approx(0.0981, abs=1e-4)
    assert run_alone("rollout", "advise", "--failure-rate", "1").code == 3
    assert run_alone("rollout", "advise", "--confidence", "0").code == 3


@pytest.mark.parametrize(
    ("arguments", "method", "expected"),
    [
        (["approve", "9f2c"], "Approve", rollout_pb2.ApproveRolloutRequest(name="rollouts/9f2c")),
        (["retry", "9f2c"], "Retry", rollout_pb2.RetryRolloutRequest(name="rollouts/9f2c")),
        (
            ["retry", "9f2c", "--agent", "kiosk-7", "--agent", "agents/kiosk-8"],
            "Retry",
            rollout_pb2.RetryRolloutRequest(name="rollouts/9f2c", agents=["agents/kiosk-7", "agents/kiosk-8"]),
        ),
        (["resume", "9f2c"], "Resume", rollout_pb2.ResumeRolloutRequest(name="rollouts/9f2c")),
    ],
)
def test_verbs_reach_the_cloud(
    ask: Run, prepared: PreparedCloud, arguments: list[str], method: str, expected: Any
) -> None:
    answer = getattr(rollout_pb2, f"{method}RolloutResponse")
    prepared.answers[f"{method}Rollout"] = answer(rollout=made(state=rollout_pb2.Rollout.STATE_RUNNING))
    done = ask("rollout", *arguments)
    assert done.code == 0, done.err
    assert prepared.asked == [expected]
    assert done.out.splitlines()[1].split()[2] == "running"


def test_going_back_asks_first_and_takes_a_number(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["RollBack"] = rollout_pb2.RollBackResponse(rollout=made())
    assert ask("rollout", "back", "faq").code == 1
    assert prepared.asked == [], "nobody has said yes"
    assert ask("rollout", "back", "faq", "--yes").code == 0
    assert ask("rollout", "back", "faq", "--to", "2", "--yes").code == 0
    assert ask("rollout", "back", "faq", "--to", "other/2", "--yes").code == 3
    assert [(asked.student, asked.release) for asked in prepared.asked] == [
        ("students/faq", ""),
        ("students/faq", "students/faq/releases/2"),
    ]


def test_starting_or_going_back_and_waiting_ends_as_the_rollout_ends(ask: Run, prepared: PreparedCloud) -> None:
    halted = made(state=rollout_pb2.Rollout.STATE_HALTED, reason="phase 1: SILENT")
    prepared.answers["CreateRollout"] = rollout_pb2.CreateRolloutResponse(rollout=made())
    prepared.answers["RollBack"] = rollout_pb2.RollBackResponse(rollout=made())
    for arguments in (["start", "faq/3"], ["back", "faq", "--yes"]):
        prepared.answers["WatchRollout"] = [rollout_pb2.WatchRolloutResponse(rollout=halted)]
        done = ask("rollout", *arguments, "--wait", "-o", "json")
        assert (done.code, done.json["state"]) == (5, "STATE_HALTED")
        assert "phase 1: SILENT" in done.err


COMPARISON = release_pb2.CompareReleasesResponse(
    variants=[
        release_pb2.VariantChange(
            precision=resources_pb2.PRECISION_INT8, full_bytes=100_000_000, delta_bytes=25_000_000, changed_share=0.31
        ),
        release_pb2.VariantChange(
            precision=resources_pb2.PRECISION_INT4, full_bytes=50_000_000, delta_bytes=0, changed_share=0.06
        ),
    ],
    tensors=[
        release_pb2.TensorChange(
            tensor=f"layers.{n}.mlp", changed_share=0.5 - n / 100, rescaled_share=0.07, rms_steps=1.25
        )
        for n in range(12)
    ],
    tokenizer_changed=True,
    configuration=["rope_theta: 500000 -> 1000000"],
    base_card=release_pb2.EvaluationCard(
        bits_per_byte=[1.5, 1.52], probe_loss=[2.0, 2.1], topic_bits_per_byte={"datetime": 1.4, "gone": 1.0}
    ),
    target_card=release_pb2.EvaluationCard(
        bits_per_byte=[1.25, 1.3], probe_loss=[1.9, 2.0], topic_bits_per_byte={"datetime": 1.2}, feedback_epsilon=4
    ),
)


def _with_variants(*letters: str) -> Callable[[Any], release_pb2.GetReleaseResponse]:
    precisions = [resources_pb2.Precision.Value(f"PRECISION_{letter}") for letter in letters]
    variants = [resources_pb2.Variant(precision=precision) for precision in precisions]
    return lambda asked: release_pb2.GetReleaseResponse(release=release_pb2.Release(name=asked.name, variants=variants))


def test_a_comparison_says_what_changed_and_what_it_costs(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["CompareReleases"] = COMPARISON
    prepared.answers["GetRelease"] = _with_variants("INT8", "INT4")
    seen = ask("release", "diff", "faq/2", "3")
    assert seen.code == 0, seen.err
    assert (prepared.asked[0].base, prepared.asked[0].target) == ("students/faq/releases/2", RELEASE)
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in seen.out.splitlines() if line}
    assert rows["int8"] == "int8 100.0 MB 25.0 MB 25 % 31 % 3m20s 20s 2.0s"
    assert rows["int4"] == "int4 50.0 MB none 100 % 6 % 6m40s 40s 4.0s"
    assert rows["tokenizer"] == "tokenizer changed"
    assert rows["configuration"] == "configuration rope_theta: 500000 -> 1000000"
    assert rows["layers.0.mlp"] == "layers.0.mlp 50 % 7 % 1.25"
    assert "layers.10.mlp" not in seen.out
    assert "and 2 tensors that changed less" in seen.out
    assert rows["bits per byte int8"] == "bits per byte int8 1.5000 1.2500 -0.2500"
    assert rows["probe loss int4"] == "probe loss int4 2.1000 2.0000 -0.1000"
    assert rows["topic datetime"] == "topic datetime 1.4000 1.2000 -0.2000"
    assert rows["topic gone"] == "topic gone 1.0000 -"
    assert rows["feedback epsilon"] == "feedback epsilon 0 4"


def test_a_comparison_as_json_is_the_whole_answer(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["CompareReleases"] = COMPARISON
    assert len(ask("release", "diff", "faq/2", "faq/3", "-o", "json").json["tensors"]) == 12
    assert ask("release", "diff", "faq/2", "other/3").code == 3


def test_each_figure_is_its_own_precisions(ask: Run, prepared: PreparedCloud) -> None:
    card = release_pb2.EvaluationCard(bits_per_byte=[1.0, 2.0, 3.0])
    fewer = release_pb2.EvaluationCard(bits_per_byte=[2.5, 3.5])
    prepared.answers["CompareReleases"] = release_pb2.CompareReleasesResponse(base_card=card, target_card=fewer)
    with_bf16, without = _with_variants("BF16", "INT8", "INT4"), _with_variants("INT8", "INT4")
    prepared.answers["GetRelease"] = lambda asked: (with_bf16 if asked.name.endswith("/2") else without)(asked)
    lines = [line.split() for line in ask("release", "diff", "faq/2", "faq/3").out.splitlines()]
    assert ["bits", "per", "byte", "bf16", "1.0000", "-"] in lines
    assert ["bits", "per", "byte", "int8", "2.0000", "2.5000", "+0.5000"] in lines
    assert ["bits", "per", "byte", "int4", "3.0000", "3.5000", "+0.5000"] in lines


def test_releases_that_share_nothing_can_be_compared(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["GetRelease"] = _with_variants()
    prepared.answers["CompareReleases"] = release_pb2.CompareReleasesResponse()
    seen = ask("release", "diff", "faq/2", "faq/3")
    assert seen.code == 0, seen.err
    assert "no precision is in both releases" in seen.out


def test_a_release_is_revoked_only_after_a_yes_and_with_a_reason(ask: Run, prepared: PreparedCloud) -> None:
    revoked = release_pb2.Release(name=RELEASE, state=release_pb2.Release.STATE_REVOKED, reason="wrong dosages")
    prepared.answers["RevokeRelease"] = release_pb2.RevokeReleaseResponse(release=revoked)
    assert ask("release", "revoke", "faq/3", "--reason", "wrong dosages").code == 1
    assert ask("release", "revoke", "faq/3", "--yes").code == 2
    assert prepared.asked == []
    done = ask("release", "revoke", "faq/3", "--reason", "wrong dosages", "--yes", "-o", "json")
    assert (done.code, done.json["state"]) == (0, "STATE_REVOKED")
    assert "the signed list follows" in done.err
    assert prepared.asked == [release_pb2.RevokeReleaseRequest(name=RELEASE, reason="wrong dosages")]


def test_the_lowest_release_is_raised_only_after_a_yes(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["RaiseMinRelease"] = release_pb2.RaiseMinReleaseResponse(name=RELEASE)
    assert ask("release", "min", "faq/3").code == 1
    assert prepared.asked == []
    assert ask("release", "min", "faq/3", "--yes", "-o", "json").json == {"name": RELEASE}


def _release(state: str, **fields: Any) -> release_pb2.GetReleaseResponse:
    number = release_pb2.Release.State.Value(f"STATE_{state}")
    return release_pb2.GetReleaseResponse(release=release_pb2.Release(name=RELEASE, state=number, **fields))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebbflow.cli.commands.releases.POLL_S", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("state", "code"), [("PUBLISHED", 0), ("REJECTED", 5), ("REVOKED", 5), ("RETIRED", 5)])
def test_watching_a_release_ends_with_the_gates_word(ask: Run, prepared: PreparedCloud, state: str, code: int) -> None:
    decided = _release(state, reason="" if state == "PUBLISHED" else "worse than faq/2")
    prepared.answers["GetRelease"] = [_release("PACKED"), _release("PROPOSED"), decided]
    seen = ask("release", "watch", "faq/3")
    assert seen.code == code
    told = [line.split()[1] for line in seen.err.splitlines() if line.startswith(RELEASE)]
    assert told == ["packed", "proposed", state.lower()]
    assert seen.out.splitlines()[1].split()[1] == state.lower()
    assert ("worse than faq/2" in seen.err) == bool(code)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("state", "code"), [("PUBLISHED", 0), ("REJECTED", 5)])
def test_waiting_for_a_distillation_waits_for_the_gate_too(
    ask: Run, prepared: PreparedCloud, state: str, code: int
) -> None:
    succeeded = distillation_pb2.Distillation(
        name="distillations/6f0a", state=distillation_pb2.Distillation.STATE_SUCCEEDED, release=RELEASE
    )
    queued = distillation_pb2.CreateDistillationResponse(
        distillation=distillation_pb2.Distillation(name="distillations/6f0a")
    )
    prepared.answers["CreateDistillation"] = queued
    watched = distillation_pb2.WatchDistillationResponse(distillation=succeeded)
    prepared.answers["WatchDistillation"] = [watched]
    prepared.answers["GetRelease"] = [_release("PROPOSED"), _release(state)]
    done = ask("distillation", "start", "faq", "--wait", "-o", "json")
    assert (done.code, done.json["release"]) == (code, RELEASE)
    assert f"{RELEASE} {state.lower()}" in done.err
    prepared.answers["WatchDistillation"] = [watched]
    assert "ebbflow release watch faq/3" in ask("distillation", "watch", "6f0a").err


def _agent(**fields: Any) -> fleet_pb2.Agent:
    pin = fleet_pb2.Pin(student="students/faq", release="students/faq/releases/2", reason="slow board")
    pin.create_time.FromDatetime(dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC))
    return fleet_pb2.Agent(name="agents/kiosk-7", pins=[pin], **fields)


def test_agents_are_pinned_shown_with_their_pins_and_unpinned(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["PinAgent"] = fleet_pb2.PinAgentResponse(agent=_agent())
    prepared.answers["UnpinAgent"] = fleet_pb2.UnpinAgentResponse(agent=fleet_pb2.Agent(name="agents/kiosk-7"))
    prepared.answers["GetAgent"] = fleet_pb2.GetAgentResponse(agent=_agent())
    prepared.answers["ListAgents"] = fleet_pb2.ListAgentsResponse(agents=[_agent()])
    assert ask("agent", "pin", "kiosk-7", "--release", "faq/2", "--reason", "slow board").code == 0
    assert ask("agent", "unpin", "kiosk-7", "--student", "faq", "-o", "json").json["pins"] == []
    assert prepared.asked == [
        fleet_pb2.PinAgentRequest(name="agents/kiosk-7", release="students/faq/releases/2", reason="slow board"),
        fleet_pb2.UnpinAgentRequest(name="agents/kiosk-7", student="students/faq"),
    ]
    for verb in ("show", "get"):
        shown = ask("agent", verb, "kiosk-7").out
        assert "    release: students/faq/releases/2" in shown
        assert "    reason: slow board" in shown
    assert ask("agent", "list").out.splitlines()[1].split()[-2] == "faq/2"
    assert ask("agent", "pin", "kiosk-7", "--release", "faq/2").code == 2, "a reason is wanted"


def test_a_policy_is_shown_as_it_would_be_typed(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["GetStudent"] = student_pb2.GetStudentResponse(student=student_pb2.Student(name="students/faq"))
    assert [line.split(maxsplit=1) for line in ask("student", "policy", "faq").out.splitlines()] == [
        ["approval", "not needed"],
        ["phases", "built-in: 10 %, then all"],
        ["windows", "always"],
        ["spread", "none"],
        ["on", "halt        hold"],
        ["kept", "releases  10"],
    ]
    assert len(prepared.asked) == 1, "nothing was changed"


def test_a_policy_keeps_what_no_option_names(ask: Run, prepared: PreparedCloud) -> None:
    kept = student_pb2.RolloutPolicy(approval_required=True, kept_releases=7)
    kept.spread.FromSeconds(60)
    prepared.answers["GetStudent"] = lambda request: student_pb2.GetStudentResponse(
        student=student_pb2.Student(rollout_policy=kept)
    )
    prepared.answers["UpdateRolloutPolicy"] = lambda request: student_pb2.UpdateRolloutPolicyResponse(
        student=student_pb2.Student(rollout_policy=request.rollout_policy)
    )
    rules = ["--window", "sat,sun 00:00 1d", "--phase", "count=29 soak=1h", "--on-halt", "roll-back"]
    shown = ask("student", "policy", "faq", *rules)
    assert shown.code == 0, shown.err
    sent = prepared.asked[-1].rollout_policy
    assert (sent.approval_required, sent.kept_releases, sent.spread.seconds) == (True, 7, 60)
    assert [phase.count for phase in sent.phases] == [29, 0]
    assert list(sent.windows[0].weekdays) == [6, 7]
    for fact in ("by a second person", "count=29 soak=1h", "sat-sun 00:00 1d UTC", "roll back"):
        assert fact in shown.out


def test_a_policy_can_be_taken_back(ask: Run, prepared: PreparedCloud) -> None:
    kept = student_pb2.RolloutPolicy(
        approval_required=True,
        phases=[rollout_pb2.Phase(share=1)],
        windows=[rollout_pb2.MaintenanceWindow(start="00:00")],
    )
    prepared.answers["GetStudent"] = student_pb2.GetStudentResponse(student=student_pb2.Student(rollout_policy=kept))
    prepared.answers["UpdateRolloutPolicy"] = student_pb2.UpdateRolloutPolicyResponse()
    rules = ["--no-approval", "--window", "always", "--phase", "default", "--spread", "0s", "--kept-releases", "0"]
    assert ask("student", "policy", "faq", *rules).code == 0
    sent = prepared.asked[-1].rollout_policy
    assert (sent.approval_required, len(sent.phases), len(sent.windows), sent.kept_releases) == (False, 0, 0, 0)


@pytest.mark.parametrize(
    ("option", "allowed", "said"), [("--allow", True, "allowed"), ("--forbid", False, "forbidden")]
)
def test_escalation_is_allowed_and_forbidden_by_one_word(
    option: str, allowed: bool, said: str, ask: Run, prepared: PreparedCloud
) -> None:
    prepared.answers["UpdateEscalationPolicy"] = lambda request: student_pb2.UpdateEscalationPolicyResponse(
        student=student_pb2.Student(escalation_policy=request.escalation_policy)
    )
    shown = ask("student", "escalation", "faq", option)
    assert (shown.code, shown.out.strip()) == (0, said), shown.err
    (sent,) = prepared.asked
    assert (sent.name, sent.escalation_policy.allowed) == ("students/faq", allowed)


def test_escalation_is_shown_without_being_changed(ask: Run, prepared: PreparedCloud) -> None:
    prepared.answers["GetStudent"] = student_pb2.GetStudentResponse(student=student_pb2.Student(name="students/faq"))
    assert ask("student", "escalation", "faq").out.strip() == "forbidden"
    assert len(prepared.asked) == 1
