import dataclasses
import math

import pytest

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.release.gate import MOST_TEXTS_PER_TOPIC, Limits, Measurement, gate_texts, objection
from ebbflow.cloud.release.lineage import Costs

GOOD = Measurement(
    bits_per_byte={"bf16": 2.0, "int8": 2.01, "int4": 2.2},
    topic_bits_per_byte={"sea": 2.0},
    probe_loss={"bf16": 3.0, "int8": 3.0, "int4": 3.1},
    signed_probe_loss={"bf16": 3.001, "int8": 3.0, "int4": 3.1},
    tolerance=0.02,
)
LIMITS = Limits(regression=0.1, precision_loss=0.2)


def test_a_good_release_meets_no_objection() -> None:
    assert objection(GOOD, None, LIMITS) == ""
    assert objection(GOOD, 1.9, LIMITS) == ""


@pytest.mark.parametrize(
    ("change", "base", "words"),
    [
        ({"bits_per_byte": {**GOOD.bits_per_byte, "int8": math.nan}}, None, "int8 gives losses that are not finite"),
        ({"probe_loss": {**GOOD.probe_loss, "bf16": math.inf}}, None, "bf16 gives losses that are not finite"),
        ({"probe_loss": {**GOOD.probe_loss, "int4": 3.2}}, None, "int4 differs from its manifest's probe loss"),
        ({"tolerance": 5.0}, None, "tolerates"),
        ({"bits_per_byte": {**GOOD.bits_per_byte, "int4": 2.5}}, None, "int4 needs 2.5000 bits per byte"),
        ({}, 1.8, "where its base release needs 1.8000"),
    ],
)
def test_each_fault_is_named(change: dict[str, object], base: float | None, words: str) -> None:
    assert words in objection(dataclasses.replace(GOOD, **change), base, LIMITS)  # type: ignore[arg-type]


def test_the_card_keeps_the_order_of_the_variants_and_holds_finite_numbers_only() -> None:
    spoilt = dataclasses.replace(GOOD, bits_per_byte={"bf16": 2.0, "int8": math.nan, "int4": math.inf})
    card = spoilt.card(Costs(4.0, 8.0, 1e-6))
    assert card["bitsPerByte"] == [2.0, 0.0, 0.0]
    assert card["probeLoss"] == [3.0, 3.0, 3.1]
    assert (card["topicBitsPerByte"], card["feedbackEpsilon"]) == ({"sea": 2.0}, 4.0)
    assert (card["trainingEpsilon"], card["trainingDelta"]) == (8.0, 1e-6)


def test_the_texts_that_are_measured_do_not_grow_with_the_corpus() -> None:
    texts = [Text(topic, str(number), "gate") for number in range(100) for topic in ("a", "b")]
    chosen = gate_texts([*texts, Text("c", "alone", "gate")])
    assert [text.topic for text in chosen].count("a") == MOST_TEXTS_PER_TOPIC
    assert chosen[-1].topic == "c"
    assert chosen[:2] == texts[:2]
