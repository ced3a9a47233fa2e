"""The real release code of every mechanism passes its audit, and each build with a bug fails it."""

import pytest
from broken_builds import BUGS, Bug
from feedback_world import DAY, NOW, signed_policy

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import Timing, make_plan
from ebbflow.common.privacy.audit.examine import DEFAULT_RUNS, examine, examine_sampler
from ebbflow.common.privacy.audit.subjects import SUBJECTS
from ebbflow.common.privacy.vector import add_contributions, layout_of

EPSILON = {"votes": 8.0, "metrics": 8.0, "adapters": 16.0}
RUNS = {"votes": 3000, "metrics": 3000, "adapters": 1500}
"""So many find each of these bugs but once in a million tests; the strict policies take the full size."""
QUICK = {
    "votes": [name for name, _ in BUGS["votes"]],
    "metrics": ["clip missing", "metrics forgotten"],
    "adapters": ["sigma halved", "clip missing"],
}
"""What is common to all mechanisms is looked for in votes here, and in all of them by test_audit_full.py."""
CASES = [(name, bug) for name, bugs in BUGS.items() for bug in bugs if bug[0] in QUICK[name]]


def policy(epsilon: float) -> pb.PrivacyPolicy:
    return pb.PrivacyPolicy(epsilon=epsilon)


@pytest.mark.parametrize(
    ("name", "epsilon"), [("votes", 1.0), ("votes", 64.0), ("metrics", 1.0), ("metrics", 64.0), ("adapters", 4.0)]
)
def test_the_device_s_own_code_passes(name: str, epsilon: float) -> None:
    findings = examine(SUBJECTS[name](policy(epsilon)), 1000)
    assert [finding for finding in findings if finding.failed] == []


@pytest.mark.parametrize(("name", "bug"), CASES, ids=[f"{name}: {bug[0]}" for name, bug in CASES])
def test_a_bug_is_found(name: str, bug: Bug) -> None:
    _, build = bug
    findings = examine(SUBJECTS[name](policy(EPSILON[name])), RUNS[name], build())
    assert any(finding.failed for finding in findings)


def test_what_is_audited_is_what_the_cloud_asks_for() -> None:
    subject = SUBJECTS["votes"](policy(4.0))
    timing = Timing(NOW, DAY, 7 * DAY)
    plan = make_plan("r1", "faq", signed_policy(policy(4.0)), list(subject.plan.bins), timing)
    assert (plan.mechanism, plan.policy) == (subject.plan.mechanism, subject.plan.policy)
    assert (layout_of(plan), DEFAULT_RUNS) == (layout_of(subject.plan), 50_000)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_user_pushes_as_hard_as_anyone_can(name: str) -> None:
    """Otherwise the audit would look at less than one user may do."""
    subject = SUBJECTS[name](policy(4.0))
    change = add_contributions(subject.plan, [subject.canary])
    bound = subject.plan.mechanism.sensitivity_squared
    assert 0.97 * bound <= sum(value * value for value in change) <= bound
    moved = subject.weights()[0] @ change[: subject.weights().shape[1]]
    assert moved**2 == pytest.approx(bound, rel=0.03)


def test_fewer_runs_than_prove_anything_are_refused() -> None:
    with pytest.raises(ValueError, match="proves nothing"):
        examine(SUBJECTS["votes"](policy(4.0)), 10)


def test_the_sampler_passes() -> None:
    findings = examine_sampler(SUBJECTS["votes"](policy(4.0)).plan, 50_000)
    assert [(finding.mechanism, finding.failed) for finding in findings] == [("sampler", False)] * 2


def test_progress_tells_every_run() -> None:
    told: list[int] = []
    examine(SUBJECTS["votes"](policy(4.0)), 1200, progress=told.append)
    assert sum(told) == 2400
