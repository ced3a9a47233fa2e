"""One user changes a report by what the plan allows, whatever the user did."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.privacy.vector import Contribution, Layout, add_up, sensitivity_squared

CAPS = st.lists(st.integers(1, 9), max_size=3)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Layout, list[int], list[Contribution], Contribution]:
    caps = draw(CAPS)
    layout = Layout(bins=draw(st.integers(1, 8)), metrics=len(caps), nulls=draw(st.integers(0, 5)))
    user = st.builds(
        Contribution,
        bin=st.integers(0, layout.bins - 1),
        failed=st.booleans(),
        metrics=st.tuples(*(st.integers(-100, 10**6) for _ in caps)),
    )
    return layout, caps, draw(st.lists(user, max_size=10)), draw(user)


@given(worlds())
def test_a_user_more_changes_the_vector_by_at_most_the_sensitivity(
    world: tuple[Layout, list[int], list[Contribution], Contribution],
) -> None:
    layout, caps, others, user = world
    without, with_ = add_up(layout, caps, others), add_up(layout, caps, [*others, user])
    change = [after - before for before, after in zip(without, with_, strict=True)]
    assert 1 <= sum(part * part for part in change) <= sensitivity_squared(caps)
    assert sum(layout.seen(change)) + sum(layout.failed(change)) == 1
    assert not any(layout.null_cells(change))


@given(worlds())
def test_the_parts_make_up_the_whole(world: tuple[Layout, list[int], list[Contribution], Contribution]) -> None:
    layout, _, _, _ = world
    cells = list(range(layout.length))
    parts = [layout.seen(cells), layout.failed(cells), layout.metric_cells(cells), layout.null_cells(cells)]
    assert [cell for part in parts for cell in part] == cells


@pytest.mark.parametrize("bin_", [-1, 3])
def test_a_vote_for_no_bin_is_refused(bin_: int) -> None:
    with pytest.raises(ValueError, match="no bin"):
        add_up(Layout(3, 0, 64), [], [Contribution(bin_)])
