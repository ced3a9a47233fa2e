"""Random histories of one rollout: agents, people, several replicas and clocks do whatever they may, in any order.

Whatever happens, what is claimed of the state machine holds after every single step (the invariants), at each tick (it
changes nothing when taken again), and at the end (a fleet that is healthy from then on ends where the policy says).
"""

import contextlib
import datetime as dt
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ebbflow.cloud.registry.tables import DeviceState, OnHalt, RolloutState
from ebbflow.cloud.rollout import decision, gates, machine, phases, verbs, windows
from ebbflow.cloud.rollout.phases import Member, Phase
from ebbflow.cloud.rollout.state import HANDING_OUT, Acceptance, Device, Rollout
from ebbflow.cloud.rollout.windows import Window
from ebbflow.common.errors import EbbflowError, Reason

NOW = dt.datetime(2026, 11, 1, 20, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
OLD, NEW, HELD = 1, 2, 7
ADA, BOB = "admins/ada", "admins/bob"
STEPS = (0, 1, 30, 600, 3 * 3600, 20 * 3600)
NIGHTLY = (Window(start="22:00", duration=dt.timedelta(hours=4)),)

plans = st.lists(
    st.builds(
        Phase,
        share=st.floats(0.05, 1.0),
        success_share=st.floats(0.3, 1.0),
        failure_share=st.floats(0.0, 0.7),
        min_answers=st.integers(1, 4),
        soak=st.sampled_from([0, 1, 600]).map(lambda s: s * SECOND),
        silence_limit=st.sampled_from([1, 60, 3600]).map(lambda s: s * SECOND),
        max_probe_rise=st.sampled_from([0.0, 0.1]),
        max_acceptance_drop=st.sampled_from([0.0, 0.05]),
    ),
    min_size=1,
    max_size=4,
)
which = st.integers(0, 30)


class History(RuleBasedStateMachine):
    """One rollout and its devices. The registry is `rollout` and `devices`; what the devices do is in `serving`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.rollout = Rollout(release_number=NEW, phases=(Phase(),))
        self.devices: dict[str, Device] = {}
        self.frozen: dict[str, Device] = {}
        self.approved = True
        self.old_allowed = True

    @initialize(
        plan=plans,
        agents=st.integers(0, 10),
        previous=st.sampled_from([OLD, None]),
        windowed=st.sampled_from([False, False, True]),
        spread=st.sampled_from([0, 60, 7200]),
        on_halt=st.sampled_from(OnHalt),
        approval=st.sampled_from([False, False, False, True]),
    )
    def create(
        self,
        plan: list[Phase],
        agents: int,
        previous: int | None,
        windowed: bool,
        spread: int,
        on_halt: OnHalt,
        approval: bool,
    ) -> None:
        self.approved = not approval
        self.rollout = Rollout(
            release_number=NEW,
            phases=tuple(plan),
            rollout_id="r1",
            windows=NIGHTLY if windowed else (),
            spread=spread * SECOND,
            on_halt=on_halt,
            state=RolloutState.WAITING_FOR_APPROVAL if approval else RolloutState.RUNNING,
            phase_begin_time=None if approval else self.now,
        )
        members = [Member(f"agent-{number:03d}") for number in range(agents)]
        self.devices = {
            agent: Device(agent_id=agent, phase=phase, previous_number=previous, serving_number=previous)
            for agent, phase in phases.freeze(members, plan).items()
        }
        self.tick()

    # Time and replicas

    @rule(step=st.sampled_from(STEPS))
    def time_passes_and_a_replica_ticks(self, step: int) -> None:
        self.now += step * SECOND
        self.tick()

    @rule(step=st.sampled_from(STEPS))
    def the_clock_is_put_back(self, step: int) -> None:
        self.now -= step * SECOND

    @rule(step=st.sampled_from(STEPS))
    def a_replica_whose_clock_is_ahead_dies_before_it_commits(self, step: int) -> None:
        machine.tick(self.rollout, self.devices.values(), self.now + step * SECOND)

    @rule(times=st.integers(2, 4))
    def many_replicas_tick(self, times: int) -> None:
        for _ in range(times):
            self.tick()

    def tick(self) -> None:
        before, state, index = dict(self.devices), self.rollout.state, self.rollout.phase_index
        rests = machine.rests(self.rollout, gates.count(self.devices.values(), len(self.rollout.phases)), self.now)
        step = machine.tick(self.rollout, self.devices.values(), self.now)
        assert machine.tick(step.rollout, step.devices, self.now) == step, "a second tick changes nothing"
        assert machine.rests(step.rollout, gates.count(step.devices, len(step.rollout.phases)), self.now)
        self.rollout, self.devices = step.rollout, {device.agent_id: device for device in step.devices}
        assert self.rollout.phase_index >= index
        settled = [(device.state, device.phase) for device in before.values()]
        if rests and settled == [(device.state, device.phase) for device in self.devices.values()]:
            assert (self.rollout.state, self.rollout.phase_index) == (state, index), "the counts alone say so"
        if state is RolloutState.HALTED and self.rollout.allowed:
            assert (self.rollout.state, self.rollout.phase_index) == (state, index), "final until somebody acts"
        if state in machine.OVER | {RolloutState.WAITING_FOR_APPROVAL, RolloutState.SUCCEEDED} and self.rollout.allowed:
            assert self.rollout.state is state
        self.check_silence(before)
        self.check_evidence(before, index)

    def check_silence(self, before: dict[str, Device]) -> None:
        for agent, device in self.devices.items():
            if device.reason == "SILENT" and before[agent].state is DeviceState.ASSIGNED:
                since = max(time for time in (device.assign_time, device.not_before_time) if time is not None)
                assert self.now - since >= self.rollout.phases[device.phase].silence_limit

    def check_evidence(self, before: dict[str, Device], index: int) -> None:
        """A phase is left only on success in it, or when there was nobody to try it on."""
        for left in range(index, self.rollout.phase_index):
            tried = [d for d in self.devices.values() if d.phase == left and d.state is DeviceState.SUCCEEDED]
            untried = [d for d in before.values() if d.available and d.state is DeviceState.WAITING and d.phase > left]
            assert tried or not untried

    # Agents

    def agent(self, choice: int) -> str | None:
        agents = sorted(self.devices)
        return agents[choice % len(agents)] if agents else None

    def desired(self, agent: str) -> int | None:
        return machine.desired(self.rollout, self.devices[agent], self.now)

    @rule(choice=which)
    def an_agent_reads(self, choice: int) -> None:
        if (agent := self.agent(choice)) is None:
            return
        before = self.devices[agent]
        after = self.devices[agent] = machine.tell(self.rollout, before, self.now)
        if after != before:
            assert after.state is DeviceState.ASSIGNED
            assert self.approved
            assert self.rollout.state in HANDING_OUT
            assert after.phase <= self.rollout.phase_index
            assert windows.is_open(self.rollout.windows, self.now)
            assert after.not_before_time is not None
            assert after.not_before_time <= self.now
            assert after.pinned_number is None
            assert self.rollout.allowed

    @rule(choice=which, later=st.sampled_from([None, *STEPS]))
    def an_agent_fetches(self, choice: int, later: int | None) -> None:
        if (agent := self.agent(choice)) is None:
            return
        before = self.devices[agent]
        resume = None if later is None else self.now + later * SECOND
        after = self.devices[agent] = machine.fetching(self.rollout, before, self.now, resume)
        if after.state is not before.state:
            assert self.approved
            assert before.not_before_time is not None
            assert before.not_before_time <= self.now
            assert self.rollout.state in HANDING_OUT

    @rule(choice=which, succeeded=st.booleans(), rise=st.sampled_from([None, 0.0, 0.3]))
    def an_agent_answers(self, choice: int, succeeded: bool, rise: float | None) -> None:
        """Perhaps late: it may have been given up, or told something else, in the meantime."""
        agent = self.agent(choice)
        if agent is None or self.devices[agent].state is DeviceState.WAITING or agent in self.frozen:
            return
        device = machine.answer(self.devices[agent], succeeded, self.now, "PROBE_LOSS")
        serving = NEW if succeeded else device.serving_number
        self.devices[agent] = replace(device, probe_rise=rise, serving_number=serving)

    @rule(
        outcomes=st.lists(st.sampled_from([True, True, True, False]), min_size=1, max_size=8),
        step=st.sampled_from(STEPS),
    )
    def agents_do_as_they_are_told(self, outcomes: list[bool], step: int) -> None:
        """Those that are offered the release wait for their turn, install it and say what became of it."""
        offered = [a for a, d in sorted(self.devices.items()) if self.desired(a) == NEW and d.serving_number != NEW]
        for agent, succeeded in zip(offered, outcomes, strict=False):
            turn = self.devices[agent].not_before_time
            self.now = max(self.now, turn) if turn else self.now
            self.an_agent_reads(sorted(self.devices).index(agent))
            self.an_agent_answers(sorted(self.devices).index(agent), succeeded, None)
        self.time_passes_and_a_replica_ticks(step)

    @rule(choice=which)
    def an_agent_goes_back(self, choice: int) -> None:
        agent = self.agent(choice)
        if agent is not None and agent not in self.frozen and self.desired(agent) != NEW:
            self.devices[agent] = replace(self.devices[agent], serving_number=self.desired(agent))

    @rule(choice=which, available=st.booleans(), connected=st.booleans())
    def an_agent_comes_or_goes(self, choice: int, available: bool, connected: bool) -> None:
        agent = self.agent(choice)
        if agent is not None and self.devices[agent].pinned_number is None:
            self.devices[agent] = replace(self.devices[agent], available=available, connected=connected)

    @rule(previous=st.sampled_from([OLD, None]))
    @precondition(lambda self: len(self.devices) < 14)
    def an_agent_enrols_late(self, previous: int | None) -> None:
        name, last = f"late-{len(self.devices):03d}", len(self.rollout.phases) - 1
        had = previous if self.old_allowed else None
        self.devices[name] = Device(agent_id=name, phase=last, previous_number=had, serving_number=had)

    # People

    @rule(choice=which)
    def somebody_pins_an_agent(self, choice: int) -> None:
        agent = self.agent(choice)
        if agent is not None and self.devices[agent].pinned_number is None:
            held = replace(self.devices[agent], pinned_number=HELD, available=False)
            self.devices[agent] = self.frozen[agent] = held

    @rule(choice=which)
    def somebody_unpins_an_agent(self, choice: int) -> None:
        if self.frozen:
            agent = sorted(self.frozen)[choice % len(self.frozen)]
            del self.frozen[agent]
            self.devices[agent] = replace(self.devices[agent], pinned_number=None, available=True)

    @rule(rare=st.integers(0, 3))
    def somebody_pauses(self, rare: int) -> None:
        if rare:
            return
        with contextlib.suppress(EbbflowError):  # it does not run
            self.rollout = verbs.pause(self.rollout)

    @rule()
    def somebody_resumes(self) -> None:
        with contextlib.suppress(EbbflowError):  # it is neither paused nor halted
            step = verbs.resume(self.rollout, self.devices.values(), self.now)
            self.rollout, self.devices = step.rollout, {device.agent_id: device for device in step.devices}
            self.tick()

    @rule()
    def somebody_retries(self) -> None:
        with contextlib.suppress(EbbflowError):  # it waits, is halted, or has ended
            step = verbs.retry(self.rollout, self.devices.values(), (), self.now)
            assert step.rollout.state is self.rollout.state
            self.rollout, self.devices = step.rollout, {device.agent_id: device for device in step.devices}

    @rule(rare=st.integers(0, 9), verb=st.sampled_from([verbs.abort, verbs.supersede]))
    @precondition(lambda self: self.rollout.state in machine.UNFINISHED)
    def somebody_ends_it(self, rare: int, verb: object) -> None:
        if rare == 0:
            self.rollout = verb(self.rollout)  # type: ignore[operator]

    @rule(who=st.sampled_from([ADA, BOB]))
    @precondition(lambda self: self.rollout.state is RolloutState.WAITING_FOR_APPROVAL)
    def somebody_approves(self, who: str) -> None:
        try:
            self.rollout = verbs.approve(self.rollout, ADA, who, self.now)
        except EbbflowError as error:
            refused = error.reason
        else:
            assert who == BOB
            self.approved = True
            return
        assert (who, refused) == (ADA, Reason.APPROVAL_REQUIRED)

    @rule(rare=st.integers(0, 4), new=st.booleans())
    def somebody_revokes_a_release(self, rare: int, new: bool) -> None:
        if rare:
            return
        if new:
            self.rollout = replace(self.rollout, allowed=False)
        else:  # the registry never hands a previous release to the machine that may no longer be installed
            self.old_allowed = False
            self.devices = {agent: replace(device, previous_number=None) for agent, device in self.devices.items()}
            self.frozen = {agent: self.devices[agent] for agent in self.frozen}

    @rule(informative=st.booleans(), significant=st.booleans())
    def private_counts_come_in(self, informative: bool, significant: bool) -> None:
        said = Acceptance(rate=0.5, elsewhere=0.7, drop_significant=significant, informative=informative)
        self.rollout = replace(self.rollout, acceptance=tuple(said for _ in self.rollout.phases))

    # What always holds

    @invariant()
    def one_release_is_desired_and_only_one_that_may_be(self) -> None:
        for agent, device in self.devices.items():
            wanted = self.desired(agent)
            assert wanted == HELD if device.pinned_number else wanted in {device.previous_number, NEW}
            assert wanted != NEW or self.rollout.allowed, "a revoked release is never desired"
            assert wanted != OLD or self.old_allowed
            if wanted == NEW and device.previous_number != NEW:
                assert self.approved
                assert device.state is not DeviceState.FAILED

    @invariant()
    def who_was_not_told_is_offered_it_only_when_it_may_be(self) -> None:
        for agent, device in self.devices.items():
            if device.state is DeviceState.WAITING and self.desired(agent) == NEW:
                assert self.rollout.state in HANDING_OUT
                assert device.phase <= self.rollout.phase_index
                assert windows.is_open(self.rollout.windows, self.now)
                assert device.not_before_time is not None

    @invariant()
    def a_pinned_agent_is_never_touched(self) -> None:
        assert all(self.devices[agent] == device for agent, device in self.frozen.items())

    @invariant()
    def an_end_is_an_end(self) -> None:
        if self.rollout.state is RolloutState.ABORTED:
            assert all(
                self.desired(agent) == device.previous_number
                for agent, device in self.devices.items()
                if device.pinned_number is None
            )

    @invariant()
    def it_says_what_it_does_next(self) -> None:
        said = decision.next_decision(self.rollout, self.devices.values(), self.now)
        assert said.reason or self.rollout.state is RolloutState.HALTED

    def teardown(self) -> None:
        """From now on all is well: every agent is there and does as it is told. Where does everybody end?"""
        self.devices = {
            agent: device if agent in self.frozen else replace(device, available=True, connected=True)
            for agent, device in self.devices.items()
        }
        self.rollout = replace(self.rollout, acceptance=())
        self.now = max(self.now, NOW) + dt.timedelta(days=8)  # past what anybody has put off
        for _ in range(6 * (len(self.rollout.phases) + 2)):  # a turn every four hours
            self.now += dt.timedelta(hours=4, minutes=10)
            self.tick()
            for agent in sorted(set(self.devices) - set(self.frozen)):
                self.obey(agent)
            self.tick()
        self.check_where_everybody_ends()

    def obey(self, agent: str) -> None:
        """An agent reads what it is to serve, waits for its turn, and serves it."""
        wanted, turn = self.desired(agent), self.devices[agent].not_before_time
        if wanted == NEW and self.devices[agent].state is not DeviceState.SUCCEEDED:
            when = max(self.now, turn) if turn else self.now
            self.devices[agent] = machine.tell(self.rollout, self.devices[agent], when)
            if self.devices[agent].state is DeviceState.ASSIGNED:
                self.devices[agent] = machine.answer(self.devices[agent], True, self.now)
        if wanted != NEW or self.devices[agent].state is DeviceState.SUCCEEDED:
            self.devices[agent] = replace(self.devices[agent], serving_number=wanted)

    def check_where_everybody_ends(self) -> None:
        assert self.rollout.state is not RolloutState.RUNNING, "a healthy fleet never waits for ever"
        for agent, device in self.devices.items():
            if agent in self.frozen:
                assert self.desired(agent) == HELD
                continue
            assert device.serving_number == self.desired(agent)
            if self.rollout.state is RolloutState.SUCCEEDED and device.state is not DeviceState.FAILED:
                assert self.desired(agent) == NEW


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
