"""One agent's influence on a round is bounded, and an honest fleet's sums stay what they were."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from feedback_world import mixture_of
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback import limits
from ebbflow.cloud.feedback.aggregate import aggregate
from ebbflow.common.privacy.calibration import calibrate

SIGMA = 2.388
BINS = 20

Array = npt.NDArray[np.float64]


def plan_of(bins: int = BINS, metrics: int = 0) -> pb.RoundPlan:
    return pb.RoundPlan(
        bins=[pb.Bin(bin_id=str(at)) for at in range(bins)],
        metrics=[pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=3)] * metrics,
        null_bins=64,
        mechanism=calibrate(4.0, 1e-6, 4),
        max_users=1000,
    )


def fleet(agents: int, sizes: str = "equal", bins: int = BINS, seed: int = 0) -> Array:
    """Noisy reports of an honest fleet: each agent has some bins of its own."""
    rng = np.random.default_rng(seed)
    users_A = {"equal": np.full(agents, 20), "skewed": rng.geometric(1 / 20, agents), "none": np.zeros(agents, int)}
    rows = []
    for users in users_A[sizes]:
        votes = rng.multinomial(users, rng.dirichlet(np.full(2 * bins, 0.1)))
        rows.append(np.concatenate([votes, np.zeros(64)]) + np.rint(rng.normal(0, SIGMA, 2 * bins + 64)))
    return np.array(rows)


def votes_of(reports: Array) -> Array:
    return reports[:, : 2 * BINS]


def learn(votes: Array, sigma: float = SIGMA) -> limits.Limits | None:
    whole = votes.astype(int)
    return limits.find(whole.sum(axis=1).tolist(), whole.max(axis=1).tolist(), votes.shape[1], sigma)


@pytest.mark.parametrize(("sizes", "lost"), [("equal", 0.002), ("none", 0.002), ("skewed", 0.05)])
@pytest.mark.parametrize("agents", [3, 20, 400])
def test_an_honest_fleet_is_added_up_as_it_is(agents: int, sizes: str, lost: float) -> None:
    reports = fleet(agents, sizes)
    result = aggregate(plan_of(), reports.astype(int).tolist())
    assert result.batches == agents
    assert result.limited_batches <= lost * agents + 1
    found = np.array([[bin_.seen, bin_.failed] for bin_ in result.bins]).T.ravel()
    missing = np.abs(found - votes_of(reports).sum(axis=0)).sum()
    assert missing <= lost * 20 * agents + 25


def test_fewer_than_five_agents_are_not_limited() -> None:
    reports = fleet(4)
    reports[0, 0] = 1000
    assert learn(votes_of(reports)) is None


MOST_USERS = limits.LEEWAY * 42
"""What is believed of agents of 20 users, at worst, where a fifth of the fleet pushes the quantile up."""

HOSTILE = {
    "all votes in one bin": lambda row: row.__setitem__(0, 1000 + 33),
    "all bins at once": lambda row: row.__setitem__(slice(0, 2 * BINS), 1033),
    "one bin taken away": lambda row: row.__setitem__(0, -33),
    "all bins taken away": lambda row: row.__setitem__(slice(0, 2 * BINS), -33),
    "half against the other half": lambda row: row.__setitem__(slice(0, 2 * BINS), [1033, -33] * BINS),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("share", [0.01, 0.2])
def test_a_hostile_agent_counts_for_no_more_than_a_few_honest_ones(name: str, share: float) -> None:
    agents, hostile = 200, round(200 * share)
    reports = fleet(agents)
    honest = votes_of(reports)[hostile:].sum(axis=0)
    for row in reports[:hostile]:
        HOSTILE[name](row)
    result = aggregate(plan_of(), reports.astype(int).tolist())
    found = np.array([[bin_.seen, bin_.failed] for bin_ in result.bins]).T.ravel()
    moved = (found - honest) / hostile
    assert result.limited_batches >= hostile
    assert np.abs(moved).max() <= limits.CELL_LEEWAY * 23  # a fifth of liars lifts the quantile of largest cells to 23
    assert abs(moved.sum()) <= MOST_USERS + 4 * SIGMA * math.sqrt(2 * BINS)
    assert np.linalg.norm(moved) <= MOST_USERS + SIGMA * math.sqrt(2 * BINS) * 1.5


def test_a_lone_giant_does_not_decide_the_mixture_of() -> None:
    reports = fleet(100)
    reports[0, 0] = 1000
    bounded = mixture_of(aggregate(plan_of(), reports.astype(int).tolist()))
    assert bounded["0"] < 0.12


def test_metrics_are_limited_by_their_cap() -> None:
    rng = np.random.default_rng(1)
    reports = np.zeros((50, 2 * BINS + 1 + 64))
    reports[:, 0], reports[:, 2 * BINS] = 20, 30
    reports += np.rint(rng.normal(0, SIGMA, reports.shape))
    reports[0, 2 * BINS] = 3000
    [total] = aggregate(plan_of(metrics=1), reports.astype(int).tolist()).metrics
    assert total == pytest.approx(49 * 30 + 3 * 27 * 3, abs=150)


@given(
    st.integers(5, 30),
    st.integers(1, 30),
    st.floats(0.5, 50),
    st.integers(0, 2**32 - 1),
)
def test_what_is_within_the_limits_is_not_touched_and_the_rest_ends_within(
    agents: int, cells: int, sigma: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    votes = np.rint(rng.normal(0, sigma * 10 ** rng.uniform(-1, 2), (agents, cells)))
    found = learn(votes, sigma)
    assert found is not None
    once = votes.copy()
    changed = found.apply(once, np.zeros((agents, 0)), np.zeros(0))
    assert changed == (once != votes).any(axis=1).sum()
    assert (np.abs(once) <= np.abs(votes) + 1e-9).all()  # nobody's word is made louder
    assert (once * votes >= -1e-9).all()  # nor turned round
    assert once.max(initial=0) <= found.cell + 1e-6
    assert once.min(initial=0) >= -5 * sigma - 1e-6
    again = once.copy()
    found.apply(again, np.zeros((agents, 0)), np.zeros(0))
    np.testing.assert_allclose(again, once, rtol=1e-9, atol=1e-6)


def test_ten_thousand_agents_are_added_up_in_bounded_time() -> None:
    import time

    reports = np.random.default_rng(0).integers(-9, 9, (10_000, 2 * 64 + 64)).tolist()
    begin = time.process_time()
    assert aggregate(plan_of(64), reports).batches == 10_000
    assert time.process_time() - begin < 5
