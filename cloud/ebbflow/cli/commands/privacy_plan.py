"""`ebbflow privacy plan`: what a round will be worth, before anybody is asked."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ebbflow.cli.options import Output, example
from ebbflow.cli.output import Format, print_json

if TYPE_CHECKING:
    from ebbflow.common.privacy.forecast import Forecast, Question

EPILOG = example(
    "ebbflow privacy plan --agents 1000 --users 20 --epsilon 4",
    "ebbflow privacy plan --agents 50 --users 200 --epsilon 2 --bins 30 --rounds 1",
)


def plan(
    agents: Annotated[int, typer.Option(help="Agents that serve the student.")],
    users: Annotated[int, typer.Option(help="Users of each agent who use the student in a round.")],
    epsilon: Annotated[float, typer.Option(help="Of a whole window.")] = 4.0,
    bins: Annotated[int, typer.Option(help="Topics that users vote for.")] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds that share a window's budget.")] = 4,
    delta: Annotated[float, typer.Option(help="Of a whole window.")] = 1e-6,
    skew: Annotated[float, typer.Option(help="The topic of rank r is asked for r to the power of -skew times.")] = 0.8,
    output: Output = Format.TABLE,
) -> None:
    """Says what a round of feedback will tell, and what the next student gains from it. Asks nobody."""
    from ebbflow.common.privacy.forecast import Question, forecast

    question = Question(agents=agents, users=users, epsilon=epsilon, bins=bins, rounds=rounds, delta=delta, skew=skew)
    found = forecast(question)
    if output is Format.JSON:
        print_json(asdict(question) | asdict(found))
        return
    for line in _lines(question, found):
        print(line)


def _lines(question: "Question", found: "Forecast") -> list[str]:
    everybody = question.agents * question.users
    facts = {
        "noise on each count of an agent": f"{found.agent_noise_std:.2f} (standard deviation)",
        "noise on the sum of all agents": f"{found.noise_std:.1f}",
        "users that must agree to be seen": f"{found.users_needed:,} of {everybody:,}",
        "topics that stand out": f"{found.bins_seen:.0%} of {question.bins}",
        "mixture's distance to the truth": f"{found.error:.2f} of 2"
        f" ({found.error_without_noise:.2f} without noise, {found.error_without_feedback:.2f} without feedback)",
        "gain of the next student": f"{max(0.0, found.gain_share):.0%} of what unprotected feedback brings",
    }
    if question.rounds > 1:
        together = f"{max(0.0, found.window_gain_share):.0%}, {question.rounds} rounds of a window together"
        facts["gain at the window's end"] = together
    width = max(map(len, facts))
    return [f"{name:<{width}}  {fact}" for name, fact in facts.items()] + ["", verdict(question, found)]


def verdict(question: "Question", found: "Forecast") -> str:
    """What to make of a forecast, in one sentence."""
    if found.gain_share >= 0.8:  # noqa: PLR2004 - said in the documentation
        return "A round is worth its budget."
    if found.window_gain_share >= 0.8:  # noqa: PLR2004 - likewise
        return f"A round helps, and the {question.rounds} of a window together are worth their budget."
    remedies = ["fewer topics"] if question.bins > 10 else []  # noqa: PLR2004 - the smallest number that was measured
    remedies += [f"fewer rounds than {question.rounds} in a window"] if question.rounds > 1 else []
    remedies += ["more agents or users", "a larger epsilon"]
    words = ", ".join(remedies[:-1]) + f" or {remedies[-1]}"
    if found.gain_share >= 0.3:  # noqa: PLR2004 - likewise
        return f"A round helps, and would help more with {words}."
    return f"A round is mostly noise: it needs {words}."
