"""`ebbflow student`: named lines of small models."""

from pathlib import Path
from typing import Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.commands import privacy_policy, student_escalation, student_policy
from ebbflow.cli.options import Limit, Output, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, print_list, print_one, say, when
from ebbflow.common.errors import EbbflowError, Reason

app = group("Students: named lines of small models.", "ebbflow student list")
app.add_typer(student_policy.app)
app.add_typer(student_escalation.app)

COLUMNS: list[Column] = [
    ("NAME", lambda student: student.name),
    ("TEACHER", lambda student: student.teacher),
    ("TOPICS", lambda student: len(student.topics)),
    ("EPSILON", lambda student: f"{student.privacy_policy.epsilon:g}"),
    ("SELECTOR", lambda student: student.selector),
    ("CREATED (UTC)", lambda student: when(student.create_time)),
]

_Size = typer.Option(min=1, help="Overrides the architecture file.")


@app.command(
    epilog=example(
        "ebbflow student create faq --teacher ./teacher --corpus corpus.jsonl --architecture student.toml",
        "ebbflow student create faq --teacher ./teacher --corpus corpus.jsonl --hidden-size 256 \\",
        "    --intermediate-size 768 --num-hidden-layers 6 --num-attention-heads 4 --num-key-value-heads 2",
    )
)
def create(
    context: typer.Context,
    student_id: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub name of the teacher, as the workers see it.")],
    corpus: Annotated[Path, typer.Option(help='Lines of JSON with "topic", "text" and optionally "split".')],
    architecture: Annotated[Path | None, typer.Option(help="TOML file with the student's shape.")] = None,
    hidden_size: Annotated[int | None, _Size] = None,
    intermediate_size: Annotated[int | None, _Size] = None,
    num_hidden_layers: Annotated[int | None, _Size] = None,
    num_attention_heads: Annotated[int | None, _Size] = None,
    num_key_value_heads: Annotated[int | None, _Size] = None,
    head_dim: Annotated[int | None, _Size] = None,
    vocabulary_size: Annotated[int | None, typer.Option(min=0, help="0 takes the teacher's tokenizer.")] = None,
    max_position_embeddings: Annotated[int | None, _Size] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary embedding.")] = None,
    initial_checkpoint: Annotated[str | None, typer.Option(help="Checkpoint to begin from, for the workers.")] = None,
    epsilon: Annotated[float, typer.Option(help="Privacy budget of a window, for each user of an agent.")] = 4.0,
    delta: Annotated[float, typer.Option(help="Delta at which epsilon holds.")] = 1e-6,
    window_days: Annotated[int, typer.Option(min=1, help="Length of a window in days.")] = 30,
    rounds_per_window: Annotated[int, typer.Option(min=1, help="Rounds that share a window's budget.")] = 4,
    selector: Annotated[str, typer.Option(help='Agents that serve it, such as "ring=beta"; empty: all.')] = "",
    output: Output = Format.TABLE,
) -> None:
    """Creates a student and uploads its corpus."""
    from ebbflow.api.v1.feedback_pb2 import PrivacyPolicy
    from ebbflow.api.v1.student_pb2 import Architecture, CreateStudentRequest, Student
    from ebbflow.common.privacy.calibration import complete_policy

    options = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocabulary_size": vocabulary_size,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": rope_theta,
        "initial_checkpoint": initial_checkpoint,
    }
    shape = Architecture(**values.architecture(_text(architecture), options))
    policy = PrivacyPolicy(epsilon=epsilon, delta=delta, window_days=window_days, rounds_per_window=rounds_per_window)
    for line in privacy_policy.spending(complete_policy(policy)):
        say(line)
    student = Student(teacher=teacher, architecture=shape, privacy_policy=policy, selector=selector)
    with connect(context) as client:
        stored = client.upload(corpus)
        say(f"corpus stored: {stored.size_bytes} bytes, SHA-256 {stored.sha256.hex()}")
        student.corpus_sha256 = stored.sha256
        request = CreateStudentRequest(student_id=student_id, student=student, request_id=request_id())
        print_one(output, client.students.CreateStudent(request).student)


@app.command("list", epilog=example("ebbflow student list -o json"))
def list_(context: typer.Context, limit: Limit = 0, output: Output = Format.TABLE) -> None:
    """Lists students by name."""
    from ebbflow.api.v1.student_pb2 import ListStudentsRequest
    from ebbflow.client.admin import listed

    with connect(context) as client:
        print_list(output, listed(client.students.ListStudents, ListStudentsRequest(), "students", limit), COLUMNS)


@app.command(epilog=example("ebbflow student show faq"))
def show(context: typer.Context, name: str, output: Output = Format.TABLE) -> None:
    """Shows one student."""
    from ebbflow.api.v1.student_pb2 import GetStudentRequest

    request = GetStudentRequest(name=values.full_name("students", name))
    with connect(context) as client:
        print_one(output, client.students.GetStudent(request).student)


def _text(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error}", path=path) from error
