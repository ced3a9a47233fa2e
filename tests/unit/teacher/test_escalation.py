"""Questions that devices escalate: who may, what they cost, and that nothing is kept of them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.api.v1 import teacher_pb2_grpc
from ebbflow.client.channels import channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.cloud.identity import admins, certificates
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes import teach
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, Student
from ebbflow.cloud.teacher.answers import Generation, generate
from ebbflow.cloud.teacher.endings import Ending, cut
from ebbflow.cloud.teacher.escalation import Quotas, may_escalate
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.cloud.teacher.quota import Quota
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr

EACH, ALL = 200, 300
As = Callable[[str], Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    torch.set_num_threads(1)
    return Teacher.load(str(tiny_models.save_moe_teacher(tmp_path_factory.mktemp("teacher"))), "float32")


def allow(registry: Registry, allowed: bool = True) -> None:
    with registry.transaction() as session:
        session.get_one(Student, "faq").escalation_policy = {"allowed": True} if allowed else {}


def add_student(registry: Registry, selector: str = "") -> None:
    with registry.transaction() as session:
        session.add(
            Student(
                id="faq",
                teacher="",
                architecture={},
                corpus_sha256="0" * 64,
                topics=["a"],
                privacy_policy={},
                selector=selector,
                create_time=clock.now(),
            )
        )


def add_agent(registry: Registry, agent_id: str, *, serves: bool = True, labels: dict[str, str] | None = None) -> None:
    now = clock.now()
    with registry.transaction() as session:
        session.add(Agent(id=agent_id, state=AgentState.ACTIVE, labels=labels or {}, profile={}, create_time=now))
        session.flush()
        if serves:
            session.add(Assignment(agent_id=agent_id, student_id="faq", update_time=now))


@pytest.fixture
async def connect(teacher: Teacher, sqlite_registry: Registry, tmp_path: Path) -> AsyncIterator[As]:
    """Stubs that present the certificate of an agent, or of an admin by its role."""
    authority = Authority.create(tmp_path / "authority")
    add_student(sqlite_registry)
    configured = CloudSettings.load(
        tmp_path,
        teacher_listen="localhost:0",
        escalation_tokens_per_minute=EACH,
        escalation_tokens_per_minute_of_all=ALL,
    )
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    rules = teach.Rules.of(sqlite_registry)
    server = asyncio.create_task(teach.teach(configured, teacher, authority, rules, stop, ready))
    address = await ready
    channels: list[Any] = []

    def open_as(who: str) -> Any:
        key, now = generate_key(), clock.now()
        if who in {"viewer", "operator", "owner"}:
            with sqlite_registry.transaction() as session:
                issued = admins.create(session, authority, f"{who}-1", who, make_csr(key), now)
        else:
            add_agent(sqlite_registry, who)
            with sqlite_registry.transaction() as session:
                issued = authority.issue_agent(make_csr(key), who)
                certificates.record(session, issued, now)
        endpoint = Endpoint(address, authority.certificate_pem, issued.certificate_pem, key_to_pem(key))
        channels.append(channel(endpoint))
        return teacher_pb2_grpc.TeacherServiceStub(channels[-1])

    yield open_as
    for one in channels:
        await one.close()
    stop.set()
    await server


def question(prompt: str = "the tide", **fields: Any) -> pb.EscalateRequest:
    return pb.EscalateRequest(student="students/faq", prompt=prompt, **{"max_tokens": 8, **fields})


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def reason_of(call: Any) -> Reason:
    with pytest.raises(EbbflowError) as caught:
        await call
    return caught.value.reason


async def spend(stub: Any, request: pb.EscalateRequest) -> EbbflowError:
    """Asks again and again until it is refused."""
    for number in range(20):
        try:
            await stub.Escalate(request)
        except EbbflowError as error:
            assert number, "the first question is granted"
            return error
    raise AssertionError("nothing was refused")


async def test_agents_may_not_escalate_until_an_owner_allows_it_and_not_after(
    connect: As, sqlite_registry: Registry
) -> None:
    stub = connect("kiosk")
    asked = pb.GetEscalationRequest(student="students/faq")
    for allowed in (False, True, False):
        allow(sqlite_registry, allowed)
        assert (await stub.GetEscalation(asked)).allowed is allowed
        if allowed:
            await stub.Escalate(question())
        else:
            assert await reason_of(stub.Escalate(question())) is Reason.ESCALATION_FORBIDDEN


async def test_the_answer_is_what_the_teacher_writes(connect: As, sqlite_registry: Registry, teacher: Teacher) -> None:
    allow(sqlite_registry)
    stub = connect("kiosk")
    answer = await stub.Escalate(question(max_tokens=12))
    ids = teacher.tokenizer.encode("the tide", bos=True)
    (expected,) = generate(teacher, [Generation(ids, 12, 0.0, (0,))])
    assert answer.text == teacher.tokenizer.decode(expected)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(ids), len(expected))
    assert answer.truncated == (len(expected) == 12)
    drawn = question(max_tokens=12, temperature=1.0, seed=3)
    assert await stub.Escalate(drawn) == await stub.Escalate(drawn)


async def test_a_stop_text_ends_the_answer_and_saves_the_rest(connect: As, sqlite_registry: Registry) -> None:
    allow(sqlite_registry)
    stub = connect("kiosk")
    whole = await stub.Escalate(question(max_tokens=24))
    stop = whole.text[3:5]
    cut_ = await stub.Escalate(question(max_tokens=24, stop=[stop, "never written"]))
    assert cut_.text == whole.text[: whole.text.index(stop)]
    assert not cut_.truncated
    assert cut_.completion_tokens < whole.completion_tokens


async def test_agents_may_escalate_and_nothing_else_and_nobody_else_may(connect: As, sqlite_registry: Registry) -> None:
    allow(sqlite_registry)
    kiosk = connect("kiosk")
    for call in (
        kiosk.GetTeacher(pb.GetTeacherRequest()),
        kiosk.GenerateTexts(pb.GenerateTextsRequest(prompts=["a"])),
        kiosk.ScoreTexts(pb.ScoreTextsRequest(texts=["a"])),
    ):
        assert await reason_of(call) is Reason.ROLE_INSUFFICIENT
    for role in ("viewer", "operator", "owner"):
        stub = connect(role)
        assert await reason_of(stub.Escalate(question())) is Reason.ROLE_INSUFFICIENT
        asked = pb.GetEscalationRequest(student="students/faq")
        assert await reason_of(stub.GetEscalation(asked)) is Reason.ROLE_INSUFFICIENT


async def test_a_quarantined_agent_is_refused_at_once(connect: As, sqlite_registry: Registry) -> None:
    allow(sqlite_registry)
    stub = connect("kiosk")
    await stub.Escalate(question())
    with sqlite_registry.transaction() as session:
        session.get_one(Agent, "kiosk").state = AgentState.QUARANTINED
    assert await reason_of(stub.Escalate(question())) is Reason.AGENT_QUARANTINED


@pytest.mark.parametrize(
    ("serves", "labels", "student_id", "allowed"),
    [
        (True, {"ring": "beta"}, "faq", True),
        (False, {"ring": "beta"}, "faq", False),
        (True, {"ring": "stable"}, "faq", False),
        (True, {"ring": "beta"}, "other", False),
    ],
)
def test_only_agents_that_serve_the_student_may_escalate(
    serves: bool, labels: dict[str, str], student_id: str, allowed: bool, sqlite_registry: Registry
) -> None:
    add_student(sqlite_registry, selector="ring=beta")
    add_agent(sqlite_registry, "kiosk", serves=serves, labels=labels)
    allow(sqlite_registry)
    with sqlite_registry.reading() as session:
        assert may_escalate(session, "kiosk", student_id) is allowed


async def test_each_agent_has_a_quota_and_all_together_have_one(connect: As, sqlite_registry: Registry) -> None:
    allow(sqlite_registry)
    first, second, third = connect("first"), connect("second"), connect("third")
    dear = question(stop=["never written"], max_tokens=100)
    for stub in (first, second):
        error = await spend(stub, dear)
        assert error.reason is Reason.QUOTA_EXHAUSTED
        assert 0 < float(error.metadata["retry_after_s"]) <= 60
    assert await reason_of(third.Escalate(dear)) is Reason.QUOTA_EXHAUSTED


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, EACH), st.floats(0, 30), st.booleans()), max_size=40))
def test_quotas_never_grant_more_than_a_minute_holds_and_a_refusal_costs_nothing(
    asked: list[tuple[str, int, float, bool]],
) -> None:
    quotas, now_s = Quotas(Quota(EACH), Quota(ALL)), 0.0
    granted: list[tuple[float, str, int]] = []
    for agent, tokens, later_s, refused_first in asked:
        now_s += later_s
        if refused_first:
            with pytest.raises(EbbflowError):
                quotas.take(agent, ALL + 1, now_s)
        try:
            quotas.take(agent, tokens, now_s)
            granted.append((now_s, agent, tokens))
        except EbbflowError as error:
            wait_s = float(error.metadata["retry_after_s"])
            assert 0 <= wait_s <= 60
    for end_s, _, _ in granted:
        window = [entry for entry in granted if end_s - 60 <= entry[0] <= end_s]
        assert sum(tokens for _, _, tokens in window) <= 2 * ALL
        for agent in "abc":
            assert sum(tokens for _, who, tokens in window if who == agent) <= 2 * EACH


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ""}, Reason.INVALID_REQUEST),
        ({"temperature": -1}, Reason.INVALID_REQUEST),
        ({"temperature": float("nan")}, Reason.INVALID_REQUEST),
        ({"stop": [""]}, Reason.INVALID_REQUEST),
        ({"stop": ["x"] * 17}, Reason.INVALID_REQUEST),
        ({"stop": ["x" * 257]}, Reason.INVALID_REQUEST),
        ({"student": "faq"}, Reason.INVALID_REQUEST),
        ({"student": "students/other"}, Reason.ESCALATION_FORBIDDEN),
        ({"prompt": "the road climbs the hill " * 60}, Reason.CONTEXT_TOO_LONG),
    ],
)
async def test_what_cannot_be_answered_is_refused_in_words_that_do_not_repeat_the_question(
    fields: dict[str, Any], reason: Reason, connect: As, sqlite_registry: Registry
) -> None:
    allow(sqlite_registry)
    request = question()
    request.MergeFrom(pb.EscalateRequest(**{**fields, "stop": fields.get("stop", [])}))
    if fields.get("prompt") == "":
        request.prompt = ""
    with pytest.raises(EbbflowError) as caught:
        await connect("kiosk").Escalate(request)
    assert caught.value.reason is reason
    assert "tide" not in str(caught.value)
    assert "road" not in str(caught.value)


async def test_nothing_is_kept_of_a_question_or_its_answer(
    connect: As, sqlite_registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allow(sqlite_registry)
    secret = "canary-4711"
    with caplog.at_level(logging.DEBUG):
        answer = await connect("kiosk").Escalate(question(f"my name is {secret}", max_tokens=40))
    needles = [secret.encode(), answer.text.strip().encode()]
    assert all(needles)
    logged = "\n".join(record.getMessage() for record in caplog.records).encode()
    files = await asyncio.to_thread(everything_in, tmp_path)
    with sqlite_registry.reading() as session:
        tables = sa.inspect(sqlite_registry.engine).get_table_names()
        rows = str([session.execute(sa.text(f"SELECT * FROM {table}")).all() for table in tables]).encode()
    assert all(needle not in logged + files + rows for needle in needles)


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_an_ending_is_seen_with_the_token_that_completes_it(text: str, stops: list[str]) -> None:
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer.encode(text)
    ending, reached = Ending(tokenizer, stops), False
    for count in range(1, len(ids) + 1):
        reached = ending.reached(ids[:count])
        assert reached == cut(tokenizer.decode(ids[:count]), stops)[1]
        if reached:
            break
    assert reached == cut(text, stops)[1]
    assert not any(stop in cut(text, stops)[0] for stop in stops)
