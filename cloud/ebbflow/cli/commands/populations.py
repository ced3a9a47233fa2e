"""`ebbflow population`: prompts that a student's users vote on, generation after generation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, print_list, print_one, say, table, when, word

if TYPE_CHECKING:
    from ebbflow.api.v1.population_pb2 import Population, Quality

app = group("Populations: prompts that users vote on, round after round.", "ebbflow population evolve faq")

_TEXT_CHARACTERS = 70


def _state(population: Any) -> str:
    from ebbflow.api.v1.population_pb2 import Population

    return word(Population.State, population.state)


def _method(population: Any) -> str:
    from ebbflow.api.v1.population_pb2 import Population

    return word(Population.Method, population.method) if population.method else ""


@dataclass(frozen=True)
class Line:
    """A generation and what a round said of it, if one did."""

    population: "Population"
    quality: "Quality | None"


COLUMNS: list[Column] = [
    ("NAME", lambda line: line.population.name),
    ("STATE", lambda line: _state(line.population)),
    ("MADE OF", lambda line: _method(line.population)),
    ("ROUND", lambda line: line.population.round),
    ("WINNERS", lambda line: line.quality.winners if line.quality else ""),
    ("THEIR SHARE", lambda line: f"{line.quality.winners_share:.0%}" if line.quality else ""),
    ("NEAR", lambda line: _near(line.quality)),
    ("SPREAD OVER", lambda line: f"{line.quality.effective_prompts:.1f}" if line.quality else ""),
    ("CROWDING", lambda line: f"{line.quality.crowding:.2f}" if line.quality else ""),
    ("CREATED (UTC)", lambda line: when(line.population.create_time)),
]


def _near(quality: "Quality | None") -> str:
    if quality is None or quality.near_share < 0:
        return ""
    return f"{quality.near_share:.0%} ± {quality.near_error:.0%}"


def with_quality(populations: "Iterable[Population]") -> list[Line]:
    """Puts beside each generation what the round on it said, which its successor remembers.

    Args:
        populations: of one student, newest first.
    """
    from ebbflow.api.v1.population_pb2 import Population

    lines: list[Line] = []
    said: Quality | None = None
    for population in populations:
        ready = population.state == Population.STATE_READY
        lines.append(Line(population, said if ready else None))
        if ready:
            said = population.parents if population.HasField("parents") else None
    return lines


@app.command(
    epilog=example("ebbflow population evolve faq", "ebbflow population evolve faq --round 5c1e --encoder /models/e5")
)
def evolve(
    context: typer.Context,
    student: str,
    round_: Annotated[
        str, typer.Option("--round", help="Closed round on the newest generation; without it one begins anew.")
    ] = "",
    size: Annotated[int, typer.Option(min=0, max=256, help="Prompts of the generation; 0 means 64.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of every random choice.")] = 0,
    encoder: Annotated[
        str, typer.Option(help="Folder of a sentence encoder on the workers; empty takes the student.")
    ] = "",
    public_texts_only: Annotated[bool, typer.Option("--public-texts-only", help="Do not ask the teacher.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Asks a worker for the next generation: of public texts, or of what a round's votes chose."""
    from ebbflow.api.v1.population_pb2 import EvolvePopulationRequest

    request = EvolvePopulationRequest(
        student=values.full_name("students", student),
        round=values.full_name("rounds", round_) if round_ else "",
        size=size,
        seed=seed,
        encoder=encoder,
        public_texts_only=public_texts_only,
        request_id=request_id(),
    )
    with connect(context) as client:
        made = client.populations.EvolvePopulation(request).population
    if output is Format.JSON:
        print_one(output, made)
    else:
        print_list(output, [Line(made, None)], COLUMNS)


@app.command("list", epilog=example("ebbflow population list faq"))
def list_(context: typer.Context, student: str, limit: Limit = 0, output: Output = Format.TABLE) -> None:
    """Lists a student's generations, newest first, with what the votes said of each."""
    from ebbflow.api.v1.population_pb2 import ListPopulationsRequest
    from ebbflow.client.admin import listed

    request = ListPopulationsRequest(parent=values.full_name("students", student))
    with connect(context) as client:
        found = list(listed(client.populations.ListPopulations, request, "populations", limit))
    if output is Format.JSON:
        print_list(output, found, [])
    else:
        print_list(output, with_quality(found), COLUMNS)


@app.command(epilog=example("ebbflow population show faq", "ebbflow population show faq/3 -o json"))
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Such as faq/3; a student alone means its newest.")],
    output: Output = Format.TABLE,
) -> None:
    """Shows one generation and its prompts, those with the largest share first."""
    from ebbflow.api.v1.population_pb2 import GetPopulationRequest

    with connect(context) as client:
        found = client.populations.GetPopulation(GetPopulationRequest(name=values.population_name(name))).population
    if output is Format.JSON:
        print_one(output, found)
        return
    prompts = sorted(found.prompts, key=lambda prompt: -prompt.weight)
    del found.prompts[:]
    print_one(output, found)
    rows = [
        [prompt.prompt_id, f"{prompt.weight:.1%}", prompt.topic, prompt.parent, _short(prompt.text)]
        for prompt in prompts
    ]
    for line in table(["PROMPT", "SHARE", "TOPIC", "PARENT", "TEXT"], rows) if rows else []:
        print(line)
    if not prompts:
        say("no prompts: a worker has not made them")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_CHARACTERS else line[: _TEXT_CHARACTERS - 1] + "…"
