"""Tables and figures of what was measured."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from private_feedback.device import Cost
from private_feedback.experiment import Result
from private_feedback.fleet import ROUNDS
from private_feedback.updates import Found

NONE, UNPROTECTED, TRUTH = 0.0, float("inf"), -1.0
ASKED_AGENTS, ASKED_EPSILON = 1_000, 4.0
LEAST_GAIN = 0.02
"""Nats per token that unprotected feedback must gain for a share of it to mean anything."""


def _of(results: Iterable[Result], agents: int, epsilon: float, rounds: int = 1) -> list[Result]:
    wanted = (agents, epsilon, rounds)
    found = [result for result in results if (result.arm.agents, result.arm.epsilon, result.arm.rounds) == wanted]
    return sorted(found, key=lambda result: result.arm.seed)


def _mean(results: Sequence[Result], value: Callable[[Result], float]) -> float:
    return statistics.fmean(value(result) for result in results)


def gains(results: Sequence[Result], agents: int, epsilon: float, rounds: int = 1) -> list[float]:
    """Share of the gain that the same votes bring unprotected, by seed.

    The denominator is the mean over seeds, so that one fleet with little to gain does not decide.
    """
    none, best = _of(results, agents, NONE), _of(results, agents, UNPROTECTED, rounds)
    ours = _of(results, agents, epsilon, rounds)
    whole = _mean(none, lambda result: result.nats) - _mean(best, lambda result: result.nats)
    if whole < LEAST_GAIN:
        return []
    return [(before.nats - after.nats) / whole for before, after in zip(none, ours, strict=True)]


def row(results: Sequence[Result], agents: int, epsilon: float, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    ours, shares = _of(results, agents, epsilon, rounds), gains(results, agents, epsilon, rounds)
    return {
        "agents": agents,
        "epsilon": None if epsilon <= 0 or epsilon == UNPROTECTED else epsilon,
        "rounds": rounds,
        "feedback": {NONE: "none", UNPROTECTED: "unprotected", TRUTH: "truth"}.get(epsilon, "private"),
        "error": _mean(ours, lambda result: result.error),
        "nats_per_token": _mean(ours, lambda result: result.nats),
        "gain_share": statistics.fmean(shares) if shares else None,
        "gain_share_least": min(shares) if shares else None,
        "gain_share_most": max(shares) if shares else None,
        "informative": _mean(ours, lambda result: float(result.informative)),
    }


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """All lines, smallest fleet first."""
    order = {UNPROTECTED: 1, TRUTH: 2}
    arms = [result.arm for result in results]
    kinds = sorted({(arm.agents, order.get(arm.epsilon, 0), arm.rounds, arm.epsilon) for arm in arms})
    return [row(results, agents, epsilon, rounds) for agents, _, rounds, epsilon in kinds]


def table(name: str, results: Sequence[Result]) -> str:
    """The lines as Markdown."""
    seeds = len({result.arm.seed for result in results})
    lines = [
        f"\n{name}, {seeds} fleets of each size; {results[0].accuracy:.0%} of the votes are in the right bin\n",
        "| agents | feedback | rounds | distance to the truth | nats per token | share of the gain | least to most |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in rows(results):
        label = f"epsilon {found['epsilon']:g}" if found["epsilon"] else found["feedback"]
        share, spread = "", ""
        if found["gain_share"] is not None:
            share = f"{found['gain_share']:.0%}"
            spread = f"{found['gain_share_least']:.0%} to {found['gain_share_most']:.0%}"
        cells = (
            f"{found['agents']:,}",
            label,
            str(found["rounds"]),
            f"{found['error']:.2f}",
            f"{found['nats_per_token']:.3f}",
            share,
            spread,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cost(found: Cost) -> str:
    """What a device pays, in a sentence."""
    return (
        f"a round of 150 topics costs an agent of 20 users {found.cpu_s:.3f} CPU-seconds,"
        f" {found.bytes_up} bytes up and {found.bytes_down / 1000:.1f} kB down"
    )


def adapters(found: Sequence[Found]) -> str:
    """What rounds of adapter updates brought, as Markdown."""
    lines = [
        "\nadapter updates\n",
        "| agents | epsilon | nats before | after | after, without noise | CPU-s of an agent | kB up |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found:
        cells = [f"{each.agents:,}", f"{each.epsilon:g}", f"{each.nats_before:.4f}"]
        if each.nats is None or each.nats_without_noise is None or each.cpu_s is None or each.bytes_up is None:
            cells += [f"refused: {each.refusal}", "", "", ""]
        else:
            use = "" if each.informative else " (not used: it is noise)"
            cells += [f"{each.nats:.4f}{use}", f"{each.nats_without_noise:.4f}"]
            cells += [f"{each.cpu_s:.2f}", f"{each.bytes_up / 1000:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figures(found: dict[str, list[Result]], paid: Cost, updates: Sequence[Found]) -> dict[str, Any]:
    """The benchmark's JSON object."""
    measured = any(result.arm.agents == ASKED_AGENTS for result in found["150 topics"])
    shares = {
        (name, rounds): statistics.fmean(gains(found[f"{name} topics"], ASKED_AGENTS, ASKED_EPSILON, rounds))
        if measured
        else None
        for name in ("150", "10")
        for rounds in (1, ROUNDS)
    }
    return {
        "benchmark": "private-feedback",
        "metrics": {
            "gain_share_eps4_1000": shares["150", ROUNDS],
            "gain_share_eps4_1000_one_round": shares["150", 1],
            "gain_share_eps4_1000_10_topics": shares["10", ROUNDS],
            "gain_share_eps4_1000_10_topics_one_round": shares["10", 1],
            "kb_up": paid.bytes_up / 1000,
            "kb_down": paid.bytes_down / 1000,
            "agent_cpu_s": paid.cpu_s,
        },
        "accuracy": {name: results[0].accuracy for name, results in found.items()},
        "rows": {name: rows(results) for name, results in found.items()},
        "adapters": [vars(each) for each in updates],
    }
