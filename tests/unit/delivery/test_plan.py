"""Choosing the cheapest way, as plain decisions."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.codes.delta import FORMAT
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.plan import MOST_BASES, Held, Offer, Way, Wish

NAMES = [f"{number:064x}" for number in range(12)]
FILES = st.builds(SignedFile, st.sampled_from(NAMES), st.integers(1, 1000))
HELD = st.builds(
    Held,
    path=st.just(Path("weights")),
    file=FILES,
    precision=st.sampled_from(["int8", "int4", "bf16"]),
    release=st.integers(1, 4),
    derives=st.none() | FILES,
    doomed=st.booleans(),
)
OFFERS = st.builds(Offer, st.sampled_from(NAMES), FILES, st.sampled_from([FORMAT, "ebbflow.delta/2", ""]))
WISHES = st.builds(
    Wish,
    file=FILES,
    precision=st.sampled_from(["int8", "int4", "bf16"]),
    release=st.integers(1, 4),
    held=st.lists(HELD, max_size=12).map(tuple),
    partial_bytes=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1200)),
)


@given(WISHES, st.lists(OFFERS, max_size=12), st.sets(st.sampled_from(NAMES), max_size=3))
def test_every_plan_ends_with_the_full_file_and_begins_with_the_cheapest(
    wish: Wish, offers: list[Offer], shunned: set[str]
) -> None:
    steps = wish.steps(offers, shunned)
    assert [step.way for step in steps].count(Way.FULL) == 1
    assert steps[-1].way is Way.FULL
    costs = [step.fetch_bytes for step in steps]
    assert costs == sorted(costs)
    assert steps[-1].fetch_bytes == max(0, wish.file.size_bytes - wish.partial_bytes.get(wish.file.sha256, 0))


@given(WISHES, st.lists(OFFERS, max_size=12), st.sets(st.sampled_from(NAMES), max_size=3))
def test_no_delta_is_taken_that_is_unknown_unwanted_or_not_shorter(
    wish: Wish, offers: list[Offer], shunned: set[str]
) -> None:
    for step in wish.steps(offers, shunned):
        if step.way is not Way.DELTA:
            continue
        assert step.offer
        assert step.base
        assert step.offer.format == FORMAT
        assert 0 < step.offer.file.size_bytes < wish.file.size_bytes
        assert step.offer.file.sha256 not in shunned
        if step.derives_base:
            assert wish.precision == "int4"
            assert step.base.precision == "int8"
            assert step.base.derives
            assert step.base.derives.sha256 == step.offer.base_sha256
        else:
            assert step.base.precision == wish.precision
        kept = step.base.file.size_bytes if step.base.doomed else 0
        assert step.disk_bytes >= step.fetch_bytes + wish.file.size_bytes + kept


@given(WISHES)
def test_a_question_names_few_bases_and_each_can_be_had(wish: Wish) -> None:
    bases = wish.bases()
    assert len(bases) == len(set(bases)) <= MOST_BASES
    direct = {held.file.sha256 for held in wish.held if held.precision == wish.precision}
    derived = {held.derives.sha256 for held in wish.held if held.precision == "int8" and held.derives}
    assert set(bases) <= direct | (derived if wish.precision == "int4" else set())


def held(precision: str, release: int, name: int, **more: object) -> Held:
    return Held(Path(precision), SignedFile(NAMES[name], 800), precision, release, **more)  # type: ignore[arg-type]


def test_int4_derives_from_int8_of_the_same_release_only() -> None:
    wish = Wish(SignedFile(NAMES[0], 400), "int4", 2, (held("int8", 1, 1), held("int8", 2, 2)))
    step = wish.steps()[0]
    assert (step.way, step.fetch_bytes, step.base and step.base.release) == (Way.DERIVED, 0, 2)
    assert Wish(SignedFile(NAMES[0], 400), "int8", 2, (held("int8", 2, 2),)).derived() is None


def test_of_two_deltas_of_one_length_the_one_from_what_serves_is_taken() -> None:
    wish = Wish(SignedFile(NAMES[0], 400), "int8", 3, (held("int8", 2, 2), held("int8", 1, 1, doomed=True)))
    offers = [Offer(NAMES[base], SignedFile(NAMES[base + 5], 100), FORMAT) for base in (1, 2)]
    assert [step.base and step.base.release for step in wish.steps(offers)] == [2, 1, None]


def test_a_full_file_that_is_nearly_there_beats_a_delta() -> None:
    wish = Wish(SignedFile(NAMES[0], 400), "int8", 3, (held("int8", 2, 2),), {NAMES[0]: 350})
    assert [step.way for step in wish.steps([Offer(NAMES[2], SignedFile(NAMES[5], 100), FORMAT)])] == [Way.FULL]
    begun = Wish(wish.file, "int8", 3, wish.held, {NAMES[0]: 350, NAMES[5]: 80})
    assert begun.steps([Offer(NAMES[2], SignedFile(NAMES[5], 100), FORMAT)])[0].way is Way.DELTA
