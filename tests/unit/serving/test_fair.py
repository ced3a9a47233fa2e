"""Users who always want something get the same; who wants little never waits for who wants much."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.edge.serving.fair import FairQueue


@dataclass(eq=False)
class Item:
    user: str
    number: int = 0
    cost: int = 1
    dropped: bool = field(default=False)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), min_size=8, max_size=200))
def test_backlogged_users_are_served_alike(asked: list[tuple[str, int]]) -> None:
    """As long as two users both wait, what they were served differs by no more than two requests."""
    queue: FairQueue[Item] = FairQueue(1000)
    for number, (user, cost) in enumerate(asked):
        queue.push(Item(user, number, cost))
    left = Counter(user for user, _ in asked)
    served: Counter[str] = Counter()
    last: dict[str, int] = {}
    dearest = max(cost for _, cost in asked)
    while len(queue):
        item = queue.pop()
        assert last.get(item.user, -1) < item.number, "a user's own requests keep their order"
        last[item.user] = item.number
        queue.charge(item.user, item.cost)
        served[item.user] += item.cost
        left[item.user] -= 1
        queue.left(item.user)
        waiting = [user for user in left if left[user]]
        if waiting:
            assert max(served[u] for u in waiting) - min(served[u] for u in waiting) <= 2 * dearest


def test_who_comes_late_shares_from_then_on_and_makes_up_for_nothing() -> None:
    queue: FairQueue[Item] = FairQueue(100)
    for _ in range(20):
        queue.push(Item("early"))
    order = []
    for turn in range(30):
        if turn == 10:
            for _ in range(10):
                queue.push(Item("late"))
        item = queue.pop()
        order.append(item.user)
        queue.charge(item.user, 10)
        queue.left(item.user)
    assert set(order[:10]) == {"early"}
    late = [index for index, user in enumerate(order) if user == "late"]
    assert late[0] <= 11, "who comes is not behind those who came before"
    assert Counter(order[10:20])["late"] <= 6, "nor does it get all turns"


def test_a_pause_saves_up_no_turns() -> None:
    queue: FairQueue[Item] = FairQueue(100)
    queue.push(Item("a"))
    queue.push(Item("b"))
    for _ in range(2):
        queue.charge(user := queue.pop().user, 10)
        queue.left(user)
        queue.push(Item("a"))
    for _ in range(5):  # only a is here
        queue.charge("a", 10)
    for _ in range(4):
        queue.push(Item("b"))
    served: Counter[str] = Counter()
    for _ in range(4):
        user = queue.pop().user
        served[user] += 1
        queue.charge(user, 10)
    assert served == {"a": 2, "b": 2}


def test_a_flood_of_one_user_leaves_room_for_the_others() -> None:
    queue: FairQueue[Item] = FairQueue(8)
    flood = [Item("flood", number) for number in range(12)]
    assert [item for item in flood if queue.push(item) is item] == flood[8:]
    small = Item("small")
    assert queue.push(small) is flood[7], "the newest of who has most goes"
    assert len(queue) == 8
    queue.push(Item("small", 1))
    queue.push(Item("small", 2))
    queue.push(Item("small", 3))
    refused = Item("small", 4)
    assert queue.push(refused) is refused, "nobody gets more than who was there"
    assert Counter(item.user for item in queue) == {"flood": 4, "small": 4}


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "left", "remove"]), st.sampled_from("abc")), max_size=200))
def test_nothing_is_lost_and_nothing_is_kept_of_who_has_gone(steps: list[tuple[str, str]]) -> None:
    queue: FairQueue[Item] = FairQueue(6)
    waiting: set[int] = set()
    out: list[Item] = []
    items: dict[int, Item] = {}
    for number, (step, user) in enumerate(steps):
        if step == "push":
            items[number] = Item(user, number)
            waiting.add(number)
            if (dropped := queue.push(items[number])) is not None:
                waiting.remove(dropped.number)
        elif step == "pop" and waiting:
            out.append(queue.pop())
            waiting.remove(out[-1].number)
            queue.charge(out[-1].user, number)
        elif step == "left" and out:
            queue.left(out.pop().user)
        elif step == "remove":
            waiting -= {item.number for item in queue.remove(lambda item, user=user: item.user == user)}  # type: ignore[misc]
        assert {item.number for item in queue} == waiting
        assert len(queue) == len(waiting)
        present = {items[number].user for number in waiting} | {item.user for item in out}
        assert set(queue._present) == present
        assert present or not queue._served
    with_turns = len(queue)
    assert {queue.pop().number for _ in range(with_turns)} == waiting
    with pytest.raises(IndexError):
        queue.pop()
