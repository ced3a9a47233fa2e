"""Limits of bandwidth: how they are written, and that nobody exceeds them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.edge.delivery.limit import LEAST_CHUNK_BYTES, LEAST_RATE, MOST_CHUNK_BYTES, Bucket, chunk_bytes, parse_rate

RATES = st.integers(LEAST_RATE, 10**10)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("0", 0),
        ("", 0),
        ("2MB/s", 2_000_000),
        ("500kbit/s", 62_500),
        ("1.5 MiB/s", 1_572_864),
        ("64KiB/s", 65_536),
        ("1Gbit/s", 125_000_000),
        ("1000B/s", 1000),
        ("8000 bit/s", 1000),
        ("3GB/s", 3_000_000_000),
    ],
)
def test_a_limit_is_a_number_with_a_unit(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    ["2", "2MB", "2mb/s", "2 Mb/s", "-1MB/s", "1e6B/s", "MB/s", "2MB/sec", "999B/s", "2  MB/s", "nan MB/s", "٣MB/s"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a limit is"):
        parse_rate(text)


@given(st.text(max_size=20))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_rate(text) == 0 or parse_rate(text) >= LEAST_RATE


@given(RATES)
def test_a_message_is_short_enough_to_come_within_an_eighth_of_a_second(rate: int) -> None:
    chunk = chunk_bytes(rate)
    assert LEAST_CHUNK_BYTES <= chunk <= MOST_CHUNK_BYTES
    assert chunk <= max(LEAST_CHUNK_BYTES, rate / 8)


@given(
    rate=RATES,
    takes=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 5)),  # of the longest chunk; seconds of dawdling beside the wait
        min_size=1,
        max_size=60,
    ),
)
def test_whoever_waits_as_told_stays_within_the_limit_over_every_span(
    rate: int, takes: list[tuple[float, float]]
) -> None:
    chunk, now_s = chunk_bytes(rate), 100.0
    bucket, came = Bucket(rate, now_s), []
    for share, dawdling_s in takes:
        size_bytes = int(share * chunk)
        came.append((now_s, size_bytes))
        now_s += bucket.take(size_bytes, now_s) + dawdling_s
    for first, (begin_s, _) in enumerate(came):
        total = 0
        for at_s, size_bytes in came[first:]:
            total += size_bytes
            assert total <= rate * (at_s - begin_s + 1 / 8) + chunk + 1


@given(rate=RATES, chunks=st.integers(20, 200))
def test_a_limit_is_also_reached(rate: int, chunks: int) -> None:
    now_s, size_bytes = 0.0, chunk_bytes(rate)
    bucket = Bucket(rate, now_s)
    for _ in range(chunks):
        now_s += bucket.take(size_bytes, now_s)
    assert chunks * size_bytes / rate - 1 / 8 <= now_s + 1e-6 <= chunks * size_bytes / rate + 1e-3


@given(rate=RATES, back_s=st.floats(0, 1e6))
def test_a_clock_that_stands_still_or_runs_back_gains_nothing(rate: int, back_s: float) -> None:
    bucket = Bucket(rate, 1e6)
    bucket.take(rate, 1e6)
    assert bucket.take(0, 1e6 - back_s) == pytest.approx(1 - 1 / 8)
