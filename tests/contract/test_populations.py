"""Generations of prompts: asked for, made by a worker, fenced, read; on each supported database."""

import datetime as dt
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import population_world as world
import pytest
from population_world import TOPIC_BINS, add_round, bins_of, generation, prompts, queue

from ebbflow.api.v1 import population_pb2 as pb
from ebbflow.api.v1.population_pb2_grpc import PopulationServiceStub
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation.endings import Stopping
from ebbflow.cloud.distillation.evolving import Evolver
from ebbflow.cloud.distillation.worker import Worker
from ebbflow.cloud.feedback import population, population_queue, population_texts
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import AuditEntry, Population, PopulationState, Round, RoundState, Student
from ebbflow.common.errors import EbbflowError, Reason

Plane = Any
LEASE = dt.timedelta(seconds=30)


@pytest.fixture
def evolver(registry: Registry, blobs: LocalBlobStore, tmp_path: Path) -> Evolver:
    world.add_student(registry, blobs.put([world.corpus_bytes(world.public_texts())]).sha256)
    return Evolver(registry, blobs, tmp_path / "work", "w", 30.0)


def reason_of(act: Callable[[], object]) -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        act()
    return caught.value


def evolve(evolver: Evolver, **fields: object) -> Population:
    row = queue(evolver.registry, **fields)
    assert evolver.run_once()
    return generation(evolver.registry, row.generation)


def claim(registry: Registry, now: dt.datetime | None = None, lease: dt.timedelta = LEASE) -> Population | None:
    with registry.transaction() as session:
        return population_queue.claim(session, "w", now or clock.now(), lease)


def test_the_first_generation_is_public_texts_of_every_topic(evolver: Evolver, registry: Registry) -> None:
    row = evolve(evolver, size=10)
    assert (row.state, row.method, row.parents) == (PopulationState.READY, "METHOD_PUBLIC_TEXTS", {})
    found = prompts(registry, 1)
    assert [prompt.prompt_id for prompt in found] == [f"1-{number}" for number in range(10)]
    public = world.public_texts()
    assert all(prompt.text in public[prompt.topic] and not prompt.parent for prompt in found)
    assert len({prompt.text for prompt in found}) == 10
    assert [prompt.topic for prompt in found].count("bank") == 5
    assert sum(prompt.weight for prompt in found) == pytest.approx(1)
    assert not evolver.run_once()
    assert not list(evolver.folder.iterdir()) if evolver.folder.exists() else True


def test_a_round_on_topics_decides_how_many_prompts_each_has(evolver: Evolver, registry: Registry) -> None:
    name = add_round(registry, TOPIC_BINS, [900.0, 100.0])
    row = evolve(evolver, size=20, round=name)
    topics = [prompt.topic for prompt in prompts(registry, row.generation)]
    assert (topics.count("bank"), topics.count("trip")) == (18, 2)
    with registry.reading() as session:
        assert population.epsilon(session, "faq", row.generation) == 4.0


def test_votes_choose_who_lives_on_and_who_has_children(evolver: Evolver, registry: Registry) -> None:
    evolve(evolver, size=16)
    before = prompts(registry, 1)
    votes = [1000.0 if at == 3 else 10.0 for at in range(16)]
    add_round(registry, bins_of(registry, 1), votes, epsilon=2.0)
    row = evolve(evolver, size=16, round="rounds/5c1e", public_texts_only=True)
    assert (row.state, row.method) == (PopulationState.READY, "METHOD_PUBLIC_TEXTS")
    assert "teacher was not to be asked" in row.reason
    after = prompts(registry, 2)
    assert len(after) == 16
    assert after[0].text == before[3].text
    assert after[0].parent == "1-3"
    family = [prompt for prompt in after if prompt.parent == "1-3"]
    assert len(family) >= 10
    assert sum(prompt.weight for prompt in family) > 0.7
    assert len({prompt.text for prompt in after}) == 16
    assert row.parents["winners"] == 16
    with registry.reading() as session:
        assert population.epsilon(session, "faq", 2) == 2.0
        assert population.epsilon(session, "faq", 1) == 0.0


def test_a_generation_that_noise_alone_judged_is_not_followed(evolver: Evolver, registry: Registry) -> None:
    evolve(evolver, size=16)
    add_round(registry, bins_of(registry, 1), [20.0, -20.0] * 8, noise_std=30.0)
    row = evolve(evolver, round="rounds/5c1e")
    assert row.state is PopulationState.FAILED
    assert "nothing but noise" in row.reason
    assert "more agents" in row.reason
    assert queue(registry).generation == 3, "the failed one does not stand in the way"


def test_without_a_teacher_that_loads_the_job_fails_in_words(evolver: Evolver, registry: Registry) -> None:
    evolve(evolver, size=8)
    add_round(registry, bins_of(registry, 1), [100.0] * 8)
    row = evolve(evolver, round="rounds/5c1e")
    assert row.state is PopulationState.FAILED
    assert "CHECKPOINT_UNREADABLE" in row.reason
    row = evolve(evolver, round="rounds/5c1e", public_texts_only=True, encoder="/nowhere")
    assert "sentence encoder '/nowhere' has no config.json" in row.reason


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"size": 3}, Reason.INVALID_REQUEST, "size must be 4 to 256"),
        ({"size": 257}, Reason.INVALID_REQUEST, "size must be 4 to 256"),
        ({"round": "rounds/none"}, Reason.ROUND_NOT_FOUND, "rounds/none"),
        ({"round": "rounds/open"}, Reason.STATE_CONFLICT, "still open"),
        ({"round": "rounds/theirs"}, Reason.INVALID_REQUEST, "belongs to students/other"),
        ({"round": "rounds/adapter"}, Reason.STATE_CONFLICT, "adapter updates"),
        ({"round": "rounds/odd"}, Reason.STATE_CONFLICT, "neither a prompt nor a topic"),
        ({"round": "rounds/old"}, Reason.STATE_CONFLICT, "the newest is students/faq/populations/2"),
    ],
)
def test_a_round_that_did_not_judge_the_newest_generation_is_refused(
    evolver: Evolver, registry: Registry, fields: dict[str, Any], reason: Reason, words: str
) -> None:
    evolve(evolver, size=8)
    old = bins_of(registry, 1)
    evolve(evolver, size=8)
    world.add_student(registry, "0" * 64, student_id="other")
    add_round(registry, old, [9.0] * 8, round_id="old")
    add_round(registry, bins_of(registry, 2), [9.0] * 8, round_id="open", state=RoundState.OPEN)
    add_round(registry, TOPIC_BINS, [9.0] * 2, round_id="theirs", student_id="other")
    add_round(registry, [], [], round_id="adapter")
    add_round(registry, world.TOPIC_BINS[:1] + old[:1], [9.0] * 2, round_id="odd")
    error = reason_of(lambda: queue(registry, **fields))
    assert (error.reason, words in str(error)) == (reason, True)


def test_one_generation_at_a_time_waits(evolver: Evolver, registry: Registry) -> None:
    queue(registry)
    assert reason_of(lambda: queue(registry)).reason is Reason.STATE_CONFLICT
    claim(registry)
    assert reason_of(lambda: queue(registry)).reason is Reason.STATE_CONFLICT
    with registry.reading() as session:
        assert reason_of(lambda: population.bins(session, "faq", 1)).reason is Reason.STATE_CONFLICT
        assert reason_of(lambda: population.bins(session, "faq", 7)).reason is Reason.POPULATION_NOT_FOUND


def test_a_claim_is_exclusive_until_its_lease_runs_out_and_then_fences_the_old_worker(
    evolver: Evolver, registry: Registry
) -> None:
    queue(registry)
    now = clock.now()
    old = claim(registry, now)
    assert old is not None
    assert claim(registry, now) is None
    new = claim(registry, now + 2 * LEASE)
    assert new is not None
    assert new.attempt == 2
    made = pb.Population(prompts=[pb.Prompt(prompt_id="1-0")], method=pb.Population.METHOD_TEACHER)
    writes: list[Callable[[Any], None]] = [
        lambda session: population_queue.heartbeat(session, old, now, LEASE),
        lambda session: population_queue.fail(session, old, "late"),
        lambda session: population_queue.stall(session, old, "late"),
        lambda session: population_queue.finish(session, old, made),
    ]
    for write in writes:
        with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
            write(session)
        assert caught.value.reason is Reason.LEASE_LOST
    with registry.transaction() as session:
        population_queue.finish(session, new, made)
    assert generation(registry, 1).state is PopulationState.READY
    assert claim(registry, now + 9 * LEASE) is None


def test_many_workers_claim_each_generation_once(evolver: Evolver, registry: Registry) -> None:
    for number in range(4):
        world.add_student(registry, "0" * 64, student_id=f"s{number}")
        request = pb.EvolvePopulationRequest(student=f"students/s{number}")
        with registry.transaction() as session:
            student = session.get_one(Student, f"s{number}")
            population_queue.queue(session, student, request, clock.now())
    claimed: list[str] = []

    def work() -> None:
        while (job := claim(registry)) is not None:
            claimed.append(job.student_id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == ["s0", "s1", "s2", "s3"]


def test_a_worker_that_stops_gives_the_job_back_and_the_next_makes_the_same(
    evolver: Evolver, registry: Registry, tmp_path: Path
) -> None:
    queue(registry, size=12, seed=7)
    stopping = Evolver(registry, evolver.blobs, tmp_path / "other", "stopping", 30.0, lambda: True)
    with pytest.raises(Stopping):
        stopping.run_once()
    assert generation(registry, 1).state is PopulationState.RUNNING
    assert evolver.run_once()
    assert (generation(registry, 1).state, generation(registry, 1).attempt) == (PopulationState.READY, 2)
    again = evolve(evolver, size=12, seed=7)
    assert [p.text for p in prompts(registry, again.generation)] == [p.text for p in prompts(registry, 1)]
    other = evolve(evolver, size=12, seed=8)
    assert [p.text for p in prompts(registry, other.generation)] != [p.text for p in prompts(registry, 1)]


def test_prompts_become_training_texts_and_weights_of_topics(evolver: Evolver, registry: Registry) -> None:
    evolve(evolver, size=8)
    add_round(registry, bins_of(registry, 1), [80.0, *[20.0 / 7] * 7])
    with registry.reading() as session:
        texts = population_texts.texts(session, "faq", 1)
        weights = population_texts.weights(session, "faq", 1)
        round_ = session.get_one(Round, "5c1e")
        shares = [
            (bin_.bin_id, weight) for bin_, weight in zip(bins_of(registry, 1), [0.8, *[0.2 / 7] * 7], strict=True)
        ]
        topics = population.topic_weights(session, round_, shares)
    assert [text.topic for text in texts] == list(weights)
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(topics.values()) == pytest.approx(1)
    assert topics[prompts(registry, 1)[0].topic] > 0.8


async def test_generations_are_asked_for_once_read_and_listed(plane: Plane) -> None:
    plane.student()
    stub = PopulationServiceStub(plane.admin("operator").channel)
    with pytest.raises(EbbflowError) as caught:
        await stub.GetPopulation(pb.GetPopulationRequest(name="students/faq/populations/-"))
    assert caught.value.reason is Reason.POPULATION_NOT_FOUND
    assert "ebbflow population evolve faq" in str(caught.value)
    request = pb.EvolvePopulationRequest(student="students/faq", size=6, seed=3, request_id=str(uuid.uuid4()))
    made = (await stub.EvolvePopulation(request)).population
    assert (made.name, made.state) == ("students/faq/populations/1", pb.Population.STATE_QUEUED)
    assert (await stub.EvolvePopulation(request)).population == made
    evolver = Evolver(plane.registry, plane.cloud.blobs, Path(plane.cloud.settings.paths.work), "w", 30.0)
    assert evolver.run_once()
    newest = (await stub.GetPopulation(pb.GetPopulationRequest(name="students/faq/populations/-"))).population
    assert newest.state == pb.Population.STATE_READY
    assert newest == (await stub.GetPopulation(pb.GetPopulationRequest(name=made.name))).population
    assert {prompt.text for prompt in newest.prompts} <= {f"a text about {t}" for t in ("datetime", "regex", "json")}
    request.request_id = str(uuid.uuid4())
    await stub.EvolvePopulation(request)
    listed = await stub.ListPopulations(pb.ListPopulationsRequest(parent="students/faq", page_size=1))
    assert [(each.name, len(each.prompts)) for each in listed.populations] == [("students/faq/populations/2", 0)]
    following = pb.ListPopulationsRequest(parent="students/faq", page_size=1, page_token=listed.next_page_token)
    rest = await stub.ListPopulations(following)
    assert [(each.name, len(each.prompts)) for each in rest.populations] == [("students/faq/populations/1", 0)]
    assert not rest.next_page_token
    with plane.registry.reading() as session:
        audited = [row.resource for row in session.query(AuditEntry) if row.method.endswith("EvolvePopulation")]
    assert audited == ["students/faq/populations/1"] * 2 + ["students/faq/populations/2"]


async def test_viewers_read_generations_and_cannot_ask_for_one(plane: Plane) -> None:
    plane.student()
    viewer = PopulationServiceStub(plane.admin("viewer").channel)
    assert not (await viewer.ListPopulations(pb.ListPopulationsRequest(parent="students/faq"))).populations
    with pytest.raises(EbbflowError) as caught:
        await viewer.EvolvePopulation(pb.EvolvePopulationRequest(student="students/faq"))
    assert caught.value.reason is Reason.ROLE_INSUFFICIENT
    agent = PopulationServiceStub(plane.agent("kiosk-1").channel)
    with pytest.raises(EbbflowError) as caught:
        await agent.ListPopulations(pb.ListPopulationsRequest(parent="students/faq"))
    assert caught.value.reason is Reason.ROLE_INSUFFICIENT
    with pytest.raises(EbbflowError) as caught:
        await viewer.ListPopulations(pb.ListPopulationsRequest(parent="students/nobody"))
    assert caught.value.reason is Reason.STUDENT_NOT_FOUND


def test_a_worker_makes_a_generation_before_it_distils(evolver: Evolver, registry: Registry, tmp_path: Path) -> None:
    queue(registry, size=8)
    worker = Worker(registry, evolver.blobs, tmp_path / "work", "w", 30.0, 1000.0)
    assert worker.run_once()
    assert generation(registry, 1).state is PopulationState.READY
    assert not worker.run_once()
