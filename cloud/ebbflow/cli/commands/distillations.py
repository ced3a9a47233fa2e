"""`ebbflow distillation`: runs that make releases."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import private_options, values
from ebbflow.cli.commands import releases
from ebbflow.cli.options import Limit, Output, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, print_list, print_one, say, when, word
from ebbflow.cli.release_state import check
from ebbflow.cli.watching import WATCH_S, Reading, follow, remaining
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient

app = group("Distillations: runs that make releases.", "ebbflow distillation start faq --steps 2000 --wait")

Name = Annotated[str, typer.Argument(metavar="DISTILLATION", help='Such as "6f0a".')]


def _state(distillation: Any) -> str:
    from ebbflow.api.v1.distillation_pb2 import Distillation

    return word(Distillation.State, distillation.state)


def _steps(distillation: Any) -> int:
    return int(distillation.recipe.steps + distillation.private_training.steps)


COLUMNS: list[Column] = [
    ("NAME", lambda distillation: distillation.name),
    ("STUDENT", lambda distillation: distillation.student),
    ("STATE", _state),
    ("STEP", lambda distillation: f"{distillation.step}/{_steps(distillation)}"),
    ("LOSS", lambda distillation: f"{distillation.loss:.4f}"),
    ("ROUND", lambda distillation: distillation.round),
    ("RELEASE", lambda distillation: distillation.release),
    ("CREATED (UTC)", lambda distillation: when(distillation.create_time)),
]


@app.command(
    epilog=example(
        "ebbflow distillation start faq --steps 2000 --batch-size 32 --wait",
        "ebbflow distillation start faq --steps 500 --base-release faq/1 --round 5c1e",
        "ebbflow distillation start faq --steps 0 --base-release faq/2 --private-corpus tickets.jsonl \\",
        "    --private-epsilon 4 --private-corpus-size 5000 --private-steps 300",
    )
)
def start(
    context: typer.Context,
    student: Annotated[str, typer.Argument(help='Such as "faq".')],
    steps: Annotated[int, typer.Option(min=0, help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of one step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of one sequence.")] = 256,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches of one step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(min=0, help="0 means a twentieth of the steps.")] = 0,
    kl_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of the teacher; data has the rest.")] = 0.7,
    temperature: Annotated[float, typer.Option(min=0, help="Softmax temperature; 0 means 1.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    base_release: Annotated[str, typer.Option(help='Release to begin from, such as "faq/1".')] = "",
    round_: Annotated[
        str, typer.Option("--round", help="Round whose feedback, with its window's before it, gives the mixture.")
    ] = "",
    round_alone: Annotated[bool, typer.Option("--round-alone", help="Leave the rounds before it out.")] = False,
    mixture: Annotated[list[str] | None, typer.Option(help="topic=share; repeatable; overrides --round.")] = None,
    keep_bf16: Annotated[
        list[str] | None,
        typer.Option(help='Matrices that no precision codes, such as "model.layers.0.*"; repeatable.'),
    ] = None,
    population: Annotated[int, typer.Option(min=0, help="Generation whose prompts join the texts.")] = 0,
    population_share: Annotated[float, typer.Option(min=0, max=1, help="Of the tokens; 0 means 0.25.")] = 0.0,
    adapter_round: Annotated[str, typer.Option(help="Round whose average change is added to its release first.")] = "",
    private_corpus: private_options.Corpus = None,
    private_epsilon: private_options.Epsilon = 0.0,
    private_delta: private_options.Delta = 0.0,
    private_steps: private_options.Steps = 0,
    private_batch_size: private_options.BatchSize = 64,
    private_corpus_size: private_options.CorpusSize = 0,
    private_clip_norm: private_options.ClipNorm = 0.0,
    private_learning_rate: private_options.LearningRate = 1e-3,
    private_sequence_length: private_options.SequenceLength = 0,
    private_rank: private_options.Rank = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until the gate has decided on what it made.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Queues a distillation; a worker claims it.

    With --wait the exit code is 5 if the distillation fails or the gate turns its release down.
    """
    from ebbflow.api.v1.distillation_pb2 import CreateDistillationRequest

    distillation = _order(context.params)
    private = private_options.PrivateOptions.of(context.params)
    with connect(context) as client:
        private.add_to(distillation, client)
        request = CreateDistillationRequest(distillation=distillation, request_id=request_id())
        with private.kept(client, distillation):
            made = client.distillations.CreateDistillation(request).distillation
        private_options.say_account(made)
        if wait:
            made = _follow(client, made.name)
        _print(output, made)
        if wait:
            _check(made)
            check(releases.await_gate(client, made.release))


def _order(said: dict[str, Any]) -> Any:
    """What the options of `start` ask for, private texts aside."""
    from ebbflow.api.v1.distillation_pb2 import Distillation, Recipe

    recipe = {field: said[field] for field in Recipe.DESCRIPTOR.fields_by_name}
    return Distillation(
        student=values.full_name("students", said["student"]),
        recipe=Recipe(**{**recipe, "keep_bf16": said["keep_bf16"] or []}),
        base_release=values.release_name(said["base_release"]) if said["base_release"] else "",
        round=values.full_name("rounds", said["round_"]) if said["round_"] else "",
        round_alone=said["round_alone"],
        mixture=values.shares(said["mixture"] or []),
        population=said["population"],
        population_share=said["population_share"],
        adapter_round=values.full_name("rounds", said["adapter_round"]) if said["adapter_round"] else "",
    )


@app.command(epilog=example("ebbflow distillation watch 6f0a"))
def watch(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows progress until a distillation has ended; fails if it fails."""
    with connect(context) as client:
        last = _follow(client, values.full_name("distillations", name))
        _print(output, last)
    _check(last)
    say(f"{last.release} goes to the gate: `ebbflow release watch {values.short_release(last.release)}`")


@app.command("list", epilog=example("ebbflow distillation list --student faq"))
def list_(
    context: typer.Context,
    student: Annotated[str, typer.Option(help="Only this student's.")] = "",
    limit: Limit = 0,
    output: Output = Format.TABLE,
) -> None:
    """Lists distillations, newest first."""
    from ebbflow.api.v1.distillation_pb2 import ListDistillationsRequest
    from ebbflow.client.admin import listed

    request = ListDistillationsRequest(student=values.full_name("students", student) if student else "")
    with connect(context) as client:
        items = listed(client.distillations.ListDistillations, request, "distillations", limit)
        print_list(output, items, COLUMNS)


@app.command(epilog=example("ebbflow distillation show 6f0a -o json"))
def show(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows one distillation."""
    from ebbflow.api.v1.distillation_pb2 import GetDistillationRequest

    request = GetDistillationRequest(name=values.full_name("distillations", name))
    with connect(context) as client:
        print_one(output, client.distillations.GetDistillation(request).distillation)


@app.command(epilog=example("ebbflow distillation cancel 6f0a"))
def cancel(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Stops a distillation; what it has trained is not released."""
    from ebbflow.api.v1.distillation_pb2 import CancelDistillationRequest

    request = CancelDistillationRequest(name=values.full_name("distillations", name))
    with connect(context) as client:
        _print(output, client.distillations.CancelDistillation(request).distillation)


@app.command(
    epilog=example("ebbflow distillation forget 6f0a", "ebbflow distillation forget --private-corpus tickets.jsonl")
)
def forget(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="DISTILLATION", help='Such as "6f0a".')] = "",
    private_corpus: Annotated[Path | None, typer.Option(help="The texts, where no distillation is known.")] = None,
) -> None:
    """Deletes a distillation's private texts from the cloud at once; what was learnt stays in its release.

    They go by themselves, by default a day after the last distillation on them has ended.
    """
    from ebbflow.api.v1.distillation_pb2 import DeletePrivateCorpusRequest

    request = DeletePrivateCorpusRequest(
        name=values.full_name("distillations", name) if name else "",
        private_corpus_sha256=private_options.sha256_of(private_corpus) if private_corpus else b"",
    )
    with connect(context) as client:
        deleted = client.distillations.DeletePrivateCorpus(request).deleted
    say("deleted" if deleted else "nothing to delete: the texts are not in the cloud")


def reading(distillation: Any, now: dt.datetime) -> Reading:
    """Says what to show of a running distillation."""
    notes = []
    if distillation.step:
        notes = [f"loss {distillation.loss:.4f}", f"{distillation.tokens_per_second:,.0f} tokens/s"]
    if distillation.HasField("eta_time") and _state(distillation) == "running":
        left = distillation.eta_time.ToDatetime(dt.UTC) - now
        notes.append(f"{remaining(left.total_seconds())} left")
    return Reading(_state(distillation), distillation.step, _steps(distillation), ", ".join(notes))


def _follow(client: "AdminClient", name: str) -> Any:
    from ebbflow.api.v1.distillation_pb2 import WatchDistillationRequest

    def stream() -> Iterator[Any]:
        request = WatchDistillationRequest(name=name)
        for answer in client.distillations.WatchDistillation(request, timeout=WATCH_S):
            yield answer.distillation

    return follow(
        name,
        stream,
        lambda distillation: reading(distillation, dt.datetime.now(dt.UTC)),
        lambda distillation: _state(distillation) in {"succeeded", "failed", "cancelled"},
    )


def _check(distillation: Any) -> None:
    if (state := _state(distillation)) != "succeeded":
        message = f"{distillation.name} {state}" + (f": {distillation.error}" if distillation.error else "")
        raise EbbflowError(Reason.STATE_CONFLICT, message, name=distillation.name)


def _print(output: Format, distillation: Any) -> None:
    if output is Format.JSON:
        print_one(output, distillation)
    else:
        print_list(output, [distillation], COLUMNS)
