"""The demo's users: a seed decides them, and they like topics unequally."""

from demo import users

ASKED = {f"topic-{n:02}": [f"title {n} {i} and " + "some words that follow " * 20 for i in range(5)] for n in range(12)}


def test_a_seed_decides_the_crowd() -> None:
    first = users.crowd(ASKED, agents=3, users=10, seed=1)
    assert first == users.crowd(ASKED, agents=3, users=10, seed=1)
    assert first != users.crowd(ASKED, agents=3, users=10, seed=2)


def test_every_user_has_a_name_of_its_own_and_all_requests() -> None:
    sites = users.crowd(ASKED, agents=3, users=10, seed=0)
    keys = [user.key for site in sites for user in site]
    assert len(set(keys)) == 30
    assert all(len(user.asks) == users.REQUESTS for site in sites for user in site)


def test_prompt_and_rest_are_the_document() -> None:
    known = {text for texts in ASKED.values() for text in texts}
    for site in users.crowd(ASKED, agents=2, users=10, seed=0):
        for user in site:
            for ask in user.asks:
                assert ask.prompt + ask.rest in known
                assert 0 < len(ask.prompt) <= users.PROMPT_CHARS
                assert ask.rest.startswith(" ")


def test_the_fleet_likes_topics_unequally_and_demand_adds_up() -> None:
    demand = users.demand(users.crowd(ASKED, agents=3, users=60, seed=0))
    assert abs(sum(demand.values()) - 1) < 1e-9
    assert max(demand.values()) > 2 / len(ASKED)


def test_a_user_takes_an_answer_that_says_what_follows() -> None:
    ask = users.Ask("t", "Return the", " number of items in the list.")
    assert users.outcome(" number of the items", ask) == "accepted"
    assert users.outcome(" colour orange zebra", ask) == "rejected"
    assert users.outcome("", ask) == "rejected"
    assert users.outcome(" ... !", ask) == "rejected"
