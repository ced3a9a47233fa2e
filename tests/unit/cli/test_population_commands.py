"""Populations on the command line, against a real control plane."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1.population_pb2 import Population, Quality
from ebbflow.cli import values
from ebbflow.cli.commands.populations import with_quality
from ebbflow.cloud.distillation.evolving import Evolver
from ebbflow.cloud.registry import tables
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.errors import EbbflowError

Run = Callable[..., Any]


def test_a_population_is_asked_for_shown_and_listed_with_what_the_votes_said(
    run: Run, cloud: Cloud, student: str, tmp_path: Path
) -> None:
    assert run("population", "show", "faq").code == 4
    made = run("population", "evolve", "faq", "--size", "4", "--seed", "2", "-o", "json").json
    assert (made["name"], made["state"]) == (f"{student}/populations/1", "STATE_QUEUED")
    assert "no prompts: a worker has not made them" in run("population", "show", "faq/1").err
    assert run("population", "evolve", "faq").code == 5, "one at a time"
    assert Evolver(cloud.registry, cloud.blobs, tmp_path, "w", 30.0).run_once()
    shown = run("population", "show", "faq").out
    assert "reason: the first generation is made of public texts" in shown
    prompts = run("population", "show", "faq/1", "-o", "json").json["prompts"]
    assert prompts[0]["text"] in shown
    quality = Quality(winners=3, winners_share=0.5, near_share=0.81, near_error=0.05, effective_prompts=2, crowding=0.4)
    with cloud.registry.transaction() as session:
        first = session.get_one(tables.Population, ("faq", 1))
        session.add(
            tables.Population(
                student_id="faq",
                generation=2,
                state=tables.PopulationState.READY,
                settings={},
                round_id="5c1e",
                create_time=first.create_time,
                prompts=first.prompts,
                method="METHOD_TEACHER",
                parents=MessageToDict(quality),
            )
        )
    head, second, first_line = run("population", "list", "faq").out.splitlines()
    assert head.split()[:2] == ["NAME", "STATE"]
    assert second.split()[:4] == [f"{student}/populations/2", "ready", "teacher", "rounds/5c1e"]
    assert "81% ± 5%" in first_line
    assert "81%" not in second
    assert [each["name"] for each in run("population", "list", "faq", "-o", "json").json] == [
        f"{student}/populations/2",
        f"{student}/populations/1",
    ]


def test_what_a_failed_generation_never_was_voted_on_stays_with_the_one_before() -> None:
    told = Quality(winners=7)
    newest_first = [
        Population(name="4", state=Population.STATE_QUEUED),
        Population(name="3", state=Population.STATE_READY, parents=told),
        Population(name="2", state=Population.STATE_FAILED),
        Population(name="1", state=Population.STATE_READY),
    ]
    assert [line.quality for line in with_quality(newest_first)] == [None, None, None, told]


def test_names_of_populations_may_be_short() -> None:
    assert values.population_name("faq") == "students/faq/populations/-"
    assert values.population_name("faq/3") == "students/faq/populations/3"
    assert values.population_name("students/faq/populations/3") == "students/faq/populations/3"
    for wrong in ("faq/x", "faq/0", "students/faq", "rounds/1/2"):
        with pytest.raises(EbbflowError):
            values.population_name(wrong)
