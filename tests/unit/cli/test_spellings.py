"""Phases, windows, times and sizes: what people type and what they read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cli import phases, quantities, values, windows
from ebbflow.cli.commands import rollout_start
from ebbflow.cli.phases import PhaseSpec
from ebbflow.cli.windows import Window
from ebbflow.cloud.rollout import advice
from ebbflow.cloud.rollout import windows as cloud_windows
from ebbflow.common.errors import EbbflowError, Reason

LABELS = st.from_regex(r"[a-z0-9](?:[a-z0-9._/-]{0,8}[a-z0-9])?=[A-Za-z0-9._-]{0,8}", fullmatch=True)
SHARES = st.floats(min_value=0, max_value=1, exclude_min=True, allow_subnormal=False)
TIMES_S = st.integers(min_value=0, max_value=10**10).map(lambda ms: ms / 1000)


@st.composite
def specs(draw: st.DrawFn) -> PhaseSpec:
    share = draw(st.none() | SHARES)
    selector = draw(st.none() | st.lists(LABELS, min_size=1, max_size=3).map(",".join))
    count = draw(st.integers(1, 2**32 - 1)) if share is None and (selector is None or draw(st.booleans())) else None
    return PhaseSpec(
        share=share,
        count=count,
        selector=selector,
        success_share=draw(st.none() | SHARES),
        failure_share=draw(st.none() | st.floats(min_value=0, max_value=1, exclude_max=True)),
        min_answers=draw(st.none() | st.integers(1, 2**32 - 1)),
        soak_s=draw(st.none() | TIMES_S),
        silence_s=draw(st.none() | TIMES_S),
        probe_rise=draw(st.none() | st.floats(min_value=0, max_value=1e6)),
        acceptance_drop=draw(st.none() | st.floats(min_value=0, max_value=1, exclude_max=True)),
    )


ZONES = st.sampled_from(["", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+5", "CET"])
WINDOWS = st.builds(
    Window,
    weekdays=st.sets(st.integers(1, 7)).map(lambda days: tuple(sorted(days))),
    start=st.builds("{:02}:{:02}".format, st.integers(0, 23), st.integers(0, 59)),
    duration_s=st.integers(1, 7 * 86_400_000).map(lambda ms: ms / 1000),
    time_zone=ZONES,
)


@given(specs())
def test_a_phase_that_is_written_is_read_as_the_same(spec: PhaseSpec) -> None:
    assert phases.read(phases.write(spec)) == spec


def _unset_when_zero(spec: PhaseSpec) -> PhaseSpec:
    from dataclasses import replace

    names = ("failure_share", "probe_rise", "acceptance_drop")
    return replace(spec, **{name: getattr(spec, name) or None for name in names})


@given(specs())
def test_a_phase_survives_the_contract(spec: PhaseSpec) -> None:
    assert phases.of_proto(phases.to_proto(spec)) == _unset_when_zero(spec)


@given(WINDOWS)
def test_a_window_that_is_written_is_read_as_the_same(window: Window) -> None:
    assert windows.read(windows.write(window)) == window
    assert windows.of_proto(windows.to_proto(window)) == window


@given(st.integers(min_value=0, max_value=10**12))
def test_a_time_that_is_written_is_read_as_the_same(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert round(values.seconds(quantities.duration(seconds)), 3) == seconds


@given(st.text(max_size=40))
def test_no_text_breaks_the_reading_of_phases_and_windows(text: str) -> None:
    reasons = set()
    for read in (phases.read, windows.read):
        try:
            read(text)
        except EbbflowError as error:
            reasons.add(error.reason)
    assert reasons <= {Reason.INVALID_REQUEST}


WORDS = st.sampled_from([*phases.KEYS, "mon-fri", "22:00", "8h", "Europe/Berlin", "=", "0.5", "5%", '"', "'", "1e400"])


@given(st.lists(WORDS, max_size=6), st.sampled_from(["", " ", "="]))
def test_no_words_in_any_order_break_the_reading(words: list[str], between: str) -> None:
    test_no_text_breaks_the_reading_of_phases_and_windows.hypothesis.inner_test(between.join(words))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.05", PhaseSpec(share=0.05)),
        ("5%", PhaseSpec(share=0.05)),
        ("1 soak=1h30m", PhaseSpec(share=1, soak_s=5400)),
        ("count=5 selector=ring=canary,site=berlin", PhaseSpec(count=5, selector="ring=canary,site=berlin")),
        ("selector=ring=canary success=90%", PhaseSpec(selector="ring=canary", success_share=0.9)),
        ("0.1 failure=0.1", PhaseSpec(share=0.1, failure_share=0.1)),
        ("0.1 min-answers=3 silence=15m", PhaseSpec(share=0.1, min_answers=3, silence_s=900)),
        ("0.1 probe-rise=0.02 acceptance-drop=0.05", PhaseSpec(share=0.1, probe_rise=0.02, acceptance_drop=0.05)),
    ],
)
def test_phases_are_read(text: str, expected: PhaseSpec) -> None:
    assert phases.read(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soak=10m",
        "0",
        "1.5",
        "101%",
        "-0.1",
        "nan",
        "0.1 0.2",
        "0.1 count=3",
        "count=0",
        "count=99999999999",
        "0.1 soak=1",
        "0.1 soak=1h soak=2h",
        "0.1 colour=red",
        "selector=ring",
        "0.1 failure=1",
        "0.1 probe-rise=1e999",
        "0.1 'soak=1h",
    ],
)
def test_anything_else_is_no_phase(text: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        phases.read(text)
    assert caught.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mon,tue 22:00 8h CET", Window(weekdays=(1, 2), start="22:00", duration_s=28_800, time_zone="CET")),
        ("sat,sun 00:00 1d", Window(weekdays=(6, 7), start="00:00", duration_s=86_400)),
        ("fri-mon 01:30 90m UTC", Window(weekdays=(1, 5, 6, 7), start="01:30", duration_s=5400)),
        ("sat,sun 00:00-24:00 UTC", Window(weekdays=(6, 7), start="00:00", duration_s=86_400)),
        ("22:00-06:30 CET", Window(start="22:00", duration_s=30_600, time_zone="CET")),
        ("22:00-22:00", Window(start="22:00", duration_s=86_400)),
        ("03:00 2h", Window(start="03:00", duration_s=7200)),
        ("always", Window(start="00:00", duration_s=86_400)),
        ("Mon 03:00 7d", Window(weekdays=(1,), start="03:00", duration_s=604_800)),
    ],
)
def test_windows_are_read(text: str, expected: Window) -> None:
    assert windows.read(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mon",
        "22:00",
        "24:00 1h",
        "22:60 1h",
        "mon- 22:00 1h",
        "mond 22:00 1h",
        "mon 22:00 0s",
        "mon 22:00 8d",
        "mon 22:00-25:00",
        "25:00-03:00",
        "mon 22:00 1h Europe/Berlin x",
        "mon 22:00 1h ../etc",
        "never",
        "mon,,tue 22:00 1h",
    ],
)
def test_anything_else_is_no_window(text: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        windows.read(text)
    assert caught.value.reason is Reason.INVALID_REQUEST


@given(WINDOWS)
def test_the_cloud_takes_every_window_that_can_be_typed(window: Window) -> None:
    import datetime as dt

    theirs = cloud_windows.Window(
        weekdays=window.weekdays,
        start=window.start,
        duration=dt.timedelta(seconds=window.duration_s),
        time_zone=window.time_zone,
    )
    cloud_windows.check([theirs])


def test_windows_are_listed_as_they_are_typed() -> None:
    texts = ["mon-wed,sat 22:00 8h Europe/Berlin", "00:30 1h30m UTC"]
    assert windows.listed(windows.to_proto(windows.read(text)) for text in texts) == "; ".join(texts)
    assert windows.listed([]) == "always"


def test_a_plan_ends_with_everybody_and_its_gates_hold_where_a_phase_has_none() -> None:
    assert phases.plan([], {"soak_s": None}) == []
    both = {"soak_s": 60.0, "failure_share": 0.1}
    assert phases.plan(["0.05 soak=1h", "count=9"], both) == [
        PhaseSpec(share=0.05, soak_s=3600, failure_share=0.1),
        PhaseSpec(count=9, soak_s=60, failure_share=0.1),
        PhaseSpec(share=1, soak_s=60, failure_share=0.1),
    ]
    assert phases.plan(["0.05 failure=0", "1"], both)[0].failure_share == 0
    assert len(phases.plan(["1"], {})) == 1
    assert phases.plan(["1 selector=ring=canary"], {})[-1] == PhaseSpec(share=1)


def test_gates_alone_change_the_phases_of_the_policy_or_make_a_canary_of_a_tenth() -> None:
    policy = [PhaseSpec(count=29, soak_s=3600), PhaseSpec(share=1)]
    assert phases.plan([], {"soak_s": 5.0}, policy) == [PhaseSpec(count=29, soak_s=5), PhaseSpec(share=1, soak_s=5)]
    assert phases.plan([], {"soak_s": 5.0}) == [PhaseSpec(share=0.1, soak_s=5), PhaseSpec(share=1, soak_s=5)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (83_700_000, "83.7 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_sizes_read_as_people_say_them(count: int, text: str) -> None:
    assert quantities.size(count) == text


def test_the_time_on_a_line_is_bits_over_speed() -> None:
    assert quantities.transfer_time(12_500_000, 100e6) == "1.0s"
    assert quantities.transfer_time(18_800, 100e6) == "<0.1s"
    assert quantities.transfer_time(0, 1e6) == "0.0s"
    assert quantities.transfer_time(25_000_000, 1e6) == "3m20s"
    assert quantities.transfer_time(300_000_000, 1e6) == "40m"


def test_percentages_have_the_digits_that_they_need() -> None:
    assert [quantities.percent(share) for share in (0.05, 0.005, 0.8725, 1)] == ["5 %", "0.5 %", "87.2 %", "100 %"]


@given(st.floats(min_value=1e-6, max_value=0.999), st.floats(min_value=0.01, max_value=0.9999))
def test_the_advice_is_the_clouds(rate: float, confidence: float) -> None:
    count = rollout_start.agents_needed(rate, confidence)
    assert count == advice.agents_needed(rate, confidence)
    assert 1 - (1 - rate) ** count >= confidence - 1e-9
    assert count == 1 or 1 - (1 - rate) ** (count - 1) < confidence + 1e-9


@given(st.integers(min_value=1, max_value=100_000))
def test_what_so_many_agents_can_see_is_the_clouds_word_too(agents: int) -> None:
    rate = rollout_start.detectable_rate(agents)
    assert rate == pytest.approx(advice.detectable_rate(agents))
    assert 1 - (1 - rate) ** agents == pytest.approx(0.95)


def test_phases_say_whom_they_bring_in() -> None:
    texts = ("10%", "count=1", "count=5", "count=5 selector=ring=canary", "5% selector=ring=canary", "selector=a=b")
    said = [phases.who(phases.read(text), last=False) for text in texts]
    assert said == ["10 %", "1 agent", "5 agents", "5 of ring=canary", "5 % of ring=canary", "a=b"]
    assert phases.who(PhaseSpec(share=1), last=True) == "the rest"


def test_a_release_may_be_its_number() -> None:
    assert values.release_of("students/faq", "3") == values.release_of("faq", "faq/3") == "students/faq/releases/3"
    for wrong in ("other/3", "0", "three"):
        with pytest.raises(EbbflowError):
            values.release_of("faq", wrong)
