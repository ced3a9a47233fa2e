"""Shares of good outcomes from privatised counters: how often they mislead, and what they can see."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ebbflow.cloud.feedback.shares import ONE_SIDED, TWO_SIDED, Comparison, Noise, Report, agents_needed, compare
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.gaussian import probabilities

SILENT = Noise(0.0, 0.0)
VARIANCE = float(variance_of(calibrate(4.0, 1e-6, 4)))
"""Of the noise on one cell at the default privacy policy."""
REPORTS = st.lists(st.tuples(st.integers(-50, 5000), st.integers(-50, 5000)), min_size=2, max_size=12)
NOISES = st.builds(Noise, st.floats(0, 1e4), st.floats(0, 1e4), st.integers(1, 5))


def bins(count: int) -> Noise:
    """Noise of all votes together."""
    return Noise(VARIANCE * count, VARIANCE * count)


class Fleet:
    """Groups of devices whose users are content at some rate, with the mechanism's own noise on their counters."""

    def __init__(self, seed: int, cells: int, users: float, scatter: float = 0.0) -> None:
        self.random, self.cells, self.users, self.scatter = np.random.default_rng(seed), cells, users, scatter
        self.reach = math.ceil(12 * math.sqrt(VARIANCE))
        self.masses = np.asarray(probabilities(VARIANCE, self.reach))
        self.masses /= self.masses.sum()

    def noise(self, devices: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        values = np.arange(-self.reach, self.reach + 1)
        drawn: np.ndarray[tuple[int], np.dtype[np.int64]]
        drawn = self.random.choice(values, (devices, self.cells), p=self.masses).sum(axis=1)
        return drawn

    def group(self, devices: int, rate: float) -> list[Report]:
        rates = np.clip(rate + self.scatter * self.random.standard_normal(devices), 0, 1)
        users = self.random.poisson(self.users, devices)
        good = self.random.binomial(users, rates)
        counters = good + self.noise(devices), users - good + self.noise(devices)
        return list(zip(counters[0].tolist(), counters[1].tolist(), strict=True))

    def compare(self, ours: int, others: int, rate: float, drop: float = 0.0, times: int = 600) -> list[Comparison]:
        noise = bins(self.cells)
        return [compare(self.group(ours, rate - drop), self.group(others, rate), noise) for _ in range(times)]


def share_of(found: list[Comparison], tolerance: float) -> float:
    return sum(each.exceeds(tolerance) for each in found) / len(found)


@given(REPORTS, REPORTS, NOISES)
def test_every_interval_holds_its_estimate_and_stays_in_range(
    ours: list[Report], others: list[Report], noise: Noise
) -> None:
    found = compare(ours, others, noise)
    assert 0 <= found.share <= 1
    assert 0 <= found.elsewhere <= 1
    assert -1 <= found.drop.low <= found.drop.value <= found.drop.high <= 1
    assert found.drop.low <= found.least_drop + 1e-9


@given(REPORTS, REPORTS, NOISES)
def test_what_one_side_gains_the_other_loses(ours: list[Report], others: list[Report], noise: Noise) -> None:
    there, back = compare(ours, others, noise), compare(others, ours, noise)
    assert (there.share, there.elsewhere) == (back.elsewhere, back.share)
    assert there.drop.value == pytest.approx(-back.drop.value)
    assert (there.drop.low, there.drop.high) == pytest.approx((-back.drop.high, -back.drop.low))


@given(REPORTS, REPORTS, NOISES)
def test_good_and_failed_are_mirror_images(ours: list[Report], others: list[Report], noise: Noise) -> None:
    found = compare(ours, others, noise)
    mirrored = Noise(noise.failed, noise.good, noise.cap)
    seen = compare([each[::-1] for each in ours], [each[::-1] for each in others], mirrored)
    assert seen.drop.value == pytest.approx(-found.drop.value, abs=1e-9)
    assert (seen.drop.low, seen.drop.high) == pytest.approx((-found.drop.high, -found.drop.low), abs=1e-6)


@given(REPORTS, REPORTS, NOISES, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_tolerance_never_raises_an_alarm(
    ours: list[Report], others: list[Report], noise: Noise, one: float, other: float
) -> None:
    found = compare(ours, others, noise)
    assert found.exceeds(min(one, other)) >= found.exceeds(max(one, other))


@given(st.integers(1, 5000), st.integers(0, 5000), st.sampled_from([ONE_SIDED, TWO_SIDED]))
def test_without_noise_it_is_wilsons_interval(good: int, failed: int, deviations: float) -> None:
    """Against the closed form, by comparing with a group whose share is certain."""
    count, share = good + failed, good / (good + failed)
    centre = (share + deviations**2 / (2 * count)) / (1 + deviations**2 / count)
    half = deviations / (1 + deviations**2 / count)
    half *= math.sqrt(share * (1 - share) / count + deviations**2 / (4 * count**2))
    certain = 10**12
    assume(0.01 < share < 0.99)
    found = compare([(good, failed)], [(certain // 2, certain // 2)], SILENT)
    reach = found.drop if deviations == TWO_SIDED else None
    low = reach.low if reach else found.least_drop
    assert 0.5 - low == pytest.approx(min(1.0, centre + half), abs=1e-5)


def test_counters_that_hold_noise_alone_say_nothing() -> None:
    found = compare([(-3, 2)], [(5, -9)], bins(1))
    assert (found.drop.low, found.drop.high) == (-1.0, 1.0)
    assert not found.informs(0.99)
    assert not found.exceeds(0.0)


@pytest.mark.parametrize(
    ("ours", "others", "users", "cells", "rate", "scatter"),
    [
        (5, 45, 50, 20, 0.9, 0.0),
        (5, 45, 500, 20, 0.9, 0.0),
        (20, 180, 5, 3, 0.9, 0.0),
        (20, 60, 50, 20, 0.5, 0.0),
        (20, 60, 50, 3, 1.0, 0.0),
        (5, 45, 500, 3, 0.85, 0.05),
        (100, 100, 1, 3, 0.9, 0.0),
    ],
)
def test_where_nothing_changed_alarms_are_rare(
    ours: int, others: int, users: float, cells: int, rate: float, scatter: float
) -> None:
    """A one-sided test at 5 per cent: of 600 rounds at most 46 raise one (three deviations above 30)."""
    found = Fleet(7, cells, users, scatter).compare(ours, others, rate)
    assert share_of(found, 0.0) <= 0.077
    assert share_of(found, 0.1) <= 0.05
    covered = sum(each.drop.low <= 0 <= each.drop.high for each in found) / len(found)
    assert covered >= 0.92


@pytest.mark.parametrize(("users", "cells"), [(500, 20), (50, 3)])
def test_a_drop_that_is_just_tolerated_raises_few_alarms(users: float, cells: int) -> None:
    found = Fleet(11, cells, users).compare(10, 90, 0.9, drop=0.1)
    assert share_of(found, 0.1) <= 0.077


def test_more_agents_see_more() -> None:
    seen = [share_of(Fleet(3, 20, 50).compare(n, 9 * n, 0.9, drop=0.1, times=200), 0.05) for n in (5, 20, 180)]
    assert seen[0] < 0.2 < seen[1] < 0.6
    assert seen[2] > 0.9


@pytest.mark.parametrize(
    ("drop", "users", "cells"), [(0.2, 50, 20), (0.1, 50, 20), (0.1, 500, 20), (0.2, 50, 3), (0.05, 500, 3)]
)
def test_so_many_agents_see_a_drop_eight_times_in_ten(drop: float, users: float, cells: int) -> None:
    needed = agents_needed(drop, drop / 2, 0.9, users, bins(cells))
    found = Fleet(5, cells, users).compare(needed, 9 * needed, 0.9, drop=drop, times=300)
    assert 0.7 <= share_of(found, drop / 2) <= 0.95, needed


def test_the_documentation_says_what_is_computed() -> None:
    page = (Path(__file__).parents[3] / "docs/explanation/privacy.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    for cells, users, *agents in rows:
        needed = [agents_needed(drop, drop / 2, 0.9, int(users), bins(int(cells))) for drop in (0.05, 0.1, 0.2)]
        assert [f"{count:,}" for count in needed] == agents
