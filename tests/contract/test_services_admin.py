"""What admins create, list and watch, over real connections."""

import asyncio
import json
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1 import (
    agent_pb2,
    artefact_pb2,
    distillation_pb2,
    fleet_pb2,
    ledger_pb2,
    release_pb2,
    resources_pb2,
    rollout_pb2,
    round_pb2,
    student_pb2,
)
from ebbflow.api.v1.agent_pb2_grpc import AgentServiceStub
from ebbflow.api.v1.artefact_pb2_grpc import ArtefactServiceStub
from ebbflow.api.v1.distillation_pb2_grpc import DistillationServiceStub
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.api.v1.ledger_pb2_grpc import LedgerServiceStub
from ebbflow.api.v1.release_pb2_grpc import ReleaseServiceStub
from ebbflow.api.v1.rollout_pb2_grpc import RolloutServiceStub
from ebbflow.api.v1.round_pb2_grpc import RoundServiceStub
from ebbflow.api.v1.student_pb2_grpc import StudentServiceStub
from ebbflow.cloud.processes.tick import Ticker
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Distillation, ReleaseState, Round, RoundState
from ebbflow.cloud.services.transfer import MOST_CHUNK_BYTES
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, make_csr
from ebbflow.common.identity.peers import Identity

Plane = Any
SHAPE = student_pb2.Architecture(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocabulary_size=512,
    max_position_embeddings=128,
)
RECIPE = distillation_pb2.Recipe(steps=10, batch_size=4, sequence_length=32, learning_rate=1e-3, kl_weight=0.9)


def corpus(*lines: object) -> bytes:
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()


GOOD = corpus(*({"topic": topic, "text": "words"} for topic in ("b", "a", "b", "c")))


async def upload(client: Any, *chunks: bytes) -> artefact_pb2.WriteBlobResponse:
    requests = iter([artefact_pb2.WriteBlobRequest(chunk=chunk) for chunk in chunks])
    return await ArtefactServiceStub(client.channel).WriteBlob(requests)  # type: ignore[no-any-return]


def student_request(corpus_sha256: bytes, **fields: Any) -> student_pb2.CreateStudentRequest:
    student = student_pb2.Student(teacher="/models/teacher", architecture=SHAPE, corpus_sha256=corpus_sha256, **fields)
    return student_pb2.CreateStudentRequest(student_id="faq", student=student)


async def test_a_blob_comes_back_whole_in_bounded_chunks_from_any_offset(plane: Plane) -> None:
    operator = plane.admin("operator")
    data = bytes(range(256)) * 12_000
    stored = await upload(operator, *(data[begin : begin + 700_000] for begin in range(0, len(data), 700_000)))
    assert stored.size_bytes == len(data)
    for offset in (0, 1, 700_001, len(data)):
        request = artefact_pb2.ReadBlobRequest(sha256=stored.sha256, offset_bytes=offset)
        chunks = [answer.chunk async for answer in ArtefactServiceStub(operator.channel).ReadBlob(request)]
        assert b"".join(chunks) == data[offset:]
        assert all(len(chunk) <= MOST_CHUNK_BYTES for chunk in chunks)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (artefact_pb2.ReadBlobRequest(sha256=b"short"), Reason.INVALID_REQUEST),
        (artefact_pb2.ReadBlobRequest(sha256=bytes(32)), Reason.BLOB_NOT_FOUND),
    ],
)
async def test_a_blob_that_is_not_there_is_said_so(plane: Plane, request_: Any, reason: Reason) -> None:
    with pytest.raises(EbbflowError) as caught:
        async for _ in ArtefactServiceStub(plane.admin().channel).ReadBlob(request_):
            pass
    assert caught.value.reason is reason


async def test_a_chunk_that_is_too_long_is_refused_and_a_torn_upload_leaves_nothing(plane: Plane) -> None:
    operator = plane.admin("operator")
    with pytest.raises(EbbflowError) as caught:
        await upload(operator, bytes(1024 * 1024 + 1))
    assert caught.value.reason is Reason.INVALID_REQUEST

    async def torn() -> Any:
        yield artefact_pb2.WriteBlobRequest(chunk=b"half of it", size_bytes=20)
        await asyncio.sleep(30)

    call = ArtefactServiceStub(operator.channel).WriteBlob(torn())
    await asyncio.sleep(0.3)
    call.cancel()
    await asyncio.sleep(0.3)
    for _ in range(200):  # a thread cleans up
        left = [path for path in plane.cloud.blobs.folder.rglob("*") if path.is_file()]
        if not left:
            break
        await asyncio.sleep(0.05)
    assert left == []


@pytest.mark.parametrize("announced", [1, 9, 11])
async def test_a_file_of_another_length_than_announced_is_not_kept(plane: Plane, announced: int) -> None:
    async def chunks() -> Any:
        yield artefact_pb2.WriteBlobRequest(chunk=b"ten ", size_bytes=announced)
        yield artefact_pb2.WriteBlobRequest(chunk=b"bytes.")

    artefacts = ArtefactServiceStub(plane.admin("operator").channel)
    with pytest.raises(EbbflowError) as caught:
        await artefacts.WriteBlob(chunks())
    assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_REQUEST, {"field": "size_bytes"})
    assert not [path for path in plane.cloud.blobs.folder.rglob("*") if path.is_file()]


async def test_metadata_comes_back_as_it_was_signed(plane: Plane) -> None:
    artefacts = ArtefactServiceStub(plane.agent("kiosk-7").channel)
    request = artefact_pb2.ReadMetadataRequest(file_name="1.root.json")
    content = b"".join([answer.chunk async for answer in artefacts.ReadMetadata(request)])
    assert json.loads(content)["signed"]["_type"] == "root"
    with pytest.raises(EbbflowError) as caught:
        async for _ in artefacts.ReadMetadata(artefact_pb2.ReadMetadataRequest(file_name="../../etc/passwd")):
            pass
    assert caught.value.reason is Reason.METADATA_NOT_FOUND


async def test_a_student_is_created_with_the_topics_of_its_corpus(plane: Plane) -> None:
    operator = plane.admin("operator")
    blob = await upload(operator, GOOD)
    students = StudentServiceStub(operator.channel)
    made = (await students.CreateStudent(student_request(blob.sha256, selector="site=berlin"))).student
    assert list(made.topics) == ["b", "a", "c"]
    assert made.privacy_policy.epsilon == 4.0
    assert made.privacy_policy.rho_cap_nano > 0
    assert (await students.GetStudent(student_pb2.GetStudentRequest(name="students/faq"))).student == made
    with pytest.raises(EbbflowError) as caught:
        await students.CreateStudent(student_request(blob.sha256))
    assert caught.value.reason is Reason.ALREADY_EXISTS


async def test_a_request_id_makes_a_creation_safe_to_repeat(plane: Plane) -> None:
    operator = plane.admin("operator")
    request = student_request((await upload(operator, GOOD)).sha256)
    request.request_id = str(uuid.uuid4())
    students = StudentServiceStub(operator.channel)
    assert await students.CreateStudent(request) == await students.CreateStudent(request)
    request.student_id = "another"
    with pytest.raises(EbbflowError) as caught:
        await students.CreateStudent(request)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (corpus({"topic": "a", "text": "x"}, "{not json"), "2"),
        (corpus({"topic": "a", "text": "x"}, {"topic": "a", "text": "x"}, {"topic": "a"}), "3"),
        (corpus({"topic": "a", "text": "x", "split": "test"}), "1"),
        (corpus({"topic": "a", "text": "x", "split": "gate"}), None),
        (corpus(*({"topic": f"t{n}", "text": "x"} for n in range(257))), None),
        (b"", None),
    ],
)
async def test_a_corpus_that_cannot_be_used_is_refused_with_its_line(
    plane: Plane, content: bytes, line: str | None
) -> None:
    operator = plane.admin("operator")
    blob = await upload(operator, content)
    with pytest.raises(EbbflowError) as caught:
        await StudentServiceStub(operator.channel).CreateStudent(student_request(blob.sha256))
    assert caught.value.reason is Reason.CORPUS_INVALID
    assert caught.value.metadata.get("line") == line


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", 3), ("head_dim", 15), ("hidden_size", 0), ("vocabulary_size", 10)],
)
async def test_a_shape_that_no_decoder_has_is_refused_by_name(plane: Plane, field: str, value: int) -> None:
    operator = plane.admin("operator")
    request = student_request((await upload(operator, GOOD)).sha256)
    setattr(request.student.architecture, field, value)
    with pytest.raises(EbbflowError) as caught:
        await StudentServiceStub(operator.channel).CreateStudent(request)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, field)


def distillation(**fields: Any) -> distillation_pb2.CreateDistillationRequest:
    wanted = distillation_pb2.Distillation(student="students/faq", recipe=RECIPE, **fields)
    return distillation_pb2.CreateDistillationRequest(distillation=wanted)


async def test_a_distillation_is_queued_watched_and_cancelled(plane: Plane) -> None:
    plane.student()
    stub = DistillationServiceStub(plane.admin("operator").channel)
    made = (await stub.CreateDistillation(distillation(mixture={"json": 3.0, "regex": 1.0}))).distillation
    assert dict(made.mixture) == {"json": 0.75, "regex": 0.25}
    watching = stub.WatchDistillation(distillation_pb2.WatchDistillationRequest(name=made.name))
    assert (await anext(aiter(watching))).distillation == made
    cancelled = await stub.CancelDistillation(distillation_pb2.CancelDistillationRequest(name=made.name))
    assert cancelled.distillation.state == distillation_pb2.Distillation.STATE_CANCELLED
    assert [answer.distillation.state async for answer in watching] == [cancelled.distillation.state]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mixture": {"cooking": 1.0}}, Reason.INVALID_REQUEST),
        ({"mixture": {"json": -1.0}}, Reason.INVALID_REQUEST),
        ({"mixture": {"json": 0.0}}, Reason.INVALID_REQUEST),
        ({"base_release": "students/faq/releases/7"}, Reason.RELEASE_NOT_FOUND),
        ({"base_release": "students/other/releases/1"}, Reason.INVALID_REQUEST),
        ({"round": "rounds/none"}, Reason.ROUND_NOT_FOUND),
        ({"student": "students/nobody"}, Reason.STUDENT_NOT_FOUND),
        ({"recipe": distillation_pb2.Recipe(steps=1)}, Reason.INVALID_REQUEST),
    ],
)
async def test_a_distillation_that_cannot_run_is_refused(plane: Plane, fields: Any, reason: Reason) -> None:
    plane.student()
    request = distillation()
    request.distillation.MergeFrom(distillation_pb2.Distillation(**{k: v for k, v in fields.items() if k != "recipe"}))
    if "recipe" in fields:
        request.distillation.recipe.CopyFrom(fields["recipe"])
    with pytest.raises(EbbflowError) as caught:
        await DistillationServiceStub(plane.admin().channel).CreateDistillation(request)
    assert caught.value.reason is reason


@pytest.mark.parametrize("informative", [True, False])
async def test_the_mixture_of_a_round_is_used_if_it_tells_more_than_noise(plane: Plane, informative: bool) -> None:
    plane.student()
    plane.release()
    plane.agent("kiosk-7")
    plane.roll_out("faq", 1)
    plane.serve("kiosk-7", "faq", 1)
    admin = plane.admin("operator")
    rounds, stub = RoundServiceStub(admin.channel), DistillationServiceStub(admin.channel)
    opened = (await rounds.OpenRound(round_pb2.OpenRoundRequest(student="students/faq"))).round
    assert (opened.cohort_size, len(opened.plan.bins)) == (1, 3)
    with pytest.raises(EbbflowError) as caught:
        await stub.CreateDistillation(distillation(round=opened.name))
    assert caught.value.reason is Reason.STATE_CONFLICT
    await rounds.CloseRound(round_pb2.CloseRoundRequest(name=opened.name))
    bins = [round_pb2.BinEstimate(bin_id="json", weight=0.8), round_pb2.BinEstimate(bin_id="regex", weight=0.2)]
    with plane.registry.transaction() as session:
        row = session.scalars(sa.select(Round)).one()
        assert row.state is RoundState.CLOSED
        row.aggregate = MessageToDict(round_pb2.Aggregate(bins=bins, informative=informative))
    made = (await stub.CreateDistillation(distillation(round=opened.name))).distillation
    assert dict(made.mixture) == ({"json": 0.8, "regex": 0.2} if informative else {})
    with plane.registry.reading() as session:
        assert session.scalars(
            sa.select(Distillation.feedback_epsilon).order_by(Distillation.create_time.desc())
        ).first() == (4.0 if informative else 0.0)


async def test_lists_come_in_pages_that_hold_everything_once(plane: Plane) -> None:
    for number in range(7):
        plane.agent(f"kiosk-{number}", labels={"ring": "beta" if number % 2 else "stable"})
    fleet = FleetServiceStub(plane.admin("viewer").channel)
    seen, token = [], ""
    while True:
        page = await fleet.ListAgents(fleet_pb2.ListAgentsRequest(page_size=3, page_token=token))
        seen += [agent.name for agent in page.agents]
        token = page.next_page_token
        if not token:
            break
    assert seen == [f"agents/kiosk-{number}" for number in range(7)]
    beta = await fleet.ListAgents(fleet_pb2.ListAgentsRequest(selector="ring=beta"))
    assert [agent.name for agent in beta.agents] == ["agents/kiosk-1", "agents/kiosk-3", "agents/kiosk-5"]
    with pytest.raises(EbbflowError) as caught:
        await fleet.ListAgents(fleet_pb2.ListAgentsRequest(page_token="forged"))
    assert caught.value.reason is Reason.PAGE_TOKEN_INVALID


async def test_a_token_shows_its_secret_once(plane: Plane) -> None:
    fleet = FleetServiceStub(plane.admin("operator").channel)
    request = fleet_pb2.CreateEnrolmentTokenRequest(
        uses=2, labels={"site": "berlin"}, lifetime=Duration(seconds=60), request_id=str(uuid.uuid4())
    )
    made = await fleet.CreateEnrolmentToken(request)
    assert made.secret.startswith("ebb1.")
    with pytest.raises(EbbflowError) as caught:
        await fleet.CreateEnrolmentToken(request)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    (listed,) = (await fleet.ListEnrolmentTokens(fleet_pb2.ListEnrolmentTokensRequest())).enrolment_tokens
    assert listed == made.enrolment_token
    revoked = await fleet.RevokeEnrolmentToken(fleet_pb2.RevokeEnrolmentTokenRequest(name=listed.name))
    assert revoked.enrolment_token.revoked


async def test_an_owner_makes_admins_whose_roles_hold(plane: Plane) -> None:
    key = generate_key()
    answer = await FleetServiceStub(plane.admin("owner").channel).CreateAdmin(
        fleet_pb2.CreateAdminRequest(admin_id="ada", role=fleet_pb2.ADMIN_ROLE_VIEWER, csr_der=make_csr(key))
    )
    assert Identity.from_certificate(answer.certificate_pem).uri == "spiffe://ebbflow/admins/viewer/ada"
    ada = FleetServiceStub(plane.connect(answer.certificate_pem, key).channel)
    await ada.ListAgents(fleet_pb2.ListAgentsRequest())
    with pytest.raises(EbbflowError) as caught:
        await ada.LabelAgent(fleet_pb2.LabelAgentRequest(name="agents/x"))
    assert caught.value.reason is Reason.ROLE_INSUFFICIENT


async def test_a_rollout_reaches_an_agent_by_hint_and_ends_with_its_report(plane: Plane) -> None:
    plane.student()
    plane.release()
    agent, admin = plane.agent("kiosk-7"), plane.admin("operator")
    line = AgentServiceStub(agent.channel).Connect(hold_line())
    answers = aiter(line)
    assert (await anext(answers)).HasField("welcome")
    rollouts = RolloutServiceStub(admin.channel)
    wanted = rollout_pb2.Rollout(release="students/faq/releases/1")
    made = (await rollouts.CreateRollout(rollout_pb2.CreateRolloutRequest(rollout=wanted))).rollout
    assert [phase.share for phase in made.phases] == [0.1, 1.0]
    async with asyncio.timeout(50):
        while (await anext(answers)).hint.subject != agent_pb2.Hint.SUBJECT_DESIRED_STATE:
            continue
    stub = AgentServiceStub(agent.channel)
    profile = resources_pb2.DeviceProfile(memory_mib=64, precisions=[resources_pb2.PRECISION_INT8])
    desired = await stub.GetDesiredState(agent_pb2.GetDesiredStateRequest(profile=profile))
    (release,) = desired.releases
    assert (release.release, release.precision) == ("students/faq/releases/1", resources_pb2.PRECISION_INT8)
    assert release.rollout == made.name
    counted = (await rollouts.GetRollout(rollout_pb2.GetRolloutRequest(name=made.name))).rollout.counts
    assert (counted.waiting, counted.assigned) == (0, 1)
    report = resources_pb2.Installation(
        student=release.student,
        release=release.release,
        precision=release.precision,
        state=resources_pb2.INSTALLATION_STATE_SERVING,
    )
    await stub.ReportInstallation(agent_pb2.ReportInstallationRequest(installation=report))
    shown = (await FleetServiceStub(admin.channel).GetAgent(fleet_pb2.GetAgentRequest(name="agents/kiosk-7"))).agent
    assert list(shown.installations) == [report]
    assert shown.connected
    line.cancel()


async def hold_line() -> Any:
    yield agent_pb2.ConnectRequest(hello=agent_pb2.Hello(instance_id=str(uuid.uuid4())))
    await asyncio.sleep(60)


async def test_rollout_verbs_change_its_state_and_are_in_the_audit_log(plane: Plane) -> None:
    plane.student()
    plane.release()
    plane.agent("kiosk-7")
    admin = plane.admin("operator", "ada")
    rollouts = RolloutServiceStub(admin.channel)
    wanted = rollout_pb2.Rollout(release="students/faq/releases/1", phases=[rollout_pb2.Phase()])
    name = (await rollouts.CreateRollout(rollout_pb2.CreateRolloutRequest(rollout=wanted))).rollout.name
    states = rollout_pb2.Rollout
    for verb, request, state in (
        (rollouts.PauseRollout, rollout_pb2.PauseRolloutRequest, states.STATE_PAUSED),
        (rollouts.ResumeRollout, rollout_pb2.ResumeRolloutRequest, states.STATE_RUNNING),
        (rollouts.AbortRollout, rollout_pb2.AbortRolloutRequest, states.STATE_ABORTED),
    ):
        assert (await verb(request(name=name))).rollout.state == state
    with pytest.raises(EbbflowError) as caught:
        await rollouts.ResumeRollout(rollout_pb2.ResumeRolloutRequest(name=name))
    assert caught.value.reason is Reason.STATE_CONFLICT
    ledger = LedgerServiceStub(admin.channel)
    entries = (await ledger.ListAuditEntries(ledger_pb2.ListAuditEntriesRequest(actor="admins/ada"))).audit_entries
    assert [(entry.method.partition("/")[2], entry.resource, entry.code) for entry in entries] == [
        ("ResumeRollout", name, "FAILED_PRECONDITION"),
        ("AbortRollout", name, "OK"),
        ("ResumeRollout", name, "OK"),
        ("PauseRollout", name, "OK"),
        ("CreateRollout", name, "OK"),
    ]


async def test_a_release_below_the_signed_minimum_is_refused(plane: Plane) -> None:
    plane.student()
    plane.release(2, state=ReleaseState.PACKED)
    plane.sign()
    await Ticker(plane.cloud, plane.hub).tick(now())
    plane.release(1, content=b"older weights")
    rollouts = RolloutServiceStub(plane.admin().channel)
    newer = rollout_pb2.Rollout(release="students/faq/releases/2")
    await rollouts.CreateRollout(rollout_pb2.CreateRolloutRequest(rollout=newer))
    wanted = rollout_pb2.Rollout(release="students/faq/releases/1")
    with pytest.raises(EbbflowError) as caught:
        await rollouts.CreateRollout(rollout_pb2.CreateRolloutRequest(rollout=wanted))
    assert (caught.value.reason, caught.value.metadata["min_release"]) == (Reason.RELEASE_TOO_OLD, "2")


async def test_a_watch_ends_when_its_replica_does(plane: Plane) -> None:
    plane.student()
    stub = DistillationServiceStub(plane.admin("operator").channel)
    made = (await stub.CreateDistillation(distillation())).distillation
    answers = aiter(stub.WatchDistillation(distillation_pb2.WatchDistillationRequest(name=made.name)))
    await anext(answers)
    plane.hub.drain()
    with pytest.raises(EbbflowError) as caught:
        await anext(answers)
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE


async def test_releases_are_shown_with_their_variants(plane: Plane) -> None:
    plane.student()
    plane.release(1)
    plane.release(2, content=b"newer weights")
    stub = ReleaseServiceStub(plane.admin("viewer").channel)
    listed = (await stub.ListReleases(release_pb2.ListReleasesRequest(parent="students/faq"))).releases
    assert [release.name for release in listed] == ["students/faq/releases/2", "students/faq/releases/1"]
    assert list((await stub.ListReleases(release_pb2.ListReleasesRequest(parent="students/-"))).releases) == list(
        listed
    )
    (variant,) = listed[0].variants
    assert (variant.precision, variant.artefact.size_bytes) == (resources_pb2.PRECISION_INT8, len(b"newer weights"))


async def test_labels_decide_which_students_an_agent_serves(plane: Plane) -> None:
    plane.student(selector="ring=beta")
    plane.release()
    agent, admin = plane.agent("kiosk-7", labels={"ring": "beta"}), plane.admin("operator")
    plane.roll_out("faq", 1)
    stub = AgentServiceStub(agent.channel)
    assert len((await stub.GetDesiredState(agent_pb2.GetDesiredStateRequest())).releases) == 1
    await FleetServiceStub(admin.channel).LabelAgent(
        fleet_pb2.LabelAgentRequest(name="agents/kiosk-7", set={"ring": "stable"}, remove=["site"])
    )
    assert len((await stub.GetDesiredState(agent_pb2.GetDesiredStateRequest())).releases) == 0
