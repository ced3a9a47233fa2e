"""Votes by what the device serves: shared words, or the student's own states."""

from collections.abc import Callable

import numpy as np

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.edge.agent.likeness import likeness_of
from ebbflow.edge.feedback.interactions import Interaction
from ebbflow.edge.feedback.votes import Bins, contributions_of
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

Make = Callable[..., Model]
TEXTS = ("How do I write a file?", "Which day is it?", "An x is an x.")
BINS = [pb.Bin(bin_id=f"1-{at}", texts=[text]) for at, text in enumerate(TEXTS)]


def plan(measure: "pb.RoundPlan.Measure.ValueType") -> pb.RoundPlan:
    metrics = [pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1)]
    return pb.RoundPlan(student="students/faq", bins=BINS, measure=measure, metrics=metrics, near_micro=900_000)


def test_without_the_student_there_is_no_measure(hub: Hub, model: Make) -> None:
    assert likeness_of(plan(pb.RoundPlan.MEASURE_STUDENT), hub) is None
    hub.swap(model(1, "students/other"))
    assert likeness_of(plan(pb.RoundPlan.MEASURE_STUDENT), hub) is None
    assert likeness_of(plan(pb.RoundPlan.MEASURE_LEXICAL), hub) is None


def test_a_plan_chooses_between_words_and_the_students_states(hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    for measure in (pb.RoundPlan.MEASURE_UNSPECIFIED, pb.RoundPlan.MEASURE_LEXICAL):
        assert isinstance(likeness_of(plan(measure), hub), Lexicon)
    by_states = likeness_of(plan(pb.RoundPlan.MEASURE_STUDENT), hub)
    assert by_states is not None
    expected = [model().engine.embed(one.tokenizer.encode(text, bos=True)) for text in TEXTS]
    np.testing.assert_allclose(by_states(TEXTS), np.stack(expected), atol=1e-5)


def test_users_vote_for_the_prompt_they_repeat_and_are_near_it_by_either_measure(hub: Hub, model: Make) -> None:
    hub.swap(model())
    users = {str(at).encode(): [Interaction(str(at), str(at).encode())] for at in range(len(TEXTS))}
    asked = {str(at): text for at, text in enumerate(TEXTS)}
    for measure in (pb.RoundPlan.MEASURE_LEXICAL, pb.RoundPlan.MEASURE_STUDENT):
        likeness = likeness_of(plan(measure), hub)
        assert likeness is not None
        found = contributions_of(plan(measure), users, lambda ids: {id_: asked[id_] for id_ in ids}, likeness)
        assert [(vote.bin, vote.metrics) for vote in found] == [(0, (1,)), (1, (1,)), (2, (1,))]
        strange = Bins(BINS, likeness).find("zzz qqq")
        assert strange is None or strange.cosine < 0.9
