"""Wrong noise is found, right noise passes, and no two releases have the same."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from ebbflow.common.privacy.audit.bounds import ALPHA
from ebbflow.common.privacy.audit.sampling import fit_p_value, repeated_p_value, serial_p_value, shared_p_value
from ebbflow.common.privacy.gaussian import DiscreteGaussian

VARIANCE = Fraction(23359, 4096)
COUNT = 20_000


def drawn(count: int = COUNT, variance: Fraction = VARIANCE) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.array(DiscreteGaussian(variance).sample(count))


@pytest.mark.parametrize("variance", [Fraction(1, 14), Fraction(7, 16), VARIANCE, Fraction(600), Fraction(10**6)])
def test_the_sampler_fits_whatever_the_variance(variance: Fraction) -> None:
    samples = drawn(variance=variance)
    assert fit_p_value(samples, variance) >= ALPHA
    assert serial_p_value(samples) >= ALPHA


def test_p_values_of_right_noise_are_uniform() -> None:
    """So a false alarm comes as often as it says: with 300 draws, a share of 0.1 lies within 0.03 and 0.19."""
    samples = [drawn(2000) for _ in range(300)]
    for p_values in ([fit_p_value(each, VARIANCE) for each in samples], [serial_p_value(each) for each in samples]):
        assert 0.03 <= np.mean(np.array(p_values) < 0.1) <= 0.19


@pytest.mark.parametrize("wrong", [Fraction(23359, 8192), VARIANCE * Fraction(10, 9), VARIANCE + 1])
def test_another_variance_does_not_fit(wrong: Fraction) -> None:
    assert fit_p_value(drawn(2 * COUNT, wrong), VARIANCE) < ALPHA


def test_continuous_noise_that_was_rounded_does_not_fit() -> None:
    """Its variance is larger by a twelfth, which is what rounding adds."""
    rounded = np.round(np.random.default_rng(1).normal(0, 1, 50_000)).astype(np.int64)
    assert fit_p_value(rounded, Fraction(1)) < ALPHA


def test_a_value_beyond_the_table_is_impossible() -> None:
    assert fit_p_value(np.array([0, 1, 10**6]), VARIANCE) == 0.0


@pytest.mark.parametrize("lag", [0, 1])
def test_samples_that_come_twice_in_a_row_are_found(lag: int) -> None:
    assert serial_p_value(np.repeat(drawn(5000), 2)[lag:]) < ALPHA


def test_cells_that_share_noise_are_found_and_others_are_not() -> None:
    noise = drawn(2000 * 70).reshape(2000, 70)
    assert shared_p_value(noise, VARIANCE) >= ALPHA
    noise[:, 41] = -noise[:, 3]
    assert shared_p_value(noise, VARIANCE) < ALPHA


def test_a_release_whose_noise_came_before_is_found_and_others_are_not() -> None:
    noise = drawn(2000 * 64).reshape(2000, 64)
    assert repeated_p_value(noise, VARIANCE) == 1.0
    noise[1700] = -noise[12]
    assert repeated_p_value(noise, VARIANCE) < ALPHA


def test_noise_that_is_nearly_always_zero_may_come_twice() -> None:
    noise = drawn(1000 * 4, Fraction(1, 14)).reshape(1000, 4)
    assert repeated_p_value(noise, Fraction(1, 14)) == 1.0


def test_every_sample_takes_random_bytes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    urandom = os.urandom

    def counting(count: int) -> bytes:
        asked.append(count)
        return urandom(count)

    monkeypatch.setattr(os, "urandom", counting)
    sampler = DiscreteGaussian(VARIANCE)
    sampler.sample(100)
    sampler.sample(1)
    assert asked == [1600, 16]


FORKS = """
import json, os, sys
from fractions import Fraction
from ebbflow.common.privacy.gaussian import DiscreteGaussian
sampler = DiscreteGaussian(Fraction(23359, 4096))
before = sampler.sample(2000)
readers = []
for _ in range(3):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(sampler.sample(2000)).encode())
        os._exit(0)
    os.close(writer)
    readers.append(reader)
after = sampler.sample(2000)
children = [json.loads(os.fdopen(reader).read()) for reader in readers]
print(json.dumps([before, after, *children]))
"""


def test_forks_processes_and_threads_draw_noise_of_their_own() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORKS]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    rows = [row for process in running for row in json.loads(process.communicate()[0])]
    assert [process.returncode for process in running] == [0, 0]
    with ThreadPoolExecutor(4) as pool:
        rows += pool.map(DiscreteGaussian(VARIANCE).sample, [2000] * 8)
    noise = np.array(rows)
    assert noise.shape == (18, 2000)
    assert repeated_p_value(noise, VARIANCE) == 1.0
    assert shared_p_value(noise.T, VARIANCE) >= ALPHA
