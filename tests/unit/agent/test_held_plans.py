from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.edge.agent import held_plans
from ebbflow.edge.agent.held_plans import HeldPlans

NAMES = [f"rounds/{number}" for number in range(5)]


def signed(name: str, size_bytes: int = 10) -> pb.SignedPlan:
    return pb.SignedPlan(plan=pb.RoundPlan(round=name, student="s" * size_bytes).SerializeToString())


@given(looks=st.lists(st.sets(st.sampled_from(NAMES)), max_size=6))
def test_every_open_plan_is_there_at_every_look_however_little_the_cloud_sends(looks: list[set[str]]) -> None:
    held = HeldPlans()
    for open_ in looks:
        known = set(held.rounds)
        response = pb.GetPlanResponse(
            plans=[signed(name) for name in sorted(open_ - known)], held_rounds=sorted(open_ & known)
        )
        found = {pb.RoundPlan.FromString(each.plan).round for each in held.take(response)}
        assert found == open_ == set(held.rounds)


def test_a_cloud_that_knows_nothing_of_held_plans_sends_all_of_them() -> None:
    held = HeldPlans()
    for _ in range(2):
        assert held.take(pb.GetPlanResponse(plans=[signed("rounds/1")])) == [signed("rounds/1")]


def test_what_the_cloud_claims_to_be_held_and_is_not_is_ignored() -> None:
    assert HeldPlans().take(pb.GetPlanResponse(held_rounds=["rounds/1"])) == []


def test_a_plan_that_cannot_be_read_is_passed_on_and_not_held() -> None:
    held, broken = HeldPlans(), pb.SignedPlan(plan=b"\xff")
    assert held.take(pb.GetPlanResponse(plans=[broken, signed("rounds/1")])) == [broken, signed("rounds/1")]
    assert held.rounds == ["rounds/1"]


def test_a_cloud_cannot_fill_the_memory_with_plans() -> None:
    held = HeldPlans()
    large = held_plans._MOST_BYTES // 3
    plans = [signed(name, large) for name in NAMES]
    assert held.take(pb.GetPlanResponse(plans=plans)) == plans
    assert held.rounds == NAMES[:2]
