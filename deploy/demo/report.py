"""What came of a run: a table for people and `report.json` for programs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

RUNS = {
    "first": "first student (every topic alike)",
    "control": "trained further without feedback",
    "feedback": "trained further with private feedback",
    "no_privacy": "trained further as if nothing were private",
}


@dataclass(frozen=True, kw_only=True)
class AgentReport:
    """One device."""

    agent: str
    epsilon_spent: float
    """For each user, in this window."""
    epsilon_left: float
    batch_bytes: int
    """Feedback that left the device."""
    fetched_bytes: int
    """Releases that came to it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of the demo."""

    seed: int
    bits_per_byte: dict[str, float]
    """By run; on held-out documents, weighted by what the fleet really asks for."""
    epsilon: float
    """What a window may cost each user."""
    delta: float
    epsilon_spent: float
    """The most that any agent has spent for a user."""
    agents: list[AgentReport]
    users: int
    requests: int
    accepted_share: float
    """Share of the answers that the users took."""
    batches_accepted: int
    informative: bool
    """Whether the round told more than noise."""
    bytes_sent: int
    """Feedback that left all devices."""
    bytes_fetched: int
    """Releases that came to all devices."""
    demand: dict[str, float]
    """What the fleet really asks for."""
    mixture: dict[str, float]
    """What the private round made of it."""
    seconds: dict[str, float]

    @property
    def gain(self) -> float:
        """Share of the control's bits that feedback saves."""
        return 1 - self.bits_per_byte["feedback"] / self.bits_per_byte["control"]

    def write(self, path: Path) -> None:
        """Writes `report.json`."""
        path.write_text(json.dumps(asdict(self) | {"gain": self.gain}, indent=2) + "\n")

    def text(self) -> str:
        """The table."""
        rows = [("bits per byte on what the fleet asks for (held out, lower is better)", "")]
        control = self.bits_per_byte["control"]
        for run, words in RUNS.items():
            value = self.bits_per_byte[run]
            change = "" if run in {"first", "control"} else f"   {100 * (value / control - 1):+.1f} %"
            rows.append((f"  {words}", f"{value:.3f}{change}"))
        rows += [
            ("", ""),
            (f"privacy, for each user of an agent (δ = {self.delta:g}, 30 days)", "ε spent   ε left"),
            *(
                (f"  {agent.agent}", f"{agent.epsilon_spent:.2f}      {agent.epsilon_left:.2f}")
                for agent in self.agents
            ),
            ("", ""),
            ("users and their requests", f"{self.users} and {self.requests}"),
            ("answers that they took", f"{100 * self.accepted_share:.0f} %"),
            ("private batches that the cloud kept", f"{self.batches_accepted} of {len(self.agents)}"),
            ("bytes of feedback that left the devices", f"{self.bytes_sent:,}"),
            ("bytes of releases that came to them", f"{self.bytes_fetched:,}"),
            ("", ""),
            ("seconds", ""),
            *((f"  {name.replace('_', ' ')}", f"{spent:.1f}") for name, spent in self.seconds.items()),
        ]
        width = max(len(left) for left, _ in rows) + 2
        return "\n".join(f"{left:<{width}}{right}".rstrip() for left, right in rows)
