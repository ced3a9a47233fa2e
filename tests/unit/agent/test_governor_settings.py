"""What an operator sets of the governor, and what the status says of it."""

import datetime as dt
from pathlib import Path

import pytest

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.profile import device_profile
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.status import as_json, as_table


def load(tmp_path: Path, text: str) -> AgentSettings:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return AgentSettings.load(path)


def test_without_a_word_the_governor_chooses_and_has_no_latency_goal(tmp_path: Path) -> None:
    settings = load(tmp_path, "")
    assert (settings.precision_pin, settings.latency_goal_ms, settings.governor_dwell_s) == ("auto", 0, 30.0)


@pytest.mark.parametrize(
    "line",
    ['precision_pin = "int2"', "latency_goal_ms = -1", "governor_dwell_s = 0", "governor_dwell_s = 1e9"],
)
def test_what_cannot_be_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        load(tmp_path, line)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert line.partition(" ")[0] in str(caught.value)


def test_a_pin_is_one_of_the_precisions_that_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(EbbflowError) as caught:
        load(tmp_path, 'precision_pin = "bf16"\nprecisions = ["int8", "int4"]')
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.CONFIG_INVALID, "precision_pin")


def test_the_cloud_is_asked_for_the_pinned_precision_first(tmp_path: Path) -> None:
    def names(text: str) -> list[str]:
        wanted = device_profile(load(tmp_path, text)).precisions
        return [resources_pb2.Precision.Name(precision).removeprefix("PRECISION_").lower() for precision in wanted]

    assert names("") == ["int8", "int4", "bf16"]
    assert names('precision_pin = "bf16"') == ["bf16", "int8", "int4"]


def test_the_status_says_what_the_governor_decided_and_when() -> None:
    governor = pb.Governor(threads=1, reason="int4: 9 requests wait for a place; 1 thread, as many as are allowed")
    governor.change_time.FromDatetime(dt.datetime(2026, 11, 22, 4, 5, tzinfo=dt.UTC))
    model = pb.ModelStatus(student="students/faq", precision=resources_pb2.PRECISION_INT4, governor=governor)
    answer = pb.GetModelStatusResponse(models=[model, pb.ModelStatus(student="students/fixed")])
    table = as_table(answer)
    assert f"students/faq since 2026-11-22 04:05 UTC: {governor.reason}" in table
    assert "students/fixed since" not in table
    assert '"changeTime": "2026-11-22T04:05:00Z"' in as_json(answer)
