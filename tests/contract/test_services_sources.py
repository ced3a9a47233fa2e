"""Orders for distillations that name private texts, a population or adapter updates, over gRPC on both databases."""

import json
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1 import distillation_pb2, feedback_pb2, population_pb2, round_pb2
from ebbflow.api.v1.distillation_pb2_grpc import DistillationServiceStub
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Distillation, Population, PopulationState, Round, RoundState
from ebbflow.common.errors import EbbflowError, Reason

Plane = Any

RECIPE = distillation_pb2.Recipe(steps=10, batch_size=4, sequence_length=16, learning_rate=1e-3, kl_weight=0.5)
PRIVATE = {"epsilon": 4.0, "steps": 20, "batch_size": 8, "corpus_size": 100, "learning_rate": 1e-3}
LINES = [json.dumps({"topic": "t", "text": f"text {number}"}).encode() + b"\n" for number in range(3)]


def private_training(**changes: Any) -> distillation_pb2.PrivateTraining:
    return distillation_pb2.PrivateTraining(**{**PRIVATE, **changes})


async def create(plane: Plane, steps: int = 10, **fields: Any) -> distillation_pb2.Distillation:
    wanted = distillation_pb2.Distillation(student="students/faq", recipe=RECIPE, **fields)
    wanted.recipe.steps = steps
    request = distillation_pb2.CreateDistillationRequest(distillation=wanted)
    answer = await DistillationServiceStub(plane.admin().channel).CreateDistillation(request)
    made: distillation_pb2.Distillation = answer.distillation
    return made


async def refused(plane: Plane, **fields: Any) -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        await create(plane, **fields)
    with plane.registry.reading() as session:
        assert not session.scalars(sa.select(Distillation).where(Distillation.state == "queued")).all()
    return caught.value


def row_of(plane: Plane, name: str) -> Distillation:
    with plane.registry.reading() as session:
        row: Distillation = session.get_one(Distillation, name.removeprefix("distillations/"))
        return row


def stored(plane: Plane, lines: list[bytes] = LINES) -> bytes:
    return bytes.fromhex(plane.cloud.blobs.put(lines).sha256)


async def test_private_texts_are_kept_for_the_worker_and_their_hash_is_told_nobody(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    claimed = private_training(pld_epsilon=0.1, prv_epsilon=0.1, noise_multiplier=99.0)
    made = await create(plane, private_corpus_sha256=sha256, private_training=claimed)
    assert made.private_corpus_sha256 == b""
    assert made.private_training == private_training(), "what it costs is the worker's to say"
    row = row_of(plane, made.name)
    assert row.private_corpus_sha256 == sha256.hex()
    got = await DistillationServiceStub(plane.admin("viewer").channel).GetDistillation(
        distillation_pb2.GetDistillationRequest(name=made.name)
    )
    assert sha256.hex() not in str(got)
    assert got.distillation.private_corpus_sha256 == b""


async def test_a_distillation_without_private_texts_shows_none(plane: Plane) -> None:
    plane.student()
    assert not (await create(plane)).HasField("private_training")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epsilon": 0.0}, "private_training.epsilon"),
        ({"corpus_size": 4}, "private_training.batch_size"),
        ({"delta": 0.01}, "private_training.delta"),
        ({"steps": 0}, "private_training.steps"),
    ],
)
async def test_an_impossible_private_order_is_refused_by_name(
    plane: Plane, changes: dict[str, Any], field: str
) -> None:
    plane.student()
    training = private_training(**changes)
    error = await refused(plane, private_corpus_sha256=stored(plane), private_training=training)
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, field)


async def test_private_texts_that_are_no_corpus_are_refused_by_line_and_not_quoted(plane: Plane) -> None:
    plane.student()
    broken = stored(plane, [*LINES, b"a secret\n"])
    error = await refused(plane, private_corpus_sha256=broken, private_training=private_training())
    assert (error.reason, "line 4" in str(error), "secret" in str(error)) == (Reason.CORPUS_INVALID, True, False)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"private_training": private_training()}, Reason.INVALID_REQUEST),
        ({"private_corpus_sha256": b"short", "private_training": private_training()}, Reason.INVALID_REQUEST),
        ({"private_corpus_sha256": bytes(32), "private_training": private_training()}, Reason.BLOB_NOT_FOUND),
        ({"population": 3}, Reason.POPULATION_NOT_FOUND),
        ({"population_share": 0.5}, Reason.INVALID_REQUEST),
        ({"population": 1, "population_share": 1.5}, Reason.INVALID_REQUEST),
        ({"population": 1, "population_share": float("nan")}, Reason.INVALID_REQUEST),
        ({"population": 2}, Reason.STATE_CONFLICT),
        ({"adapter_round": "rounds/none"}, Reason.ROUND_NOT_FOUND),
        ({"steps": 0}, Reason.INVALID_REQUEST),
        ({"steps": 0, "base_release": "students/faq/releases/1"}, Reason.INVALID_REQUEST),
    ],
)
async def test_what_does_not_fit_together_is_refused(plane: Plane, fields: dict[str, Any], reason: Reason) -> None:
    plane.student()
    plane.release()
    population(plane, 1)
    population(plane, 2, state=PopulationState.QUEUED)
    assert (await refused(plane, **fields)).reason is reason


async def test_no_steps_of_its_own_need_a_release_to_change(plane: Plane) -> None:
    plane.student()
    plane.release()
    texts = {"private_corpus_sha256": stored(plane), "private_training": private_training()}
    assert (await refused(plane, steps=0, **texts)).reason is Reason.INVALID_REQUEST
    made = await create(plane, steps=0, base_release="students/faq/releases/1", **texts)
    assert made.base_release == "students/faq/releases/1"


def population(
    plane: Plane, generation: int, round_id: str | None = None, state: PopulationState = PopulationState.READY
) -> None:
    prompt = population_pb2.Prompt(prompt_id=f"{generation}-0", text="how", topic="json", weight=1.0)
    row = Population(
        student_id="faq",
        generation=generation,
        state=state,
        settings={},
        round_id=round_id,
        create_time=now(),
        prompts=[MessageToDict(prompt)],
    )
    with plane.registry.transaction() as session:
        session.add(row)


def closed_round(plane: Plane, id_: str, epsilon: float, aggregate: round_pb2.Aggregate, **plan: Any) -> str:
    policy = feedback_pb2.PrivacyPolicy(epsilon=epsilon)
    message = feedback_pb2.RoundPlan(round=f"rounds/{id_}", student="students/faq", policy=policy, **plan)
    row = Round(
        id=id_,
        student_id="faq",
        state=RoundState.CLOSED,
        plan=message.SerializeToString(),
        signature=b"",
        key_id="",
        window="2026-01-01",
        end_time=now(),
        create_time=now(),
        aggregate=MessageToDict(aggregate),
    )
    with plane.registry.transaction() as session:
        session.add(row)
    return f"rounds/{id_}"


def adapter_round(plane: Plane, epsilon: float = 8.0, *, informative: bool = True, release: int = 1) -> str:
    adapter = round_pb2.AdapterAggregate(blob_sha256=bytes(32), release=release, agents=5, signal_to_noise=1.01)
    aggregate = round_pb2.Aggregate(informative=informative, adapter=adapter)
    return closed_round(plane, "adapt", epsilon, aggregate, adapter=feedback_pb2.AdapterPlan(release=release))


async def test_the_card_will_say_the_largest_epsilon_of_all_that_fed_a_release(plane: Plane) -> None:
    plane.student()
    plane.release()
    votes = closed_round(
        plane,
        "votes",
        3.0,
        round_pb2.Aggregate(informative=True, bins=[round_pb2.BinEstimate(bin_id="1-0", weight=1.0)]),
        bins=[feedback_pb2.Bin(bin_id="1-0", texts=["how"])],
    )
    population(plane, 1)
    population(plane, 2, round_id="votes")
    adapt = adapter_round(plane)
    made = [
        await create(plane, population=1),
        await create(plane, population=2),
        await create(plane, round=votes),
        await create(plane, population=2, adapter_round=adapt),
    ]
    assert [row_of(plane, each.name).feedback_epsilon for each in made] == [0.0, 3.0, 3.0, 8.0]
    assert dict(made[2].mixture) == {"json": 1.0}, "prompts give their topics their weight"
    assert (made[3].adapter_round, made[3].base_release) == (adapt, "students/faq/releases/1")
    with plane.registry.transaction() as session:
        session.execute(sa.update(Distillation).where(Distillation.id == "faq-1").values(feedback_epsilon=16.0))
    after = await create(plane, base_release="students/faq/releases/1")
    assert row_of(plane, after.name).feedback_epsilon == 16.0, "what shaped the base shapes this one too"


async def test_an_adapter_round_changes_its_own_release_alone_and_only_if_it_says_something(plane: Plane) -> None:
    plane.student()
    plane.release()
    plane.release(2)
    adapt = adapter_round(plane)
    error = await refused(plane, adapter_round=adapt, base_release="students/faq/releases/2")
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, "distillation.base_release")
    assert (await refused(plane, round=adapt)).reason is Reason.INVALID_REQUEST, "it has no mixture"
    with plane.registry.transaction() as session:
        session.execute(sa.update(Round).values(state=RoundState.OPEN))
    assert (await refused(plane, adapter_round=adapt)).reason is Reason.STATE_CONFLICT


async def test_an_adapter_round_of_noise_is_refused(plane: Plane) -> None:
    plane.student()
    plane.release()
    error = await refused(plane, adapter_round=adapter_round(plane, informative=False))
    assert error.reason is Reason.SIGNAL_TOO_WEAK


async def test_rounds_before_it_in_the_window_have_a_say_unless_the_order_wants_one_alone(plane: Plane) -> None:
    plane.student()
    assert (await refused(plane, round_alone=True)).metadata["field"] == "distillation.round"
    votes = [(90.0, 10.0), (10.0, 90.0)]
    bins = [feedback_pb2.Bin(bin_id=topic, texts=["how"]) for topic in ("json", "regex")]
    for id_, (json_votes, regex_votes) in zip(("early", "late"), votes, strict=True):
        estimates = [
            round_pb2.BinEstimate(bin_id="json", seen=json_votes, weight=json_votes / 100),
            round_pb2.BinEstimate(bin_id="regex", seen=regex_votes, weight=regex_votes / 100),
        ]
        closed_round(
            plane, id_, 4.0, round_pb2.Aggregate(informative=True, bins=estimates, noise_std=1.0, batches=9), bins=bins
        )
    first, both, alone = (
        await create(plane, round="rounds/early"),
        await create(plane, round="rounds/late"),
        await create(plane, round="rounds/late", round_alone=True),
    )
    assert dict(first.mixture) == {"json": 0.9, "regex": 0.1}
    assert dict(both.mixture) == pytest.approx({"json": 0.5, "regex": 0.5}, abs=0.01)
    assert dict(alone.mixture) == {"json": 0.1, "regex": 0.9}
