"""The randomness of private training: its distribution, and that none of it comes twice."""

import os

import numpy as np
import pytest
import torch
from scipy import stats

from ebbflow.cloud.distillation.private_noise import Keystream, gaussian, poisson_sample

ALPHA = 1e-6


@pytest.mark.parametrize("std", [1.0, 3.7, 1e-3])
def test_noise_is_gaussian_with_the_deviation_asked_for(std: float) -> None:
    noise = gaussian(200_000, std).numpy()
    assert stats.kstest(noise, "norm", args=(0, std)).pvalue > ALPHA
    bounds = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], len(noise)) / len(noise)
    assert bounds[0] < float(np.mean(noise**2)) / std**2 < bounds[1]
    assert float(np.abs(noise).max()) > 3.8 * std  # it has tails


def test_no_two_coordinates_of_noise_go_together() -> None:
    rows = gaussian(120_000, 1.0).view(-1, 6).numpy()
    correlations = np.corrcoef(rows.T)[np.triu_indices(6, 1)]
    assert float(np.abs(correlations).max()) < 6 / np.sqrt(len(rows))


def test_noise_longer_than_a_chunk_is_filled_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebbflow.cloud.distillation.private_noise._CHUNK", 7)
    assert float(gaussian(100, 1.0).abs().min()) > 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it forks beside torch's idle threads
def test_no_noise_comes_twice_in_calls_or_forks() -> None:
    torch.manual_seed(0)
    mine = [gaussian(8, 1.0).tolist() for _ in range(100)]
    torch.manual_seed(0)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, repr(gaussian(8, 1.0).tolist()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 10_000).decode()
    os.close(read)
    os.close(write)
    assert theirs != repr(gaussian(8, 1.0).tolist())
    assert len({repr(each) for each in mine} | {theirs}) == 101


def test_two_keystreams_differ_and_one_goes_on() -> None:
    first, second = Keystream(), Keystream()
    words = np.concatenate([first.words(1000), first.words(1000), second.words(1000)])
    assert len(np.unique(words)) == 3000
    uniforms = first.uniforms(100_000)
    assert float(uniforms.min()) > 0
    assert float(uniforms.max()) <= 1
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > ALPHA


@pytest.mark.parametrize(("batch_size", "corpus_size"), [(1, 40), (8, 40), (39, 40)])
def test_every_text_is_drawn_at_the_public_rate_on_its_own(batch_size: int, corpus_size: int) -> None:
    texts, steps = 20, 5000
    drawn = np.zeros((steps, texts), np.int64)
    for step in range(steps):
        drawn[step, list(poisson_sample(texts, batch_size, corpus_size))] = 1
    rate = batch_size / corpus_size
    assert all(stats.binomtest(int(count), steps, rate).pvalue > ALPHA for count in drawn.sum(0))
    sizes = np.bincount(drawn.sum(1), minlength=texts + 1)
    expected = stats.binom.pmf(np.arange(texts + 1), texts, rate) * steps
    enough = expected > 5
    statistic = float(((sizes - expected)[enough] ** 2 / expected[enough]).sum())
    assert stats.chi2.sf(statistic, int(enough.sum())) > ALPHA


def test_a_batch_as_large_as_the_corpus_takes_every_text() -> None:
    assert list(poisson_sample(5, 40, 40)) == [0, 1, 2, 3, 4]
    assert list(poisson_sample(0, 3, 40)) == []
