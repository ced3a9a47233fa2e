"""Bins are made of public texts of the corpus."""

import datetime as dt
import json

import pytest
from feedback_world import signed_policy
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Signature

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback.plans import TEXT_CHARACTERS, PlanSigner, Timing, make_plan, read_bins
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.plans import MAX_TEXTS_PER_BIN, check_plan

NOW = dt.datetime(2026, 11, 3, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


def corpus(blobs: LocalBlobStore, *lines: tuple[str, str, str]) -> str:
    rows = [json.dumps({"topic": topic, "text": text, "split": split}) for topic, text, split in lines]
    return blobs.put(["\n".join(rows).encode()]).sha256


def test_the_bin_split_describes_a_topic_and_train_stands_in(blobs: LocalBlobStore) -> None:
    lines = [("files", "learn this", "train"), ("files", "a file", "bin"), ("dates", "x" * 1000, "train")]
    lines += [("dates", "never shown", "gate"), ("empty", "never shown", "gate")]
    bins = read_bins(blobs, corpus(blobs, *lines), ["dates", "files", "empty"])
    assert [bin_.bin_id for bin_ in bins] == ["dates", "files"]
    assert bins[0].texts == ["x" * TEXT_CHARACTERS]
    assert bins[1].texts == ["a file"]


def test_a_bin_has_a_few_texts_only(blobs: LocalBlobStore) -> None:
    sha256 = corpus(blobs, *[("files", f"text {i}", "bin") for i in range(MAX_TEXTS_PER_BIN + 8)])
    [bin_] = read_bins(blobs, sha256, ["files"])
    assert len(bin_.texts) == MAX_TEXTS_PER_BIN


def test_a_bin_shows_all_sides_of_a_topic_in_a_sorted_corpus(blobs: LocalBlobStore) -> None:
    sides = [("banking", f"{side} {i}", "train") for side in ("loans", "cards", "rates") for i in range(100)]
    [bin_] = read_bins(blobs, corpus(blobs, *sides), ["banking"])
    assert len(bin_.texts) == MAX_TEXTS_PER_BIN
    assert min(sum(text.startswith(side) for text in bin_.texts) for side in ("loans", "cards", "rates")) >= 3
    [again] = read_bins(blobs, corpus(blobs, *reversed(sides)), ["banking"])
    assert again == bin_, "the order of the corpus plays no part"


@pytest.mark.parametrize("count", [0, 257])
def test_topics_that_no_plan_can_hold_are_refused(blobs: LocalBlobStore, count: int) -> None:
    with pytest.raises(EbbflowError) as caught:
        read_bins(blobs, corpus(blobs, ("a", "b", "train")), [str(i) for i in range(count)])
    assert caught.value.reason is Reason.STATE_CONFLICT


def test_a_plan_is_signed_as_its_very_bytes() -> None:
    key = CryptoSigner.generate_ed25519()
    plan = make_plan("r1", "faq", signed_policy(), [pb.Bin(bin_id="a", texts=["b"])], Timing(NOW, DAY, 7 * DAY))
    signed = PlanSigner(key).sign(plan)
    key.public_key.verify_signature(Signature(signed.key_id, signed.signature.hex()), signed.plan)
    assert pb.RoundPlan.FromString(signed.plan) == plan


@given(
    st.floats(0.5, 16),
    st.integers(1, 20),
    st.lists(st.integers(1, 10), max_size=3),
    st.integers(1, 60),
    st.datetimes(dt.datetime(2020, 1, 1), dt.datetime(2090, 1, 1), timezones=st.just(dt.UTC)),  # noqa: DTZ001
)
def test_every_plan_that_is_made_is_sound(
    epsilon: float, rounds: int, caps: list[int], window_days: int, now: dt.datetime
) -> None:
    policy = pb.PrivacyPolicy(epsilon=epsilon, rounds_per_window=rounds, window_days=window_days)
    metrics = [pb.Metric(kind=pb.Metric.KIND_FAILED, cap=cap) for cap in caps]
    bins = [pb.Bin(bin_id="a", texts=["b"])]
    check_plan(make_plan("r1", "faq", signed_policy(policy), bins, Timing(now, DAY, DAY), metrics=metrics))


@pytest.mark.parametrize("timing", [Timing(NOW, 31 * DAY, DAY), Timing(NOW, DAY, 0 * DAY)], ids=["long", "nothing"])
def test_a_timing_beyond_the_window_is_refused(timing: Timing) -> None:
    with pytest.raises(EbbflowError) as caught:
        make_plan("r1", "faq", signed_policy(), [pb.Bin(bin_id="a", texts=["b"])], timing)
    assert caught.value.reason is Reason.INVALID_REQUEST
