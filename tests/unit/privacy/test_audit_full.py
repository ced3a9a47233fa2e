"""The audit at its full size: every mechanism under weak and strict policies, and every bug of each."""

import pytest
from broken_builds import BUGS, Bug

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.audit.examine import DEFAULT_RUNS, examine, examine_sampler
from ebbflow.common.privacy.audit.subjects import SUBJECTS

pytestmark = pytest.mark.slow

POLICIES = [
    pb.PrivacyPolicy(epsilon=1.0),
    pb.PrivacyPolicy(epsilon=4.0),
    pb.PrivacyPolicy(epsilon=8.0, rounds_per_window=1),
]
CASES = [(name, bug) for name, bugs in BUGS.items() for bug in bugs]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.epsilon:g}")
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_device_s_own_code_passes(name: str, policy: pb.PrivacyPolicy) -> None:
    assert [finding for finding in examine(SUBJECTS[name](policy)) if finding.failed] == []


@pytest.mark.parametrize(("name", "bug"), CASES, ids=[f"{name}: {bug[0]}" for name, bug in CASES])
def test_a_bug_is_found_under_the_default_policy(name: str, bug: Bug) -> None:
    findings = examine(SUBJECTS[name](pb.PrivacyPolicy(epsilon=4.0)), DEFAULT_RUNS, bug[1]())
    assert any(finding.failed for finding in findings)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.epsilon:g}")
def test_the_sampler_passes_with_two_million_samples(policy: pb.PrivacyPolicy) -> None:
    findings = examine_sampler(SUBJECTS["votes"](policy).plan, 2_000_000)
    assert [finding.failed for finding in findings] == [False, False]
